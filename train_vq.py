"""Trains stage 1, the VQGAN tokenizer (§3).

    python train_vq.py                           # the drawn shapes: 9 minutes on two cores
    python train_vq.py --data cifar10
    python train_vq.py --data FOLDER             # a subfolder of images for each class
    python train_vq.py --resume                  # go on after an interruption
    torchrun --nproc_per_node 8 train_vq.py --data imagenet         # the paper's, on eight GPUs
    python train_vq.py --data imagenet --device xla                 # and on all TPU chips of a host

Writes runs/NAME/vqgan.pt, a log, its curves and the latest reconstructions.
"""
import argparse
import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from discriminator import (
    ADVERSARIAL_LOSSES,
    Discriminator,
    discriminator_loss,
    generator_loss,
    r1_penalty,
)
from lib import flags, metrics, optim, plans
from lib.data import (
    DATA_FLAGS,
    check_run_outside_data,
    evenly_spaced,
    fetch_data,
    open_data,
    resolve_data,
)
from lib.errors import UserError, command_line
from lib.files import rebuild
from lib.flags import count, fraction, non_negative, whole, yes_or_no
from lib.image_files import admit_pixels
from lib.loader import training_batches
from lib.log import Log
from lib.lpips import fetch_lpips
from lib.pictures import draw_log, grid, save_image
from lib.run import Run, command, initial_model
from lib.runtime import Machine, from_first_rank, launch
from vqgan import QUANTIZERS, VQGAN, VQGANConfig

COUNTS = {"type": count, "nargs": "+"}
FLAGS = {
    # flag: type, or choices; its value for shapes, cifar10, imagenet (the paper's); help
    "image_size": (count, 32, 32, 256, "pixels along each side; with --init that run's"),
    "filters": (count, 48, 64, 128, "width of the tokenizer at full resolution"),
    "multipliers": (COUNTS, (1, 1, 1), (1, 2), (1, 1, 2, 2, 4),
                    "widths at each resolution in units of --filters, finest first; each further "
                    "one halves the token grid"),
    "res_blocks": (count, 1, 2, 2, "residual blocks at each resolution"),
    "groups": (count, 1, 1, 32, "groups of each GroupNorm"),
    "quantizer": (list(QUANTIZERS), "vq", "vq", "vq", "vq: a learned codebook; fsq: --levels"),
    "codebook_size": (count, 256, 1024, 1024, "entries in the codebook (vq)"),
    "codebook_dim": (count, 8, 8, 256, "numbers in each entry (vq)"),
    "levels": ({"type": flags.number(int, 3), "nargs": "+"}, (8, 6, 5), (8, 5, 5, 5), (8, 5, 5, 5),
               "values of each number (fsq)"),
    "codebook_lr": (non_negative, 3.0, 3.0, 1.0,
                    "learning rate of the codebook in units of --lr; above 1, the codebook also "
                    "starts from encoded images"),
    "disc_width": (count, 2, 8, 64, "discriminator's width at 256 pixels; doubles at each halving"),
    "disc_max_width": (count, 64, 256, 512, "largest width of the discriminator"),
    "steps": (count, 5000, 50_000, 1_000_000, "training steps"),
    "batch": (count, 16, 128, 256, "images in a step, over all devices"),
    "micro_batch": (count, None, None, 32, "images in memory at once on each device"),
    "lr": (non_negative, 3e-3, 1e-3, 1e-4, "learning rate of Adam, for the tokenizer"),
    "disc_lr": (non_negative, 1e-3, 5e-4, 1e-4, "learning rate of Adam, for the discriminator"),
    "beta1": (flags.number(float, 0, 0.999), 0.9, 0.9, 0.0,
              "Adam's first beta; the second is 0.99"),
    "warmup": (whole, 100, 500, 0, "steps of linear warm-up of --lr; --disc-lr has --gan-ramp"),
    "decay": (yes_or_no, True, True, False, "yes: cosine decay of --lr to 1%%; no: constant"),
    "ema": (fraction, 0.995, 0.999, 0.999, "decay of the averaged weights"),
    "reconstruction": (non_negative, 20.0, 20.0, 1.0, "weight of the squared error"),
    "perceptual": (["auto", "lpips", "none"], "auto", "auto", "auto",
                   "loss on VGG16's features (528 MB, fetched once); auto: from 128 pixels on"),
    "perceptual_weight": (non_negative, 0.1, 0.1, 0.1, "weight of the perceptual loss"),
    "entropy": (non_negative, 0.1, 0.1, 0.1, "weight of the codebook entropy loss (vq)"),
    "adversarial": (non_negative, 0.4, 0.4, 0.1, "weight of the adversarial loss; 0: none"),
    "gan_start": (fraction, 0.5, 0.5, 0.0, "fraction of the steps before the discriminator"),
    "gan_ramp": (count, 100, 1000, 1, "steps over which the adversarial weight then grows"),
    "gan_loss": (ADVERSARIAL_LOSSES, "non-saturating", "non-saturating", "non-saturating",
                 "adversarial loss"),
    "r1": (non_negative, 0.1, 0.1, 10.0, "weight of the discriminator's gradient penalty"),
    "r1_every": (count, 16, 16, 16,
                 "apply the penalty at every so many steps, that many times as strong"),
    "log_every": (count, 50, 50, 50, "steps between log lines"),
    "picture_every": (count, 500, 1000, 5000, "steps between validations, with a picture"),
    "save_every": (count, 500, 1000, 5000, "steps between checkpoints"),
}
PRESETS = flags.presets(FLAGS, {
    "folder": ("shapes", {"codebook_size": 1024, "levels": (8, 5, 5, 5)}),
    "places2": ("imagenet", {}),
})
# Flags that a resumed run cannot change: they determine the shapes of its weights, or what these
# were trained on.
FIXED = {
    "data", "init", "image_size", "filters", "multipliers", "res_blocks", "groups", "quantizer",
    "codebook_size", "codebook_dim", "levels", "disc_width", "disc_max_width",
}


