"""Trains stage 1, the VQGAN tokenizer (§3.1).

    python train_vq.py                              # the drawn shapes, on a laptop: about 5 minutes on two cores
    python train_vq.py --data cifar10
    python train_vq.py --data FOLDER                # a subfolder of images for each class
    python train_vq.py --resume                     # go on after an interruption
    torchrun --nproc_per_node 8 train_vq.py --data imagenet      # the paper's configuration on eight GPUs
    python train_vq.py --data imagenet --device xla              # and on all TPU chips of a host

Writes runs/NAME/vqgan.pt, and beside it the log, the loss curves and the latest reconstructions.
"""
import functools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from lib import costs, flags, metrics, optim, pictures, runtime
from lib.data import DATA_FLAGS, admit_pixels, batches, open_data, spread
from lib.files import rebuild
from lib.flags import UserError, count, fraction, non_negative, whole, yes_or_no
from lib.lpips import LPIPS, load_lpips
from lib.run import Run, micro_batches
from vqgan import VQGAN, Discriminator, VQGANConfig, discriminator_loss, generator_loss, r1_penalty

# Each hyperparameter: its type; its value for `shapes` (a CPU), `cifar10` (a GPU), `imagenet` (the paper's); its help.
FLAGS = {
    "image_size": (count, 32, 32, 256, "pixels along each side"),
    "filters": (count, 48, 64, 128, "width of the tokenizer at full resolution"),
    "multipliers": ({"type": count, "nargs": "+"}, (1, 1, 1), (1, 2), (1, 1, 2, 2, 4),
                    "widths at each resolution, finest first, in units of --filters; one more halves the token grid"),
    "res_blocks": (count, 1, 2, 2, "residual blocks at each resolution"),
    "groups": (count, 1, 1, 32, "groups of each GroupNorm"),
    "codebook_size": (count, 256, 1024, 1024, "entries in the codebook"),
    "codebook_dim": (count, 8, 8, 256, "numbers in each entry"),
    "codebook_lr": (non_negative, 3.0, 3.0, 1.0, "of the codebook, in units of --lr; over 1: starts from encoded images"),
    "disc_width": (count, 2, 8, 64, "width of the discriminator at 256 pixels, doubling at each halving"),
    "disc_max_width": (count, 64, 256, 512, "and its largest width"),
    "steps": (count, 5000, 50_000, 1_000_000, "training steps"),
    "batch": (count, 16, 128, 256, "images in a step, over all devices"),
    "micro_batch": (count, None, None, 32, "images in memory at once on each device; gradients add up to --batch"),
    "lr": (non_negative, 3e-3, 1e-3, 1e-4, "learning rate of Adam, for the tokenizer"),
    "disc_lr": (non_negative, 1e-3, 5e-4, 1e-4, "and for the discriminator"),
    "beta1": (fraction, 0.9, 0.9, 0.0, "Adam's first beta; the second is 0.99"),
    "warmup": (whole, 100, 500, 0, "steps of linear warm-up"),
    "decay": (yes_or_no, True, True, False, "yes: cosine decay to 1%%; no: constant learning rate"),
    "ema": (fraction, 0.995, 0.999, 0.999, "decay of the averaged weights"),
    "reconstruction": (non_negative, 20.0, 20.0, 1.0, "weight of the squared error"),
    "perceptual": (["auto", "lpips", "none"], "auto", "auto", "auto",
                   "loss on VGG16's features (528 MB, fetched once); auto: lpips from 128 pixels on"),
    "perceptual_weight": (non_negative, 0.1, 0.1, 0.1, "weight of the perceptual loss"),
    "entropy": (non_negative, 0.1, 0.1, 0.1, "weight of the codebook entropy loss"),
    "adversarial": (non_negative, 0.4, 0.4, 0.1, "weight of the adversarial loss; 0 switches the discriminator off"),
    "gan_start": (fraction, 0.5, 0.5, 0.0, "share of the steps after which the discriminator sets in"),
    "gan_ramp": (count, 100, 1000, 1, "steps over which the adversarial weight then grows to its full value"),
    "gan_loss": (["non-saturating", "hinge"], *["non-saturating"] * 3, "adversarial loss"),
    "r1": (non_negative, 0.1, 0.1, 10.0, "cost of the discriminator's gradient penalty"),
    "r1_every": (count, 16, 16, 16, "steps between applications of the penalty, which is scaled up by as much"),
    "recompute": (yes_or_no, False, False, False, "activations in the backward pass, for memory; always from 512 px"),
}
PRESETS = flags.presets(FLAGS, {"folder": ("shapes", {"codebook_size": 1024}), "places2": ("imagenet", {})})
LOGGED = ["reconstruction", "perceptual", "commitment", "codebook", "entropy", "generator", "discriminator", "gradient",
          "psnr", "usage", "sharpness"]


