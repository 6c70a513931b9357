"""Stage 1 of MaskGIT (§3): a VQGAN that turns an image into a grid of codebook indices and back.

    image --Encoder--> features --Quantizer--> indices --Quantizer--> features --Decoder--> image

The architecture is that of the released model:
- GroupNorm (32 groups), swish, bias-free 3x3 convolutions in residual blocks, no attention;
- 2x2 average pooling down, nearest x2 and a 3x3 convolution up;
- the 1x1 shortcut acts on the *output* of a block's second convolution (see ResBlock).
Images are (B, 3, H, W) floats in [0, 1]; tokens are (B, h, w) int64 in [0, codebook_size).
This file needs nothing but torch: it can be copied out.
"""
import math
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class VQGANConfig:
    """Sizes and losses of the tokenizer. The defaults are those of the released ImageNet model."""
    codebook_size: int = 1024
    codebook_dim: int = 256
    filters: int = 128                          # width at full resolution, a multiple of `groups`
    multipliers: tuple = (1, 1, 2, 2, 4)        # widths in units of `filters`, finest first
    res_blocks: int = 2                         # at each resolution
    groups: int = 32                            # of each GroupNorm; with fewer than 4 channels in
                                                # a group, colours wash out
    commitment: float = 0.25                    # beta of VQ-VAE (van den Oord et al. 2017, Eq. 3)
    entropy: float = 0.1                        # weight of the codebook entropy loss
    entropy_temperature: float = 0.01
    quantizer: str = "vq"                       # one of QUANTIZERS
    levels: tuple = ()                          # of "fsq": their product is codebook_size

    @property
    def stride(self) -> int:
        """Returns the pixels per token along each side (16 for the released model)."""
        return 2 ** (len(self.multipliers) - 1)


# ------------------------------------------------------------------------------ encoder and decoder

def conv3x3(inputs: int, outputs: int, bias: bool = True) -> nn.Conv2d:
    """Returns a 3x3 convolution that keeps the resolution."""
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias)


class ResBlock(nn.Module):
    """Twice GroupNorm, swish and a 3x3 convolution, plus a shortcut.

    (B, inputs, H, W) -> (B, outputs, H, W)."""

    def __init__(self, inputs: int, outputs: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inputs, eps=1e-6)
        self.conv1 = conv3x3(inputs, outputs, bias=False)
        self.norm2 = nn.GroupNorm(groups, outputs, eps=1e-6)
        self.conv2 = conv3x3(outputs, outputs, bias=False)
        self.shortcut = None
        if inputs != outputs:
            self.shortcut = nn.Conv2d(outputs, outputs, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        if self.shortcut is None:
            return h + x
        # One would expect shortcut(x). The released weights were trained with shortcut(h).
        return h + self.shortcut(h)


def res_blocks(config: VQGANConfig, inputs: int, outputs: int) -> list[nn.Module]:
    """Returns the residual blocks of one resolution; the first changes the width."""
    others = [ResBlock(outputs, outputs, config.groups) for _ in range(config.res_blocks - 1)]
    return [ResBlock(inputs, outputs, config.groups), *others]


def output_layers(config: VQGANConfig, width: int, last: nn.Module) -> list[nn.Module]:
    """Returns the end of both encoder and decoder: GroupNorm, swish, and the last convolution."""
    return [nn.GroupNorm(config.groups, width, eps=1e-6), nn.SiLU(), last]


class Encoder(nn.Module):
    """(B, 3, H, W) -> (B, codebook_dim, H / stride, W / stride)."""

    def __init__(self, config: VQGANConfig):
        super().__init__()
        widths = [config.filters * multiplier for multiplier in config.multipliers]
        layers = [conv3x3(3, config.filters, bias=False)]
        layers += res_blocks(config, config.filters, widths[0])
        for width, next_width in pairwise(widths):
            layers += [nn.AvgPool2d(2)]
            layers += res_blocks(config, width, next_width)
        layers += res_blocks(config, widths[-1], widths[-1])        # the middle of the model
        layers += output_layers(config, widths[-1], nn.Conv2d(widths[-1], config.codebook_dim, 1))
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


class Decoder(nn.Module):
    """(B, codebook_dim, h, w) -> (B, 3, h * stride, w * stride), about [0, 1] but not clamped."""

    def __init__(self, config: VQGANConfig):
        super().__init__()
        widths = [config.filters * multiplier for multiplier in reversed(config.multipliers)]
        layers = [conv3x3(config.codebook_dim, widths[0])]
        # The coarsest resolution has two sets of blocks, as in the released model: the middle's and
        # its own.
        layers += res_blocks(config, widths[0], widths[0])
        layers += res_blocks(config, widths[0], widths[0])
        for width, next_width in pairwise(widths):
            layers += [nn.Upsample(scale_factor=2), conv3x3(width, width)]       # nearest neighbour
            layers += res_blocks(config, width, next_width)
        layers += output_layers(config, widths[-1], conv3x3(widths[-1], 3))
        self.layers = nn.Sequential(*layers)

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features)