def train(args: argparse.Namespace, machine: Machine) -> None:  # noqa: C901 (long, but flat)
    """Trains the tokenizer. Raises UserError for a mistake of the user."""
    refuse_useless_flags(args)
    start = None                                            # the tokenizer of --init
    if args.init:
        start, checkpoint = rebuild(initial_model(args, "vqgan"), "vqgan", VQGAN)
        if "image_size" not in args.given:
            args.image_size = checkpoint["image_size"]
    if args.perceptual == "auto":
        args.perceptual = "lpips" if args.image_size >= 128 else "none"
    config = configuration(args, start)
    num_micro_batches = optim.count_micro_batches(args.batch, args.micro_batch, machine.devices)
    if args.dry_run:
        plans.print_tokenizer_plan(args, machine, config, num_micro_batches)
        return

    # The run's folder and the data.
    admit_pixels(args.max_pixels)
    args.data = resolve_data(args.data)
    check_run_outside_data(args.run, args.data)
    run = Run("vqgan", args, machine)
    with machine.first_rank_first():
        fetch_data(args.data, args.image_size, args.data_dir)
    data, val = open_data(args.data, args.image_size, args.data_dir)
    val_images, _ = evenly_spaced(val, 512 if args.image_size <= 64 else 64)
    metadata = {"data": args.data, "image_size": args.image_size, "classes": list(data.classes)}
    run.note_settings({"data": args.data}, FLAGS)
    run.compare_with_saved(FIXED)
    if run.step >= args.steps:
        run.say(f"{run.folder} is already at step {run.step}: raise --steps to train on")
        return
    check_no_transformer_is_lost(run)

    # The tokenizer, its average, the discriminator, the perceptual loss, the optimizers.
    torch.manual_seed(args.seed)
    model = VQGAN(config)
    if start is not None:
        model.load_state_dict(start.state_dict())
    disc = Discriminator(args.image_size, args.disc_width, args.disc_max_width, centred=True)
    lpips = fetch_lpips(machine) if args.perceptual == "lpips" else None
    # For the TFLOP/s of the log, counted while the models are still on the CPU: those of a step
    # before --gan-start and after it.
    flops_without_disc = plans.tokenizer_flops(model, None, lpips, args.image_size)
    flops_with_disc = plans.tokenizer_flops(model, disc, lpips, args.image_size)
    model = machine.place(model)
    disc = machine.place(disc)
    if lpips is not None:
        lpips = machine.compile(machine.place(lpips))
    ema = optim.averaged(model)
    optimizer = tokenizer_optimizer(args, model, machine)
    disc_optimizer = torch.optim.Adam(
        disc.parameters(), lr=args.disc_lr, betas=(args.beta1, 0.99), fused=machine.fused)
    resumable = {"model": model, "ema": ema, "disc": disc,
                 "optimizer": optimizer, "disc_optimizer": disc_optimizer}
    run.restore(resumable)
    gan_start = start_of_discriminator(args, disc_optimizer, run.step)
    run.say(f"{run.folder}: {optim.count_parameters(model) / 1e6:.2f} M parameters, "
            f"{(args.image_size // config.stride) ** 2} tokens of {config.codebook_size}, "
            f"on {machine.device} x {machine.devices}")

    # What a step calls. The discriminator is called in three ways:
    #     ddp_disc         while it learns: compiled, with gradients averaged over the ranks
    #     compiled_disc    while the tokenizer learns from it: compiled, its own weights fixed
    #     disc             for R1: not compiled, since torch.compile has no second derivatives
    ddp_model = machine.wrap(model)
    ddp_disc = machine.wrap(disc)
    compiled_disc = machine.compile(disc)

    decay_until = args.steps if args.decay else None
    log = Log(run, flops_without_disc)
    run.discard_former()
    run.catch_signals()
    stream = training_batches(
        data, args.batch, args.seed, run.step, args.steps, args.workers, machine)
    for step, (images, _) in enumerate(stream, start=run.step):
        # Every random draw is a function of (seed, step, rank).
        generator = machine.seed_step(args.seed, step)
        images = machine.to_floats(images, of_this_rank=True)               # (B, 3, S, S) in [0, 1]
        parts = optim.micro_batches(len(images), num_micro_batches)
        if step == 0 and args.codebook_lr > 1 and not args.init:            # see --codebook-lr
            start_quantizer(model, images, parts, generator)
        # 0 until --gan-start; then it rises linearly over --gan-ramp steps.
        gan_step = step - gan_start
        adversarial_weight = args.adversarial * min(1, max(0, gan_step + 1) / args.gan_ramp)

        # The tokenizer learns, with gradients summed over micro-batches.
        optim.set_learning_rate(optimizer, step, args.warmup, decay_until)
        disc.requires_grad_(False)
        ddp_model.zero_grad(set_to_none=True)
        fakes = []                                          # the reconstructions, by micro-batch
        for part in parts:
            with machine.micro_batch(ddp_model, last=part is parts[-1]):
                with machine.autocast():
                    loss, terms, restored = tokenizer_loss(
                        args, ddp_model, compiled_disc, lpips, adversarial_weight, images[part])
                (loss / num_micro_batches).backward()
            fakes.append(restored)
            log.add(**terms)
        gradient = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optim.update_average(ema, model, args.ema, step)
        log.add(gradient=gradient)

        # The discriminator learns to tell images from these reconstructions. Without a warm-up over
        # --gan-ramp, its first steps would overshoot. It has not needed clipping.
        if adversarial_weight > 0:
            log.flops = flops_with_disc
            optim.set_learning_rate(disc_optimizer, gan_step, warmup=args.gan_ramp)
            disc.requires_grad_(True)
            ddp_disc.zero_grad(set_to_none=True)
            for part, fake in zip(parts, fakes, strict=True):
                with machine.micro_batch(ddp_disc, last=part is parts[-1]):
                    with machine.autocast():
                        both = torch.cat([images[part], fake])
                        real_logits, fake_logits = ddp_disc(both).float().chunk(2)
                        disc_loss = discriminator_loss(real_logits, fake_logits, args.gan_loss)
                    total = disc_loss
                    if args.r1 > 0 and step % args.r1_every == 0:   # StyleGAN2's lazy R1; float32
                        penalty = args.r1 * r1_penalty(disc, images[part])
                        total = total + args.r1_every * penalty
                        log.add(r1=penalty)
                    (total / num_micro_batches).backward()
                log.add(discriminator=disc_loss)
            disc_gradients = [parameter.grad for parameter in disc.parameters()]
            log.add(disc_gradient=nn.utils.get_total_norm(disc_gradients))
            disc_optimizer.step()
        machine.sync()

        # Now and then: save first, stop if a signal asked for it, validate, draw, log.
        done = step + 1
        stopping = run.should_stop(done)
        saving = run.due(done, args.save_every)
        drawing = run.due(done, args.picture_every)
        if stopping or saving:
            log.check_finite(done)
            run.save(done, resumable, metadata)
        if stopping:
            log.write(done)
            run.exit(done)
        figures = {}
        if drawing:
            # On every rank: torch-xla needs all hosts, and elsewhere the others would only wait.
            val_restored, tokens = reconstruct(ema, val_images, args.micro_batch or 64, machine)
            figures = validation(val_images, val_restored, tokens, config.codebook_size)
            save_preview(run, val_images, val_restored)
        if drawing or saving or run.due(done, args.log_every):
            log.write(done, **figures)
        if drawing and machine.leads:
            draw_log(run.curve, run.log_file)
    run.say(f"wrote {run.model_file}; look at {run.picture}. Next: {next_command(args)}")