def tokenizer_losses(args, model, discriminator, lpips, adversarial, reconstructions, images):
    """The tokenizer: reconstruct, stay near the codes, look alike to `lpips` (or None), and pass for real.

    discriminator: images -> logits. adversarial: the weight of its loss now, or 0. reconstructions: a list, which gets
    those of the images, detached. images: (B, 3, S, S) in [0, 1]. Returns the total and the losses by name, scalars."""
    restored, _, losses = model(images)
    reconstructions.append(restored.detach())
    losses["reconstruction"] = F.mse_loss(restored.float(), images)
    total = args.reconstruction * losses["reconstruction"]
    total = total + losses["commitment"] + losses["codebook"] + losses["entropy"]
    if lpips is not None:
        losses["perceptual"] = lpips(restored, images).mean()
        total = total + args.perceptual_weight * losses["perceptual"]
    losses["generator"] = torch.zeros_like(total)
    if adversarial > 0:
        losses["generator"] = generator_loss(discriminator(restored).float(), args.gan_loss)
        total = total + adversarial * losses["generator"]
    return total, losses


def discriminator_losses(args, discriminator, uncompiled, penalty, images, restored):
    """The discriminator: real images against the tokenizer's reconstructions of them.

    uncompiled: the same without torch.compile, which has no second derivatives. penalty: whether R1 is due (StyleGAN2's
    lazy regularization). Returns the total and, by name, the loss without the penalty."""
    real, fake = discriminator(torch.cat([images, restored])).float().chunk(2)
    total = loss = discriminator_loss(real, fake, args.gan_loss)
    if penalty:
        with runtime.full_precision(images):      # the square of a gradient needs float32
            total = loss + args.r1_every * args.r1 * r1_penalty(uncompiled, images)
    return total, {"discriminator": loss}


class CentredDiscriminator(Discriminator):
    """A discriminator of images in [0, 1] that sees them from -1 to 1: from [0, 1] it would learn far slower."""

    def forward(self, images):
        return super().forward(images * 2 - 1)


def build(args, config, machine, lpips=None, start=None):
    """What stage 1 trains, on the machine: the models, their averaged weights and optimizers; what is saved of them, by
    name; wrapped, which a step calls: the models compiled, their gradients averaged over all ranks.

    lpips: the perceptual loss, or None. start: a VQGAN whose weights to take over, or None."""
    torch.manual_seed(args.seed)
    model = VQGAN(config)
    if start is not None:
        model.load_state_dict(start.state_dict())
    disc = CentredDiscriminator(args.image_size, args.disc_width, args.disc_max_width)
    for network in filter(None, (model, disc, lpips)):
        network.to(machine.device, memory_format=machine.layout)
    model.encoder.recompute = model.decoder.recompute = args.recompute or args.image_size >= 512
    codebook = model.quantizer.codebook
    groups = [{"params": [p for p in model.parameters() if p is not codebook], "base": args.lr},
              {"params": [codebook], "base": args.lr * args.codebook_lr}]
    adam = {"betas": (args.beta1, 0.99), "fused": machine.fused}
    saved = {"model": model, "disc": disc, "optimizer": torch.optim.Adam(groups, lr=args.lr, **adam),
             "disc_optimizer": torch.optim.Adam(disc.parameters(), lr=args.disc_lr, **adam),
             "ema": optim.averaged(model)}
    return SimpleNamespace(
        **saved, saved=saved, wrapped=machine.wrap(model), wrapped_disc=machine.wrap(disc),
        judging_disc=machine.compile(disc), lpips=lpips and machine.compile(lpips))


def imagined_step(args, config, batch):
    """For lib.costs: a step of `batch` images, the discriminator's included, without R1."""
    args, machine = SimpleNamespace(**vars(args) | {"parts": 1, "r1": 0}), runtime.Machine("meta")
    with machine.device:
        nets = build(args, config, machine, LPIPS() if args.perceptual == "lpips" else None)
        images = torch.empty(batch, 3, args.image_size, args.image_size)
    return nets.saved, lambda: train_step(nets, images, args.steps, args, machine)