# --------------------------------------------------------------------------------------- quantizers

class Quantizer(nn.Module):
    """The interface of a quantizer: all that VQGAN and train_vq.py know of it."""

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Quantizes features (B, D, h, w) in training.

        Returns quantized features of the same shape, through which gradients pass; indices
        (B, h, w); and losses by name, already weighted."""
        raise NotImplementedError

    def encode(self, features: Tensor) -> Tensor:
        """Returns the indices of features: (B, D, h, w) -> (B, h, w) int64."""
        raise NotImplementedError

    def decode(self, indices: Tensor) -> Tensor:
        """Returns the quantized features of indices: (B, h, w) -> (B, D, h, w)."""
        raise NotImplementedError

    def start_from(self, features: Tensor, generator: torch.Generator) -> None:
        """Adapts to features (B, D, h, w) of the first batch, before training. Optional."""


class VectorQuantizer(Quantizer):
    """Replaces each feature by the nearest codebook entry (van den Oord et al. 2017)."""

    def __init__(self, config: VQGANConfig):
        super().__init__()
        self.config = config
        # Flax's variance_scaling(1, fan_in, uniform), as released: codes start close together and
        # near zero, and the entropy loss spreads them out.
        bound = math.sqrt(3 / config.codebook_size)
        codebook = torch.empty(config.codebook_size, config.codebook_dim)
        self.codebook = nn.Parameter(nn.init.uniform_(codebook, -bound, bound))

    def distances(self, features: Tensor) -> Tensor:
        """Returns |z|^2 - 2 z.e + |e|^2 for every entry: (B, D, h, w) -> (B, h, w, K)."""
        # These are differences of large numbers: they need float32.
        with torch.autocast(features.device.type, enabled=False):
            z = features.permute(0, 2, 3, 1).float()
            e = self.codebook.float()
            return z.square().sum(-1, keepdim=True) - 2 * z @ e.T + e.square().sum(-1)

    def encode(self, features: Tensor) -> Tensor:
        return self.distances(features).argmin(-1)

    def decode(self, indices: Tensor) -> Tensor:
        return F.embedding(indices, self.codebook).permute(0, 3, 1, 2)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        distances = self.distances(features)
        indices = distances.argmin(-1)
        quantized = self.decode(indices)
        entropy = entropy_loss(-distances, self.config.entropy_temperature)
        losses = {
            # The first pulls features to their codes, the second codes to their features.
            "commitment": self.config.commitment * F.mse_loss(features, quantized.detach()),
            "codebook": F.mse_loss(quantized, features.detach()),
            "entropy": self.config.entropy * entropy,
        }
        # Straight-through: forward is the code, backward is the identity.
        return features + (quantized - features).detach(), indices, losses

    @torch.no_grad()
    def start_from(self, features: Tensor, generator: torch.Generator) -> None:
        """Copies random features into the codebook, so that every entry starts near a feature."""
        features = features.permute(0, 2, 3, 1).flatten(0, 2)                       # (n, D)
        size = self.config.codebook_size
        # If there are fewer features than entries, some are taken twice. Noise of 5% of the spread
        # is enough to part them, and too little to leave the features.
        shuffled = torch.randperm(len(features), generator=generator)
        chosen = shuffled[torch.arange(size) % len(features)].to(features.device)
        noise = torch.randn(size, features.shape[1], generator=generator).to(features.device)
        self.codebook.copy_(features[chosen] + 0.05 * features.std(0) * noise)


def entropy_loss(affinity: Tensor, temperature: float) -> Tensor:
    """Returns a scalar that is least if each choice of a code is sure and all codes are in use.

    affinity: (..., codebook_size), larger is nearer; temperature > 0. Source: released code
    (`entropy_loss`, type softmax), including the 1e-5 inside the logarithm."""
    scaled = affinity.flatten(0, -2) / temperature
    log_probs = scaled.log_softmax(-1)
    probs = scaled.softmax(-1)  # not log_probs.exp(): its subnormal results are slow on a CPU
    usage = joint_usage(probs.mean(0))
    usage_entropy = -(usage * (usage + 1e-5).log()).sum()
    sample_entropy = -(probs * log_probs).sum(-1).mean()
    return sample_entropy - usage_entropy


def joint_usage(usage: Tensor) -> Tensor:
    """Returns the usage of codes in the batch of all processes; gradients reach only our own part.

    The entropy of a mean is not the mean of entropies, so it is not enough that
    DistributedDataParallel averages gradients: each process must see what the others use."""
    if not dist.is_initialized():
        return usage
    total = usage.detach().clone()
    dist.all_reduce(total)
    return usage + (total / dist.get_world_size() - usage.detach())


class FiniteScalarQuantizer(Quantizer):
    """Rounds each of a few numbers to one of its levels: no codebook and no extra losses.

    FSQ; Mentzer et al. 2023. config.levels: how many values each of the codebook_dim numbers can
    take, at least 3 (bound() has no inverse for 2); their product must be codebook_size. Raises
    ValueError otherwise."""

    def __init__(self, config: VQGANConfig):
        super().__init__()
        levels = config.levels
        if len(levels) != config.codebook_dim or math.prod(levels) != config.codebook_size:
            raise ValueError(f"levels {levels} do not give {config.codebook_size} codes "
                             f"of {config.codebook_dim} numbers")
        if min(levels) < 3:
            raise ValueError(f"levels {levels} must be at least 3 each")
        # An index is a number whose digits are the levels: their place values are 1, L1, L1 L2, ...
        place_values = [math.prod(levels[:place]) for place in range(len(levels))]
        self.register_buffer("levels", torch.tensor(levels).view(-1, 1, 1))             # (D, 1, 1)
        self.register_buffer("place_values", torch.tensor(place_values).view(-1, 1, 1))

    def bound(self, features: Tensor) -> Tensor:
        """Squeezes each number so that rounding gives L integers, from -(L // 2) upwards."""
        half_range = (self.levels - 1) * (1 - 1e-3) / 2
        offset = 0.5 * (self.levels % 2 == 0)           # an even number of levels has no middle one
        return torch.tanh(features.float() + (offset / half_range).atanh()) * half_range - offset

    def encode(self, features: Tensor) -> Tensor:
        digits = self.bound(features).round().long() + self.levels // 2   # (B, D, h, w), 0 .. L - 1
        return (digits * self.place_values).sum(1)

    def decode(self, indices: Tensor) -> Tensor:
        digits = indices[:, None] // self.place_values % self.levels                # (B, D, h, w)
        return (digits - self.levels // 2) / (self.levels // 2)                     # within [-1, 1]

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        indices = self.encode(features)
        bounded = self.bound(features) / (self.levels // 2)
        # Straight-through: forward is the code, backward is that of the bounded features.
        return bounded + (self.decode(indices) - bounded).detach(), indices, {}


# By name, for the command line and for VQGANConfig.quantizer.
QUANTIZERS = {"vq": VectorQuantizer, "fsq": FiniteScalarQuantizer}


# ---------------------------------------------------------------------------------------- tokenizer

class VQGAN(nn.Module):
    """The tokenizer. Stage 2 uses `encode` and `decode`; `forward` is for training."""
    Config = VQGANConfig

    def __init__(self, config: VQGANConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quantizer = QUANTIZERS[config.quantizer](config)
        self.decoder = Decoder(config)
        self.apply(init_weights)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Reconstructs images (B, 3, H, W) in [0, 1].

        Returns reconstructions (B, 3, H, W), about [0, 1] but not clamped; indices (B, h, w); and
        the quantizer's losses by name."""
        quantized, indices, losses = self.quantizer(self.encoder(images))
        return self.decoder(quantized), indices, losses

    def encode(self, images: Tensor) -> Tensor:
        """Returns the indices of images (B, 3, H, W) in [0, 1]: (B, H / stride, W / stride) int64.

        Raises ValueError if H or W is not divisible by the stride."""
        height, width = images.shape[-2:]
        if height % self.config.stride or width % self.config.stride:
            raise ValueError(f"image size {width}x{height} is not divisible by the stride "
                             f"{self.config.stride} of the tokenizer: resize or crop it")
        return self.quantizer.encode(self.encoder(images))

    def decode(self, indices: Tensor) -> Tensor:
        """Returns the images of indices (B, h, w): (B, 3, h * stride, w * stride) in [0, 1]."""
        return self.decoder(self.quantizer.decode(indices)).clamp(0, 1)


def as_grid(tokens: Tensor) -> Tensor:
    """Returns the tokens (B, N) of square images as (B, h, w), which VQGAN.decode() takes."""
    side = math.isqrt(tokens.shape[1])
    return tokens.view(len(tokens), side, side)


def to_pixels(mask: Tensor, stride: int) -> Tensor:
    """Returns a mask of tokens (..., h, w) as one of pixels (..., h * stride, w * stride)."""
    return mask.repeat_interleave(stride, -2).repeat_interleave(stride, -1)


def init_weights(module: nn.Module) -> None:
    """Initialises as Flax does: normal, variance 1 / fan_in, cut at 2 std; biases zero."""
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        std = 1 / math.sqrt(module.weight[0].numel()) / 0.8796    # the cut leaves 0.8796 of the std
        nn.init.trunc_normal_(module.weight, 0, std, -2 * std, 2 * std)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