def next_command(args: argparse.Namespace) -> str:
    """Returns the command that trains stage 2 on this tokenizer, and on the same data."""
    words = ["--data", args.data, "--run", args.run]
    if args.preset != flags.default_preset(args.data, PRESETS):
        words += ["--preset", args.preset]
    if args.data_dir != DATA_FLAGS["data_dir"][1]:
        words += ["--data-dir", args.data_dir]
    return command("train_transformer.py", *words)


def configuration(args: argparse.Namespace, start: VQGAN | None = None) -> VQGANConfig:
    """Returns the configuration in the flags, or that of `start`, the tokenizer of --init.

    Raises UserError if sizes do not fit each other."""
    if args.perceptual == "lpips" and args.image_size < 16:
        raise UserError(f"--perceptual lpips needs images of at least 16 pixels, not "
                        f"{args.image_size}: add --perceptual none, or raise --image-size")
    if start is not None:
        if "quantizer" in args.given and args.quantizer != start.config.quantizer:
            raise UserError(f"--quantizer {args.quantizer} is not that of {args.init}, which is "
                            f"{start.config.quantizer}: leave it out")
        config = replace(start.config, entropy=args.entropy)
    else:
        config = VQGANConfig(
            codebook_size=args.codebook_size,
            codebook_dim=args.codebook_dim,
            filters=args.filters,
            multipliers=tuple(args.multipliers),
            res_blocks=args.res_blocks,
            groups=args.groups,
            entropy=args.entropy,
            quantizer=args.quantizer,
        )
        if args.quantizer == "fsq":
            levels = tuple(args.levels)
            config = replace(config, levels=levels, codebook_size=math.prod(levels),
                             codebook_dim=len(levels))
        if args.filters % args.groups:
            raise UserError(f"--filters {args.filters} is not divisible by --groups {args.groups}: "
                            f"choose a multiple")
    flags.check_image_size(args.image_size, config.stride)
    return config


