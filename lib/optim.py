"""Optimization: micro-batches, the learning rate, Muon and AdamW, averaged weights."""
import copy
import math

import torch
from torch import Tensor, nn

from lib.errors import UserError
from lib.runtime import Machine


def count_micro_batches(batch: int, micro_batch: int | None, devices: int) -> int:
    """Returns the number of micro-batches into which each device splits its part of a batch.

    Raises UserError if the batch does not divide evenly."""
    per_device = max(1, batch // devices)
    size = min(micro_batch or per_device, per_device)
    if batch % devices:
        raise UserError(f"--batch {batch} does not split evenly over {devices} devices: choose a "
                        f"--batch that is a multiple of {devices}")
    if batch % (devices * size):
        raise UserError(f"--batch {batch} on {devices} devices does not split into micro-batches "
                        f"of {size}: choose --micro-batch so that it does")
    return batch // (devices * size)


def micro_batches(length: int, count: int) -> list[slice]:
    """Returns `count` equal slices of a batch of this length."""
    size = length // count
    return [slice(start, start + size) for start in range(0, length, size)]


def set_learning_rate(
    optimizer: torch.optim.Optimizer, step: int, warmup: int, decay_until: int | None = None,
) -> None:
    """Sets the learning rates of a step, relative to those that the optimizer was made with.

    They rise linearly for `warmup` steps. Then they are constant, or decay along a cosine to 1% at
    step `decay_until`."""
    factor = 1.0
    if step < warmup:
        factor = (step + 1) / warmup
    elif decay_until is not None:
        angle = math.pi * (step - warmup) / max(decay_until - warmup, 1)
        factor = 0.01 + 0.99 * 0.5 * (1 + math.cos(angle))
    for group in optimizer.param_groups:
        first_rate = group.setdefault("first_lr", group["lr"])          # noted at the first call
        group["lr"] = first_rate * factor


class Muon(torch.optim.Optimizer):
    """Moves each matrix by its momentum with all singular values made about 1.

    So it moves equally far in all directions, where Adam follows a few strong ones (Jordan et al.
    2024, https://kellerjordan.github.io/posts/muon). matrices: parameters of two dimensions. dtype:
    in which the iterations of orthogonal() run. Matrices of one shape are stacked and iterated at
    once: torch.optim.Muon loops over them, which costs milliseconds of Python a step."""

    def __init__(
        self, matrices: list[nn.Parameter], lr: float, weight_decay: float, dtype: torch.dtype,
    ):
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for matrices in by_shape(group["params"]):
                gradients = [matrix.grad for matrix in matrices]
                momenta = [self._momentum(matrix) for matrix in matrices]
                # Nesterov's momentum, 0.95.
                torch._foreach_lerp_(momenta, gradients, 0.05)
                nesterov = torch._foreach_lerp(gradients, momenta, 0.95)
                updates = orthogonal(torch.stack(nesterov).to(self.dtype)).to(matrices[0].dtype)
                rows, columns = matrices[0].shape
                scale = group["lr"] * max(1, rows / columns) ** 0.5
                torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_sub_(matrices, updates.unbind(), alpha=scale)

    def _momentum(self, matrix: nn.Parameter) -> Tensor:
        state = self.state[matrix]
        if not state:
            state["momentum"] = torch.zeros_like(matrix)
        return state["momentum"]


def by_shape(tensors: list[Tensor]) -> list[list[Tensor]]:
    """Groups tensors by shape."""
    lists = {}
    for tensor in tensors:
        lists.setdefault(tensor.shape, []).append(tensor)
    return list(lists.values())


def orthogonal(matrices: Tensor) -> Tensor:
    """Returns roughly the nearest matrices with orthonormal rows or columns: (n, rows, columns).

    These are five Newton-Schulz iterations, with coefficients that raise small singular values
    fastest and leave all of them between 0.7 and 1.2 (Jordan et al. 2024)."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        # x <- 3.4445 x + (-4.7750 gram + 2.0315 gram gram) x, as two products that add.
        polynomial = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)
    return x.mT if tall else x


def transformer_optimizers(
    model: nn.Module, kind: str, lr: float, muon_lr: float, weight_decay: float, machine: Machine,
) -> dict[str, torch.optim.Optimizer]:
    """Returns the optimizers of a transformer by name: AdamW, and Muon for the blocks' matrices.

    kind: muon, or adamw for everything. Weight decay spares biases and LayerNorms."""
    if kind not in ("muon", "adamw"):
        raise ValueError(f"unknown optimizer {kind}")
    muon_matrices = []
    adamw_matrices = []
    vectors = []
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            vectors.append(parameter)
        elif kind == "muon" and name.startswith("blocks."):
            muon_matrices.append(parameter)
        else:
            adamw_matrices.append(parameter)
    groups = [
        {"params": adamw_matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizers = {"adamw": torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.96), fused=machine.fused)}
    if muon_matrices:
        dtype = torch.bfloat16 if machine.bf16 else torch.float32
        optimizers["muon"] = Muon(muon_matrices, muon_lr, weight_decay, dtype)
    return optimizers


def averaged(model: nn.Module) -> nn.Module:
    """Returns a frozen copy of a model, whose weights update_average() turns into an average."""
    return copy.deepcopy(model).eval().requires_grad_(False)


@torch.no_grad()
def update_average(ema: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Moves the averaged weights a fraction 1 - decay towards the model's."""
    # Early in training the average is over few steps, so that it forgets the initial weights.
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Loads an optimizer's moments and step counts, but not its hyperparameters.

    A run may resume with other flags and on another device. Moments get the memory layout of their
    parameters, as the CPU's fused Adam would misread them in another one."""
    # "fused" must be ours before torch loads: it says on which device Adam counts its steps.
    groups = []
    for ours, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
        groups.append(ours | {"params": saved["params"]})
    optimizer.load_state_dict({"state": state["state"], "param_groups": groups})
    for parameter, moments in optimizer.state.items():
        for name, value in moments.items():
            if torch.is_tensor(value) and value.shape == parameter.shape:
                moments[name] = torch.empty_like(parameter).copy_(value)


def count_parameters(model: nn.Module) -> int:
    """Returns the number of parameters of a model."""
    return sum(parameter.numel() for parameter in model.parameters())
