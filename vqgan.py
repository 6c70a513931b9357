"""Stage 1 of MaskGIT (§3.1): a VQGAN that turns an image into a grid of codebook indices and back.

    image --Encoder--> features --VectorQuantizer--> indices --codebook--> features --Decoder--> image

The architecture is that of the released model, number for number:
- GroupNorm(32 groups, eps 1e-6), swish, bias-free 3x3 convolutions in the residual blocks, no attention;
- 2x2 average pooling down, nearest x2 + 3x3 convolution up, so the stride is 2 ** (len(multipliers) - 1);
- the 1x1 shortcut acts on the *output* of a block's second convolution (see ResBlock);
- the discriminator is StyleGAN's residual one, with [1 3 3 1] blur resampling.
Images are (B, 3, H, W) floats in [0, 1]; tokens are (B, h, w) int64 in [0, codebook_size).
"""
import math
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lib.runtime import Upsample, from_first_rank, full_precision, mean_over_ranks


@dataclass
class VQGANConfig:
    """The defaults are the released ImageNet tokenizer; small ones differ only in sizes."""
    codebook_size: int = 1024
    codebook_dim: int = 256
    filters: int = 128                          # a multiple of `groups`
    multipliers: tuple = (1, 1, 2, 2, 4)        # widths in units of `filters`, finest resolution first
    res_blocks: int = 2
    groups: int = 32                            # of GroupNorm; fewer than 4 channels in each would lose the colours
    commitment: float = 0.25                    # beta of VQ-VAE (van den Oord et al. 2017, Eq. 3)
    entropy: float = 0.1                        # weight of the codebook entropy loss
    entropy_temperature: float = 0.01

    @property
    def stride(self):
        """Pixels per token along each side (16 for the released model)."""
        return 2 ** (len(self.multipliers) - 1)


class Tower(nn.Module):
    """Layers in sequence. recompute: in training, keep no activations inside a layer and compute them again in the
    backward pass: less memory, a third more time."""
    recompute = False

    def forward(self, x):
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.recompute and self.training else layer(x)
        return x


def conv3x3(inputs, outputs, bias=True):
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias)


class ResBlock(nn.Module):
    """GroupNorm, swish, 3x3 convolution, twice, plus a shortcut. (B, inputs, H, W) -> (B, outputs, H, W)."""

    def __init__(self, inputs, outputs, groups):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, inputs, eps=1e-6), conv3x3(inputs, outputs, bias=False)
        self.norm2, self.conv2 = nn.GroupNorm(groups, outputs, eps=1e-6), conv3x3(outputs, outputs, bias=False)
        self.shortcut = nn.Conv2d(outputs, outputs, 1, bias=False) if inputs != outputs else None

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        # One would expect shortcut(x). The released weights were trained with shortcut(h), so this is what they mean.
        return h + (x if self.shortcut is None else self.shortcut(h))


def res_blocks(config, inputs, outputs):
    """The residual blocks of a resolution, of which the first changes the width."""
    return [ResBlock(outputs if i else inputs, outputs, config.groups) for i in range(config.res_blocks)]


class Encoder(Tower):
    """(B, 3, H, W) -> (B, codebook_dim, H / stride, W / stride)."""

    def __init__(self, config):
        super().__init__()
        widths = [config.filters * m for m in config.multipliers]
        layers = [conv3x3(3, config.filters, bias=False), *res_blocks(config, config.filters, widths[0])]
        for width, outputs in pairwise(widths):
            layers += [nn.AvgPool2d(2), *res_blocks(config, width, outputs)]
        width = widths[-1]
        layers += res_blocks(config, width, width)
        layers += [nn.GroupNorm(config.groups, width, eps=1e-6), nn.SiLU(), nn.Conv2d(width, config.codebook_dim, 1)]
        self.layers = nn.Sequential(*layers)


class Decoder(Tower):
    """(B, codebook_dim, h, w) -> (B, 3, h * stride, w * stride)."""

    def __init__(self, config):
        super().__init__()
        widths = [config.filters * m for m in reversed(config.multipliers)]
        layers, width = [conv3x3(config.codebook_dim, widths[0])], widths[0]
        layers += res_blocks(config, width, width) + res_blocks(config, width, width)
        for width, outputs in pairwise(widths):
            layers += [Upsample(), conv3x3(width, width), *res_blocks(config, width, outputs)]
        width = widths[-1]
        layers += [nn.GroupNorm(config.groups, width, eps=1e-6), nn.SiLU(), conv3x3(width, 3)]
        self.layers = nn.Sequential(*layers)


