"""What one device needs and others do not, done to a model from outside."""
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn


def replace_modules(
    model: nn.Module, kind: type, replacement: Callable[[nn.Module], nn.Module],
):
    """Replaces each module of this kind in a model by replacement(module)."""
    for parent in model.modules():
        for name, child in parent.named_children():
            if isinstance(child, kind):
                setattr(parent, name, replacement(child))


# ---- training on a CPU

def prepare_blocks(blocks: nn.ModuleList, bf16: bool, compiled: bool):
    """Prepares a transformer's blocks for training on a CPU.

    They are compiled one by one: one graph serves all of them, so training starts sooner than with
    a compiled model. If the compiler fails, torch says so and goes on without it."""
    if compiled:
        torch._dynamo.config.suppress_errors = True
    for block in blocks:
        if bf16:
            block.register_forward_pre_hook(to_bfloat16)
        if compiled:
            replace_gelu(block)
            block.compile(dynamic=False)


def to_bfloat16(block: nn.Module, inputs: tuple) -> tuple:
    """Casts a block's input to bfloat16 once, where autocast would do so for each product.

    So the sums and the LayerNorms of the block are in bfloat16 too, which on a GPU they are not."""
    return inputs[0].bfloat16(), *inputs[1:]


class SigmoidGELU(nn.Module):
    """Computes nn.GELU("tanh") by a sigmoid, since (1 + tanh u) / 2 = sigmoid(2 u).

    Compiled, it takes half the time: Inductor's tanh is slow on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x ** 3))


def replace_gelu(model: nn.Module):
    """Replaces each nn.GELU("tanh") in a model by SigmoidGELU."""
    def replacement(gelu: nn.GELU) -> nn.Module:
        return SigmoidGELU() if gelu.approximate == "tanh" else gelu
    replace_modules(model, nn.GELU, replacement)


# ---- torch-xla

class RepeatPixels(nn.Module):
    """Repeats every pixel along both sides: (B, C, H, W) -> (B, C, factor H, factor W)."""

    def __init__(self, factor: int):
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(self.factor, 2).repeat_interleave(self.factor, 3)


def replace_upsampling(model: nn.Module):
    """Replaces each nearest-neighbour nn.Upsample in a model by RepeatPixels.

    torch-xla's interpolate has no backward pass: the gradients would go through the host."""
    def replacement(upsample: nn.Upsample) -> nn.Module:
        return RepeatPixels(int(upsample.scale_factor))
    replace_modules(model, nn.Upsample, replacement)
