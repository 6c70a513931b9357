"""What a step does to the weights: gradients of micro-batches, learning rate, Muon and AdamW, averaged weights."""
import copy
import math

import torch


def set_learning_rate(optimizer, step, base, warmup, total, decay):
    """Linear warm-up over `warmup` steps, then constant, or a cosine down to 1% of `base` at step `total`.

    A group of parameters that has a "base" of its own follows that."""
    for group in optimizer.param_groups:
        rate = group.get("base", base)
        if step < warmup:
            rate = rate * (step + 1) / warmup
        elif decay:
            rate *= 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))
        group["lr"] = rate


class Muon(torch.optim.Optimizer):
    """Momentum of which every singular value is made about 1, so that a matrix moves as far in all directions, where
    Adam follows a few strong ones (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon).

    groups: of matrices; "parts" is how many each consists of, one below the other. dtype: of the iterations.
    torch.optim.Muon does the same, but for matrices whole: with queries, keys and values as one it learns slower."""

    def __init__(self, groups, lr, weight_decay, dtype):
        super().__init__(groups, {"lr": lr, "base": lr, "weight_decay": weight_decay, "parts": 1})
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for matrix in group["params"]:
                state = self.state[matrix]
                if not state:
                    state["momentum"] = torch.zeros_like(matrix)
                momentum = state["momentum"].lerp_(matrix.grad, 0.05)
                towards = matrix.grad.lerp(momentum, 0.95).chunk(group["parts"])                 # Nesterov's
                rows, columns = towards[0].shape
                moved = torch.cat([orthogonal(part.to(self.dtype)) for part in towards]).to(matrix.dtype)
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.sub_(moved, alpha=group["lr"] * max(1, rows / columns) ** 0.5)


def orthogonal(matrix):
    """About the nearest matrix with orthonormal rows or columns: five Newton-Schulz iterations, of the coefficients
    that raise small singular values fastest and leave all between 0.7 and 1.2 (Jordan et al. 2024)."""
    if matrix.is_meta:                           # lib.costs counts the passes alone
        return matrix
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if tall else x


def transformer_optimizers(model, args, machine):
    """AdamW for all parameters, or (--optimizer muon) for all but the blocks' matrices. Returns {name: optimizer}."""
    blocks = {p: name for name, p in model.blocks.named_parameters() if p.ndim > 1 and args.optimizer == "muon"}
    others = [p for p in model.parameters() if p not in blocks]
    # Weight decay for matrices; biases, LayerNorms and the output's bias are left alone.
    groups = [{"params": [p for p in others if p.ndim > 1], "weight_decay": args.weight_decay},
              {"params": [p for p in others if p.ndim <= 1], "weight_decay": 0.0}]
    optimizers = {"adamw": torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.96), fused=machine.fused)}
    if blocks:
        groups = [{"params": [p for p, name in blocks.items() if name.endswith("qkv.weight")], "parts": 3},
                  {"params": [p for p, name in blocks.items() if not name.endswith("qkv.weight")]}]
        precision = torch.bfloat16 if machine.bf16 else torch.float32
        optimizers["muon"] = Muon(groups, args.muon_lr, args.weight_decay, precision)
    return optimizers


def averaged(model):
    """A copy of a model for evaluation, in which average() keeps an exponential moving average of its weights."""
    return copy.deepcopy(model).eval().requires_grad_(False)


@torch.no_grad()
def average(ema, model, decay, step):
    """Moves the weights of `ema` a share 1 - decay towards the model's, and further in the first steps."""
    decay = min(decay, (1 + step) / (10 + step))  # the first, poor weights are forgotten faster
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def accumulate(machine, wrapped, loss_of, batch, parts):
    """The gradients of a batch, taken in `parts` micro-batches; ranks exchange them with the last one.

    batch: tensors of equal length. loss_of(*part of each) -> (the loss to minimise, metrics by name), scalars. Returns
    the means of the metrics, on the device."""
    wrapped.zero_grad(set_to_none=True)
    means = {}
    for i, part in enumerate(zip(*(tensor.chunk(parts) for tensor in batch), strict=True)):
        with machine.accumulating(wrapped, more=i + 1 < parts):
            with machine.autocast():
                loss, metrics = loss_of(*part)
            (loss / parts).backward()
        for name, value in metrics.items():
            means[name] = means.get(name, 0) + value.detach() / parts
    return means


def match_layouts(optimizer):
    """Gives the moments, which come from a file, the memory layout of their parameters: another device may have had
    another, and CPU's fused Adam would take the numbers in the wrong order."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if torch.is_tensor(value) and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter).copy_(value)
