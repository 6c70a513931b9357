"""The tokenizer's adversary in stage 1 (§3, after Esser et al. 2021).

StyleGAN2's residual discriminator, as in the released code; the adversarial losses; R1."""
import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqgan import conv3x3, init_weights


def blur_downsample(x: Tensor) -> Tensor:
    """Blurs by [1 3 3 1] in both directions and halves: (B, C, H, W) -> (B, C, H / 2, W / 2).

    It is written with pairs of rows and columns: a depthwise convolution has a slow backward pass,
    of which R1 takes two, and nested average poolings do not compile (LOG.md)."""
    # Channels come last, as in memory: otherwise the gradient would have another layout than x,
    # and all that follows in the backward pass would be slow.
    x = x.permute(0, 2, 3, 1)
    upper, lower = x.unflatten(1, (-1, 2)).unbind(2)            # rows 2i and 2i + 1
    outer = F.pad(lower, (0, 0, 0, 0, 1, -1)) + F.pad(upper, (0, 0, 0, 0, -1, 1))   # 2i - 1, 2i + 2
    x = torch.add(outer, upper + lower, alpha=3)                                # (B, H / 2, W, C)
    left, right = x.unflatten(2, (-1, 2)).unbind(3)
    outer = F.pad(right, (0, 0, 1, -1)) + F.pad(left, (0, 0, -1, 1))
    x = torch.add(outer, left + right, alpha=3) / 64                        # (B, H / 2, W / 2, C)
    return x.permute(0, 3, 1, 2)


class DiscriminatorBlock(nn.Module):
    """StyleGAN2's residual block: (B, inputs, S, S) -> (B, outputs, S / 2, S / 2), rounded up."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv1 = conv3x3(inputs, inputs)
        self.conv2 = conv3x3(inputs, outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] % 2:                                 # only at sizes that are no power of two
            x = F.pad(x, (0, 1, 0, 1))
        h = F.leaky_relu(self.conv1(x), 0.2)
        h = F.leaky_relu(self.conv2(blur_downsample(h)), 0.2)
        return (h + self.shortcut(blur_downsample(x))) / math.sqrt(2)           # keeps the variance


class Discriminator(nn.Module):
    """Judges images: (B, 3, S, S) in [0, 1] -> logits (B,), positive for real ones.

    image_size: S, at least 8; ValueError otherwise. It is halved until 4 x 4 places remain, or
    3 x 3 for some sizes that are no power of two. width: channels at 256 pixels (released: 64);
    they double at each halving, up to max_width. centred: map images to [-1, 1] first; the released
    code does not, but this way the discriminator learns far faster."""

    def __init__(
        self, image_size: int = 256, width: int = 64, max_width: int = 512, centred: bool = False,
    ):
        super().__init__()
        if image_size < 8:
            raise ValueError(f"the discriminator needs images of at least 8 pixels, not "
                             f"{image_size}")

        def channels(size: int) -> int:
            return max(1, min(max_width, width * 256 // size))

        self.centred = centred
        size = image_size
        widths = [channels(size)]
        while size > 4:
            size = math.ceil(size / 2)
            widths.append(channels(size))
        self.conv_in = conv3x3(3, widths[0])
        self.blocks = nn.Sequential(*[DiscriminatorBlock(a, b) for a, b in pairwise(widths)])
        self.conv_out = conv3x3(widths[-1], widths[-1])
        self.dense1 = nn.Linear(widths[-1] * size * size, widths[-1])
        self.dense2 = nn.Linear(widths[-1], 1)
        self.apply(init_weights)

    def forward(self, images: Tensor) -> Tensor:
        if self.centred:
            images = images * 2 - 1
        x = F.leaky_relu(self.conv_in(images), 0.2)
        x = self.blocks(x)
        x = F.leaky_relu(self.conv_out(x), 0.2)                         # (B, C, 4, 4), or 3 x 3
        x = x.permute(0, 2, 3, 1).flatten(1)  # channels last, the order of the released dense layer
        return self.dense2(F.leaky_relu(self.dense1(x), 0.2)).squeeze(-1)


ADVERSARIAL_LOSSES = ["non-saturating", "hinge"]


def check_loss(kind: str) -> None:
    """Raises ValueError if there is no adversarial loss of this name."""
    if kind not in ADVERSARIAL_LOSSES:
        names = " or ".join(ADVERSARIAL_LOSSES)
        raise ValueError(f"{kind} is no adversarial loss: it must be {names}")


def generator_loss(fake_logits: Tensor, kind: str = "non-saturating") -> Tensor:
    """Returns what the tokenizer minimises so that its reconstructions pass for real.

    kind: see discriminator_loss()."""
    check_loss(kind)
    if kind == "hinge":
        return -fake_logits.mean()
    return F.softplus(-fake_logits).mean()


def discriminator_loss(
    real_logits: Tensor, fake_logits: Tensor, kind: str = "non-saturating",
) -> Tensor:
    """Returns what the discriminator minimises.

    kind: non-saturating (Goodfellow et al. 2014) or hinge; ValueError otherwise."""
    check_loss(kind)
    if kind == "hinge":
        return F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def r1_penalty(discriminator: nn.Module, images: Tensor) -> Tensor:
    """Returns the mean squared gradient norm of the logits at real images (Mescheder et al. 2018).

    It is not weighted yet."""
    images = images.detach().requires_grad_(True)
    gradient, = torch.autograd.grad(discriminator(images).sum(), images, create_graph=True)
    return gradient.square().sum((1, 2, 3)).mean()
