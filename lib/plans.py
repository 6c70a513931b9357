"""What the training of either stage will take: for --dry-run, and for the TFLOP/s of the log."""
import argparse
from pathlib import Path

import torch
from torch import nn

from discriminator import Discriminator
from lib import costs
from lib.files import rebuild
from lib.flags import check_image_size
from lib.lpips import LPIPS
from lib.runtime import Machine
from maskgit import MaskGIT
from vqgan import VQGAN, VQGANConfig

# By preset: image size, stride, codebook size and classes, as long as there is no tokenizer.
PLANNED = {
    "shapes": (32, 4, 256, 10),
    "folder": (32, 4, 1024, 10),
    "cifar10": (32, 2, 1024, 10),
    "imagenet": (256, 16, 1024, 1000),
    "places2": (256, 16, 1024, 365),
}


def transformer_flops(model: MaskGIT) -> float:
    """Returns the FLOPs of a training step for one image: three times those of a forward pass."""
    with costs.imagined():
        tokens = torch.zeros(1, model.config.num_tokens, dtype=torch.long)
        labels = torch.zeros(1, dtype=torch.long)
        return 3 * costs.forward_flops(model, tokens, labels)


def tokenizer_flops(
    model: VQGAN, disc: Discriminator | None, lpips: LPIPS | None, image_size: int,
) -> float:
    """Returns the FLOPs of a training step for one image, without R1.

    A backward pass costs two forward passes, or one where only the input needs a gradient."""
    with costs.imagined():
        images = torch.zeros(1, 3, image_size, image_size)
        flops = 3 * costs.forward_flops(model, images)
        if disc is not None:
            # In the tokenizer's step: forward, gradient of the input. In its own: two images.
            flops += (2 + 2 * 3) * costs.forward_flops(disc, images)
        if lpips is not None:
            # It sees both images, and only the restored ones need a gradient.
            flops += 1.5 * costs.forward_flops(lpips, images, images)
    return flops


def planned_tokens(args: argparse.Namespace) -> tuple[int, int, int]:
    """Returns codebook size, number of tokens and classes that stage 2 would have.

    They are those of the run's tokenizer, if there is one, or of the preset. Raises UserError if
    the image size does not fit the tokenizer's stride."""
    image_size, stride, codebook_size, num_classes = PLANNED.get(args.preset, PLANNED["folder"])
    tokenizer_file = Path(args.vqgan or args.run / "vqgan.pt")
    if args.vqgan or tokenizer_file.exists():
        tokenizer, checkpoint = rebuild(tokenizer_file, "vqgan", VQGAN)
        image_size = checkpoint["image_size"]
        stride = tokenizer.config.stride
        codebook_size = tokenizer.config.codebook_size
    image_size = args.image_size or image_size
    check_image_size(image_size, stride)
    return codebook_size, (image_size // stride) ** 2, num_classes


def print_transformer_plan(
    args: argparse.Namespace, machine: Machine, model: MaskGIT, num_parts: int,
) -> None:
    """Prints what the training of this transformer would take."""
    micro_batch = args.batch // machine.devices // num_parts
    config = model.config
    with costs.imagined():
        tokens = torch.zeros(micro_batch, config.num_tokens, dtype=torch.long)
        labels = torch.zeros(micro_batch, dtype=torch.long)
        activations = costs.kept_for_backward(model, tokens, labels)
    if machine.leads:
        costs.print_plan(
            args, f"{config.num_tokens} tokens of {config.codebook_size}", trained=[model],
            averaged=model, flops=transformer_flops(model), micro_batch=micro_batch,
            activations=activations / 2 if machine.bf16 else activations)


def print_tokenizer_plan(
    args: argparse.Namespace, machine: Machine, config: VQGANConfig, num_parts: int,
) -> None:
    """Prints what the training of a tokenizer would take, before any file is read."""
    micro_batch = args.batch // machine.devices // num_parts
    model = VQGAN(config)
    trained: list[nn.Module] = [model]
    disc = None
    lpips = LPIPS() if args.perceptual == "lpips" else None
    with costs.imagined():
        images = torch.zeros(micro_batch, 3, args.image_size, args.image_size)
        activations = costs.kept_for_backward(model, images)
        if lpips is not None:
            activations += costs.kept_for_backward(lpips, images, images)
    if args.adversarial > 0:
        disc = Discriminator(args.image_size, args.disc_width, args.disc_max_width)
        trained.append(disc)
        with costs.imagined():
            activations += costs.kept_for_backward(disc, images)
    if machine.leads:
        costs.print_plan(
            args, f"{(args.image_size // config.stride) ** 2} tokens of {config.codebook_size}",
            trained=trained, averaged=model,
            flops=tokenizer_flops(model, disc, lpips, args.image_size), micro_batch=micro_batch,
            activations=activations / 2 if machine.bf16 else activations)