def entropy_loss(affinity, temperature):
    """Low entropy for each feature, high entropy for their average: sure choices, and every code in use.

    affinity: (..., codebook_size), larger is nearer; temperature > 0. Returns a scalar. Source: released code
    (`entropy_loss`, type softmax), whose 1e-5 inside the logarithm is kept so that the numbers agree."""
    log_probs = (affinity.flatten(0, -2) / temperature).log_softmax(-1)
    probs = log_probs.exp()
    average = probs.mean(0)
    # Where several processes train together: the usage of codes in the joint batch, with the gradient of the own part.
    average = average + (mean_over_ranks(average) - average.detach())
    average_entropy = -(average * (average + 1e-5).log()).sum()
    sample_entropy = -(probs * log_probs).sum(-1).mean()
    return sample_entropy - average_entropy


class VectorQuantizer(nn.Module):
    """Replaces each feature by its nearest codebook entry (van den Oord et al. 2017); distances are squared L2."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.codebook = nn.Parameter(torch.empty(config.codebook_size, config.codebook_dim))

    def distances(self, features):
        """(B, D, h, w) -> (B, h, w, codebook_size): |z|^2 - 2 z.e + |e|^2."""
        with full_precision(features):                                  # differences of large numbers need float32
            z, e = features.permute(0, 2, 3, 1).float(), self.codebook.float()
            return z.square().sum(-1, keepdim=True) - 2 * z @ e.T + e.square().sum(-1)

    def lookup(self, indices):
        """(B, h, w) -> (B, D, h, w)."""
        return F.embedding(indices, self.codebook).permute(0, 3, 1, 2)

    def forward(self, features):
        """(B, D, h, w) -> quantized features of that shape, indices (B, h, w), losses by name (weights applied)."""
        distances = self.distances(features)
        indices = distances.argmin(-1)
        quantized = self.lookup(indices)
        losses = {
            "commitment": self.config.commitment * F.mse_loss(features, quantized.detach()),  # pulls features to codes
            "codebook": F.mse_loss(quantized, features.detach()),                             # pulls codes to features
            "entropy": self.config.entropy * entropy_loss(-distances, self.config.entropy_temperature),
        }
        # Straight-through: forward is the code, backward is the identity.
        return features + (quantized - features).detach(), indices, losses


class VQGAN(nn.Module):
    """The tokenizer. `encode` and `decode` are what stage 2 uses; `forward` is for training."""
    Config = VQGANConfig

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder, self.quantizer, self.decoder = Encoder(config), VectorQuantizer(config), Decoder(config)
        self.apply(init_weights)
        # Flax's variance_scaling(1, fan_in, uniform), as released: codes start close together and near zero, and the
        # entropy loss spreads them out.
        bound = math.sqrt(3 / config.codebook_size)
        nn.init.uniform_(self.quantizer.codebook, -bound, bound)

    def forward(self, images):
        """(B, 3, H, W) in [0, 1] -> reconstructions (B, 3, H, W), indices (B, h, w), quantizer losses by name."""
        quantized, indices, losses = self.quantizer(self.encoder(images))
        return self.decoder(quantized), indices, losses

    def encode(self, images):
        """(B, 3, H, W) in [0, 1] -> indices (B, H / stride, W / stride), int64.

        Raises ValueError where H or W is not divisible by the stride."""
        if images.shape[-2] % self.config.stride or images.shape[-1] % self.config.stride:
            raise ValueError(f"image size {images.shape[-1]}x{images.shape[-2]} is not divisible by the tokenizer's "
                             f"stride {self.config.stride}; resize or crop it")
        return self.quantizer.distances(self.encoder(images)).argmin(-1)

    @torch.no_grad()
    def start_codebook(self, images, generator):
        """Starts the codebook from features of these images: from the start, every entry is near some feature."""
        features = self.encoder(images).permute(0, 2, 3, 1).flatten(0, 2)
        size = self.config.codebook_size
        # From the first again, where there are fewer features than entries; the noise lets no two entries be alike.
        chosen = torch.randperm(len(features), generator=generator)[torch.arange(size) % len(features)]
        noise = torch.randn(size, features.shape[1], generator=generator).to(features.device)
        start = features[chosen.to(features.device)] + 0.05 * features.std(0) * noise
        self.quantizer.codebook.copy_(from_first_rank(start))

    def decode(self, indices):
        """Indices (B, h, w) -> images (B, 3, h * stride, w * stride), clipped to [0, 1]."""
        return self.decoder(self.quantizer.lookup(indices)).clamp(0, 1)


def as_grid(tokens):
    """The tokens (B, N) of square images, as `decode` takes them: (B, h, w)."""
    side = math.isqrt(tokens.shape[1])
    return tokens.view(-1, side, side)


def to_pixels(mask, stride):
    """A mask of tokens (..., h, w) -> of the pixels that they stand for, (..., h * stride, w * stride)."""
    return mask.repeat_interleave(stride, -2).repeat_interleave(stride, -1)


def init_weights(module):
    """Flax's default for convolutions and dense layers: normal, variance 1 / fan_in, cut at 2 std; biases zero."""
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        std = 1 / math.sqrt(module.weight[0].numel()) / 0.8796  # 0.8796 is what the cut leaves of the std
        nn.init.trunc_normal_(module.weight, 0, std, -2 * std, 2 * std)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def blur_downsample(x):
    """[1 3 3 1] blur in both directions, then every second pixel: (B, C, H, W) -> (B, C, H / 2, W / 2)."""
    # As three averages of pairs: a convolution of each channel by itself has a slow backward pass, and R1 takes two.
    return F.avg_pool2d(F.avg_pool2d(F.avg_pool2d(x, 2, 1, padding=1), 2, 1), 2)