def refuse_useless_flags(args: argparse.Namespace) -> None:
    """Raises UserError for flags of the quantizer that is not used."""
    if args.resume:                         # the run may have been started with them
        return
    if args.quantizer == "fsq":
        useless = ["codebook_size", "codebook_dim", "codebook_lr", "entropy"]
        flags.refuse_useless(args, useless, "with --quantizer fsq, which has --levels")
    else:
        flags.refuse_useless(args, ["levels"], "without --quantizer fsq")


def check_no_transformer_is_lost(run: Run) -> None:
    """Raises UserError if this run goes on with a tokenizer that a transformer beside it needs."""
    if run.step == 0:                       # a new tokenizer
        return
    for stage in ("transformer", "autoregressive"):
        path = run.folder / f"{stage}.pt"
        if path.exists():
            raise UserError(f"{path} was trained on the tokens of {run.model_file}, and would be "
                            f"lost if that were trained on: copy {run.model_file.name} and "
                            f"{run.resume_file.name} to another folder, and name that with --run")


def tokenizer_optimizer(
    args: argparse.Namespace, model: VQGAN, machine: Machine,
) -> torch.optim.Optimizer:
    """Returns Adam for the tokenizer, with the quantizer's own learning rate."""
    quantizer = list(model.quantizer.parameters())
    others = [*model.encoder.parameters(), *model.decoder.parameters()]
    groups = [
        {"params": others, "lr": args.lr},
        {"params": quantizer, "lr": args.lr * args.codebook_lr},
    ]
    return torch.optim.Adam(groups, lr=args.lr, betas=(args.beta1, 0.99), fused=machine.fused)