def train_step(nets, images, step, args, machine):
    """One step: the tokenizer learns from images (B, 3, S, S) in [0, 1]; then, from --gan-start on, the discriminator.

    Returns the losses by name, on the device."""
    steps_of_gan = step - int(args.gan_start * args.steps)           # since the discriminator set in; below 0: not yet
    adversarial = args.adversarial * min(1, (steps_of_gan + 1) / args.gan_ramp) if steps_of_gan >= 0 else 0
    optim.set_learning_rate(nets.optimizer, step, args.lr, args.warmup, args.steps, args.decay)
    reconstructions = []
    tokenizer_loss = functools.partial(
        tokenizer_losses, args, nets.wrapped, nets.judging_disc, nets.lpips, adversarial, reconstructions)
    nets.disc.requires_grad_(False)
    losses = optim.accumulate(machine, nets.wrapped, tokenizer_loss, [images], args.parts)
    losses["gradient"] = torch.nn.utils.clip_grad_norm_(nets.model.parameters(), 1.0)
    nets.optimizer.step()
    optim.average(nets.ema, nets.model, args.ema, step)
    if adversarial == 0:
        return losses | {"discriminator": torch.zeros_like(losses["generator"])}

    # The discriminator warms up as well, or its first steps overshoot.
    optim.set_learning_rate(nets.disc_optimizer, steps_of_gan, args.disc_lr, args.gan_ramp, 0, decay=False)
    penalty = args.r1 > 0 and step % args.r1_every == 0
    disc_loss = functools.partial(discriminator_losses, args, nets.wrapped_disc, nets.disc, penalty)
    nets.disc.requires_grad_(True)
    both = [images, torch.cat(reconstructions)]
    losses |= optim.accumulate(machine, nets.wrapped_disc, disc_loss, both, args.parts)
    nets.disc_optimizer.step()
    return losses


@torch.no_grad()
def preview(model, images, batch, machine):
    """Validation images (n, 3, S, S) uint8, `batch` at a time -> figures, and a picture of some reconstructions.

    The figures: PSNR in dB (mean over images), the share of the codebook in use, sharpness relative to the images."""
    # Each part comes back at once, so that a TPU gets one small program for all parts.
    indices = torch.cat([model.encode(machine.to_floats(part)).cpu() for part in images.split(batch)])
    restored = torch.cat([model.decode(machine.put(part)).cpu() for part in indices.split(batch)])
    images = images.float() / 255
    usage = torch.bincount(indices.flatten(), minlength=model.config.codebook_size).gt(0).float().mean()
    figures = {"psnr": metrics.psnr(images, restored).mean().item(), "usage": usage.item(),
               "sharpness": (metrics.sharpness(restored) / metrics.sharpness(images)).item()}
    rows = [row for i in (0, 16) for row in (images[i:i + 16], restored[i:i + 16]) if len(row)]
    return figures, pictures.grid(rows, ["image", "restored"] * 2)


def configuration(args):
    """The flags -> a VQGANConfig, and the VQGAN to start from or None. Raises ValueError where they do not fit."""
    start, config = None, VQGANConfig(args.codebook_size, args.codebook_dim, args.filters, args.multipliers,
                                      args.res_blocks, args.groups, entropy=args.entropy)
    if args.init:
        start, _ = rebuild(Path(args.init, "vqgan.pt"), "vqgan", VQGAN)
        config = replace(start.config, entropy=args.entropy)
    if args.image_size % config.stride:
        raise UserError(f"--image-size {args.image_size} is not divisible by the tokenizer's stride {config.stride}")
    return config, start


def train(args, machine):
    admit_pixels(args.max_pixels)
    if args.perceptual == "auto":
        args.perceptual = "lpips" if args.image_size >= 128 else "none"
    args.multipliers = tuple(args.multipliers)                             # a list, where the flag was given
    config, start = configuration(args)
    args.parts = micro_batches(args, machine)
    what = f"{(args.image_size // config.stride) ** 2} tokens of {config.codebook_size}"
    step_of = functools.partial(imagined_step, args, config)
    if args.dry_run:
        return costs.print_plan(args, machine, step_of, what)
    run = Run("vqgan", FLAGS, {}, LOGGED, args, machine)
    data, val = open_data(args.data, args.image_size, args.data_dir)
    sample, _ = spread(val, 512 if args.image_size <= 64 else 64)
    nets = build(args, config, machine, load_lpips() if args.perceptual == "lpips" else None, start)
    about = {"data": args.data, "image_size": args.image_size, "classes": list(data.classes)}
    run.start(nets.saved, about, what, costs.flops(step_of(1)[1]))

    draw_preview = functools.partial(preview, nets.ema, sample, args.micro_batch or 64, machine)
    stream = batches(data, args.batch, args.seed, run.step, args.steps, args.workers, machine)
    for step, (images, _) in enumerate(stream, run.step):
        generator = machine.seed_step(args.seed, step)
        images = machine.to_floats(images, own_share=True)
        if step == 0 and args.codebook_lr > 1 and not args.init:
            nets.model.start_codebook(images, generator)
        losses = train_step(nets, images, step, args, machine)
        run.finish_step(step + 1, losses, draw_preview)
    run.say(f"wrote {run.model_file}; look at {run.picture}. Next: python train_transformer.py")


def main():
    runtime.launch(train, flags.parse_training_flags(__doc__, FLAGS, PRESETS, DATA_FLAGS))


if __name__ == "__main__":
    flags.command_line(main)
