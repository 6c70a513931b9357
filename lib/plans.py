"""What the training of either stage will take: for --dry-run, and for the TFLOP/s of the log."""
import argparse
import functools
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from discriminator import Discriminator, r1_penalty
from lib import costs, optim
from lib.data import DATA_SETS, check_folder, open_data
from lib.files import rebuild
from lib.flags import check_image_size
from lib.folders import SMALL, open_folder
from lib.lpips import LPIPS
from lib.runtime import MOST_CORES, Machine
from lib.tokens import CachedTokens
from maskgit import MaskGIT
from vqgan import VQGAN, VQGANConfig

# FLOP/s of an H100 or H200 (SXM): its peak in bfloat16, by its data sheet; and what the stages are
# expected to sustain at the paper's size, which was not measured.
PEAK = 989e12
STAGE_1 = 0.23 * PEAK
STAGE_2 = 0.33 * PEAK
JPEGS_PER_SECOND = 175                  # that one core decodes and crops, at ImageNet's sizes


class Planned(NamedTuple):
    """What stage 2 would find: the tokenizer of the preset, and the data by its name."""
    image_size: int
    tokenizer: VQGANConfig
    num_classes: int
    num_images: int


SHAPES = VQGANConfig(256, 8, filters=48, multipliers=(1, 1, 1), res_blocks=1, groups=1)
CIFAR10 = VQGANConfig(1024, 8, filters=64, multipliers=(1, 2), res_blocks=2, groups=1)
PLANNED = {
    "shapes": Planned(32, SHAPES, 10, 50_000),
    "folder": Planned(32, replace(SHAPES, codebook_size=1024), 0, 0),   # its images are counted
    "cifar10": Planned(32, CIFAR10, 10, 50_000),
    "imagenet": Planned(256, VQGANConfig(), 1000, 1_281_167),
    "places2": Planned(256, VQGANConfig(), 365, 1_803_460),
}


# ---- FLOPs of an image

def transformer_flops(model: MaskGIT) -> float:
    """Returns the FLOPs of a training step for one image: three times those of a forward pass."""
    with costs.imagined():
        tokens = torch.zeros(1, model.config.num_tokens, dtype=torch.long)
        labels = torch.zeros(1, dtype=torch.long)
        return 3 * costs.forward_flops(model, tokens, labels)


def encoding_flops(config: VQGANConfig, image_size: int) -> float:
    """Returns the FLOPs that turn one image into tokens."""
    model = VQGAN(config)
    with costs.imagined():
        return costs.forward_flops(model.encode, torch.zeros(1, 3, image_size, image_size))


def tokenizer_flops(
    model: VQGAN, disc: Discriminator | None, lpips: LPIPS | None, image_size: int,
) -> float:
    """Returns the FLOPs of a training step for one image, without R1.

    A backward pass costs two forward passes, or one where only the input needs a gradient."""
    with costs.imagined():
        images = torch.zeros(1, 3, image_size, image_size)
        # Not model(images), whose entropy loss would talk to the other ranks.
        tokens = model.encode(images)
        flops = 3 * costs.forward_flops(model.encode, images)
        flops += 3 * costs.forward_flops(model.decode, tokens)
        if disc is not None:
            # In the tokenizer's step: forward, gradient of the input. In its own: two images.
            flops += (2 + 2 * 3) * costs.forward_flops(disc, images)
        if lpips is not None:
            # It sees both images, and only the restored ones need a gradient.
            flops += 1.5 * costs.forward_flops(lpips, images, images)
    return flops


def mean_tokenizer_flops(
    args: argparse.Namespace, model: VQGAN, disc: Discriminator | None, lpips: LPIPS | None,
) -> float:
    """Returns the FLOPs for one image, on average over all steps: with R1, and the discriminator
    from its first step on."""
    alone = tokenizer_flops(model, None, lpips, args.image_size)
    if disc is None:
        return alone
    adversarial = tokenizer_flops(model, disc, lpips, args.image_size) - alone
    if args.r1 > 0:
        # R1 is the gradient of a gradient: six forward passes. `adversarial` is eight of them.
        adversarial += 6 / 8 * adversarial / args.r1_every
    return alone + adversarial * (1 - int(args.gan_start * args.steps) / args.steps)


# ---- what stage 2 would find

def planned_tokenizer(args: argparse.Namespace) -> tuple[VQGANConfig, int]:
    """Returns the configuration of the run's tokenizer, or else of the preset's, and the image
    size. Raises UserError if the image size does not fit the tokenizer's stride."""
    planned = PLANNED.get(args.preset, PLANNED["folder"])
    config = planned.tokenizer
    image_size = planned.image_size
    tokenizer_file = Path(args.vqgan or args.run / "vqgan.pt")
    if args.vqgan or tokenizer_file.exists():
        tokenizer, checkpoint = rebuild(tokenizer_file, "vqgan", VQGAN)
        config = tokenizer.config
        image_size = checkpoint["image_size"]
    image_size = args.image_size or image_size
    check_image_size(image_size, config.stride)
    return config, image_size