def start_of_discriminator(
    args: argparse.Namespace, disc_optimizer: torch.optim.Optimizer, step: int,
) -> int:
    """Returns the step at which the discriminator starts: --gan-start; or, in a run that is resumed
    at `step`, when it did start, since a higher --steps must not stop it again."""
    states = list(disc_optimizer.state.values())
    if states:
        return step - int(states[0]["step"])                        # less the steps it has taken
    return max(step, int(args.gan_start * args.steps))


@torch.no_grad()
def start_quantizer(
    model: VQGAN, images: Tensor, parts: list[slice], generator: torch.Generator,
) -> None:
    """Starts the quantizer from the features of these images, on all ranks as on the first.

    parts: the micro-batches in which the images are encoded."""
    features = torch.cat([model.encoder(images[part]) for part in parts])
    model.quantizer.start_from(features, generator)
    for parameter in model.quantizer.parameters():
        from_first_rank(parameter)


def tokenizer_loss(
    args: argparse.Namespace, model: nn.Module, discriminator: nn.Module, lpips: nn.Module | None,
    adversarial_weight: float, images: Tensor,
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Returns the loss of the tokenizer, its terms by name, and the reconstructions (b, 3, S, S).

    The loss is the sum of the terms, which are already weighted. It is small if reconstructions
    equal the images, look the same to `lpips` and pass for real, and if features are near codes
    that are all in use. images: (b, 3, S, S) in [0, 1]. adversarial_weight: if 0, the discriminator
    is not called."""
    restored, _, quantizer_terms = model(images)
    terms = dict(quantizer_terms)
    terms["reconstruction"] = args.reconstruction * F.mse_loss(restored.float(), images)
    if lpips is not None:
        terms["perceptual"] = args.perceptual_weight * lpips(restored, images).mean()
    if adversarial_weight > 0:
        fake_logits = discriminator(restored).float()
        terms["generator"] = adversarial_weight * generator_loss(fake_logits, args.gan_loss)
    return sum(terms.values()), terms, restored.detach()


@torch.no_grad()
def reconstruct(
    model: VQGAN, images: Tensor, batch: int, machine: Machine,
) -> tuple[Tensor, Tensor]:
    """Returns reconstructions (n, 3, S, S) in [0, 1] of uint8 images, and their tokens (n, h, w),
    both on the CPU."""
    # Each part returns to the CPU at once, so that on a TPU one small program serves all parts.
    tokens = [model.encode(machine.to_floats(part)).cpu() for part in images.split(batch)]
    restored = [model.decode(machine.put(part)).cpu() for part in tokens]
    return torch.cat(restored), torch.cat(tokens)


def validation(
    images: Tensor, restored: Tensor, tokens: Tensor, codebook_size: int,
) -> dict[str, float]:
    """Returns the PSNR in dB, the usage of the codebook, and the relative sharpness.

    The usage is the fraction of codes in use, of as many as there are tokens. images: uint8
    (n, 3, S, S). restored: floats in [0, 1]. tokens: (n, h, w)."""
    images = images.float() / 255
    usage = len(tokens.unique()) / min(codebook_size, tokens.numel())
    sharpness = metrics.sharpness(restored).mean() / metrics.sharpness(images).mean()
    return {
        "psnr": metrics.psnr(images, restored).mean().item(),
        "usage": usage,
        "sharpness": sharpness.item(),
    }


def save_preview(run: Run, images: Tensor, restored: Tensor) -> None:
    """Writes a picture of the first images, each row above its reconstructions."""
    if not run.machine.leads:
        return
    images = images.float() / 255
    rows = []
    for start in (0, 16):
        if start < len(images):
            rows += [images[start:start + 16], restored[start:start + 16]]
    save_image(run.picture, grid(rows, ["image", "restored"] * (len(rows) // 2)))


def main() -> None:
    launch(train, flags.parse_training_flags(__doc__, FLAGS, PRESETS, DATA_FLAGS))


if __name__ == "__main__":
    command_line(main)