class DiscriminatorBlock(nn.Module):
    """Residual block of StyleGAN2's discriminator; halves the resolution."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv1, self.conv2 = conv3x3(inputs, inputs), conv3x3(inputs, outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, bias=False)

    def forward(self, x):
        h = F.leaky_relu(self.conv1(x), 0.2)
        h = F.leaky_relu(self.conv2(blur_downsample(h)), 0.2)
        return (h + self.shortcut(blur_downsample(x))) / math.sqrt(2)  # keeps the variance


class Discriminator(nn.Module):
    """StyleGAN2's residual discriminator as released: (B, 3, S, S) in [0, 1] -> real/fake logits (B,).

    image_size: S, a power of two, at least 8. width: channels at 256 pixels (64 as released); they double at each
    halving up to max_width. Raises ValueError for another S."""

    def __init__(self, image_size=256, width=64, max_width=512):
        super().__init__()
        if image_size < 8 or image_size & (image_size - 1):
            raise ValueError(f"the discriminator needs an image size that is a power of two, at least 8, "
                             f"not {image_size}")
        sizes = [image_size >> i for i in range(int(math.log2(image_size)) - 1)]            # S, S/2, ..., 4
        widths = [max(1, min(max_width, width * 256 // size)) for size in sizes]
        self.conv_in = conv3x3(3, widths[0])
        self.blocks = nn.Sequential(*[DiscriminatorBlock(a, b) for a, b in pairwise(widths)])
        self.conv_out = conv3x3(widths[-1], widths[-1])
        self.dense1, self.dense2 = nn.Linear(widths[-1] * 16, widths[-1]), nn.Linear(widths[-1], 1)
        self.apply(init_weights)

    def forward(self, images):
        x = F.leaky_relu(self.conv_in(images), 0.2)
        x = F.leaky_relu(self.conv_out(self.blocks(x)), 0.2)                                 # (B, C, 4, 4)
        x = x.permute(0, 2, 3, 1).flatten(1)                 # channels last, the order of the released dense layer
        return self.dense2(F.leaky_relu(self.dense1(x), 0.2)).squeeze(-1)


def generator_loss(fake_logits, kind="non-saturating"):
    """What the tokenizer minimises so that its reconstructions pass for real. kind: non-saturating or hinge."""
    return F.softplus(-fake_logits).mean() if kind == "non-saturating" else -fake_logits.mean()


def discriminator_loss(real_logits, fake_logits, kind="non-saturating"):
    """What the discriminator minimises. kind: non-saturating (Goodfellow et al. 2014) or hinge."""
    if kind == "non-saturating":
        return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()
    return F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()


def r1_penalty(discriminator, images):
    """Squared gradient norm of the logits at real images, mean over them (Mescheder et al. 2018), without a weight."""
    images = images.detach().requires_grad_(True)
    gradient, = torch.autograd.grad(discriminator(images).sum(), images, create_graph=True)
    return gradient.square().sum((1, 2, 3)).mean()