@functools.cache
def planned_data(name: str, data_dir: str) -> tuple[int, int]:
    """Returns the number of classes and of training images.

    Those of a folder, or of a data set that is not planned, are counted: raises UserError if they
    cannot be read."""
    if name in PLANNED and name != "folder":
        return PLANNED[name].num_classes, PLANNED[name].num_images
    if name in DATA_SETS:
        train, _ = open_data(name, None, data_dir)
    else:
        check_folder(name)
        train, _ = open_folder(name, 32, check=False)
    return len(train.classes), len(train)


def planned_tokens(args: argparse.Namespace) -> tuple[int, int, int]:
    """Returns codebook size, number of tokens and classes that stage 2 would have."""
    config, image_size = planned_tokenizer(args)
    num_classes, _ = planned_data(args.data, args.data_dir)
    return config.codebook_size, (image_size // config.stride) ** 2, num_classes


# ---- plans

def print_transformer_plan(
    args: argparse.Namespace, machine: Machine, model: MaskGIT, num_micro_batches: int,
) -> None:
    """Prints what the training of this transformer would take. Raises UserError for a bad image
    size or folder."""
    micro_batch = args.batch // machine.devices // num_micro_batches
    num_tokens = model.config.num_tokens
    for block in model.blocks:
        block.attention.dropout = 0.0       # else a CPU would keep N x N matrices; a GPU does not
    with costs.imagined():
        tokens = torch.zeros(micro_batch, num_tokens, dtype=torch.long)
        labels = torch.zeros(micro_batch, dtype=torch.long)
        activations = costs.kept_for_backward([model], model, tokens, labels)
    moments = 2 * costs.bytes_of(model.parameters())
    optimizers = optim.transformer_optimizers(
        model, args.optimizer, args.lr, args.muon_lr, args.weight_decay, machine)
    if "muon" in optimizers:
        moments -= costs.bytes_of(optimizers["muon"].param_groups[0]["params"])     # one, not two

    # Images are encoded as they come, or in several views before the first step.
    tokenizer, image_size = planned_tokenizer(args)
    flops = transformer_flops(model)
    encoding = encoding_flops(tokenizer, image_size)
    trained = args.batch * args.steps
    encoded = trained
    if args.cache_tokens:
        encoded = args.cache_tokens * planned_data(args.data, args.data_dir)[1]

    if not machine.leads:
        return
    print_time(args, model, f"{num_tokens} tokens of {model.config.codebook_size}",
               f"{flops / 1e9:.4g} G an image, {encoding / 1e9:.4g} G to encode it",
               flops * trained + encoding * encoded)
    seconds = flops * trained / STAGE_2 + encoding * encoded / STAGE_1
    print_memory(args, [model], moments, activations, micro_batch)
    if args.cache_tokens:
        print_gpus(args, STAGE_2 / flops, seconds)
        size = encoded * 2 * (num_tokens + 1)                   # uint16, with the label
        print_row("token cache", f"{size / 1e9:.3g} GB: {encoded:,} views")
        print_reading(args, image_size, CachedTokens.BATCH, STAGE_1 / encoding)
    else:
        print_gpus(args, trained / seconds, seconds)
        print_reading(args, image_size, args.batch // machine.devices, trained / seconds)


def print_tokenizer_plan(
    args: argparse.Namespace, machine: Machine, config: VQGANConfig, num_micro_batches: int,
) -> None:
    """Prints what the training of a tokenizer would take, before any file is read."""
    micro_batch = args.batch // machine.devices // num_micro_batches
    model = VQGAN(config)
    lpips = LPIPS() if args.perceptual == "lpips" else None
    disc = None
    trained: list[nn.Module] = [model]
    if args.adversarial > 0:
        disc = Discriminator(args.image_size, args.disc_width, args.disc_max_width)
        trained.append(disc)
    flops = mean_tokenizer_flops(args, model, disc, lpips)
    activations = tokenizer_activations(args, micro_batch, model, disc, lpips)
    if not machine.leads:
        return
    total = flops * args.batch * args.steps
    print_time(args, model,
               f"{(args.image_size // config.stride) ** 2} tokens of {config.codebook_size}",
               f"{flops / 1e9:.4g} G an image", total)
    moments = 2 * sum(costs.bytes_of(network.parameters()) for network in trained)
    print_memory(args, trained, moments, activations, micro_batch)
    print_gpus(args, STAGE_1 / flops, total / STAGE_1)
    print_reading(args, args.image_size, args.batch // machine.devices, STAGE_1 / flops)


def tokenizer_activations(
    args: argparse.Namespace, micro_batch: int, model: VQGAN, disc: Discriminator | None,
    lpips: LPIPS | None,
) -> float:
    """Returns the bytes that a micro-batch keeps for its backward pass, in float32: those of the
    tokenizer's step, or of the discriminator's if it keeps more."""
    networks = [network for network in (model, disc, lpips) if network is not None]

    def tokenizer_step(images: Tensor) -> None:
        # Without the quantizer, which keeps little and would talk to the other ranks.
        restored = model.decoder(model.encoder(images))
        if lpips is not None:
            lpips(restored, images)
        if disc is not None:
            disc(restored)

    with costs.imagined():
        images = torch.zeros(micro_batch, 3, args.image_size, args.image_size)
        kept = costs.kept_for_backward(networks, tokenizer_step, images)
        if disc is None:
            return kept
        kept_by_disc = costs.kept_for_backward([disc], disc, images.repeat(2, 1, 1, 1))
        if args.r1 > 0:
            kept_by_disc += costs.kept_for_backward([disc], r1_penalty, disc, images)
    return max(kept, kept_by_disc)


# ---- rows

def print_row(name: str, text: str) -> None:
    """Prints a row of a plan."""
    print(f"{name:<13}{text}")


def print_time(
    args: argparse.Namespace, model: nn.Module, tokens: str, of_image: str, flops: float,
) -> None:
    """Prints the size of a model, its FLOPs, and the time at args.dry_run TFLOP/s.

    tokens, of_image: the number of tokens, and the FLOPs for an image, in words. flops: of the
    whole training."""
    print_row("parameters", f"{optim.count_parameters(model) / 1e6:.2f} M, {tokens}")
    print_row("FLOPs", f"{of_image}, {flops / 1e15:.4g} P in all {args.steps} steps")
    print_row("time", f"{flops / 1e12 / args.dry_run / 3600:.3g} hours at {args.dry_run:g} "
                      f"TFLOP/s, of all devices together")


def print_gpus(args: argparse.Namespace, images_per_second: float, seconds: float) -> None:
    """Prints the speed of an H100 or H200, and the time that the whole training would take one."""
    if args.bf16 is False:
        return
    hours = seconds / 3600
    print_row("H100, H200", f"{images_per_second:,.0f} images/s each; {hours:.3g} hours on one, "
                            f"{hours / 8:.3g} on eight")
    print_row("", f"(expected: {STAGE_1 / PEAK:.0%} of {PEAK / 1e12:g} TFLOP/s for the tokenizer, "
                  f"{STAGE_2 / PEAK:.0%} for the transformer)")


def print_memory(
    args: argparse.Namespace, trained: list[nn.Module], moments: float, activations: float,
    micro_batch: int,
) -> None:
    """Prints the memory that a device needs, and the size of the checkpoints.

    trained: the models that learn; the averaged weights are of the first. moments: the bytes of the
    optimizers'. activations: the bytes kept for the backward pass, in float32."""
    if args.bf16 is not False:
        activations /= 2
    for_use = costs.bytes_of(trained[0].parameters())
    weights = sum(costs.bytes_of(model.parameters()) for model in trained)
    to_resume = weights + moments + for_use
    memory = to_resume + weights                                        # and the gradients
    print_row("memory", f"about {(memory + activations) / 1e9:.3g} GB on each device: "
                        f"{memory / 1e9:.3g} for the weights,")
    print_row("", f"{activations / 1e9:.3g} for a micro-batch of {micro_batch}")
    print_row("checkpoints", f"{for_use / 1e9:.3g} GB for use, {to_resume / 1e9:.3g} GB to go on "
                             f"from")


def print_reading(
    args: argparse.Namespace, image_size: int, batch: int, images_per_second: float,
) -> None:
    """Prints what reading the files takes, unless the images are in memory.

    batch: the images that a reader hands over at once. images_per_second: of an H100."""
    in_memory = args.data in ("shapes", "cifar10")
    if args.data not in PLANNED:                        # a folder's small images are kept decoded
        in_memory = image_size <= SMALL
    if in_memory:
        return
    readers = MOST_CORES if args.workers is None else args.workers
    waiting = readers * 2 * batch * 3 * image_size ** 2                 # two batches of each
    print_row("readers", f"{images_per_second / JPEGS_PER_SECOND:.1f} CPU cores to feed an H100, "
                         f"at {JPEGS_PER_SECOND} JPEG files a second and core")
    print_row("/dev/shm", f"{waiting / 1e9:.2g} GB for the {readers} readers of each GPU")
