"""Trains stage 1, the VQGAN tokenizer (§3.1).

    python train_vq.py                              # the drawn shapes, on a laptop: about 4 minutes on two cores
    python train_vq.py --data cifar10
    python train_vq.py --data FOLDER                # a subfolder of images for each class
    python train_vq.py --resume                     # go on after an interruption
    torchrun --nproc_per_node 8 train_vq.py --data imagenet      # the paper's configuration on eight GPUs
    python train_vq.py --data imagenet --device xla              # and on all TPU chips of a host

Writes runs/NAME/vqgan.pt, and beside it the log, the loss curve and the latest reconstructions.
"""
import argparse
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F

import devices
import runtime
from data import batches, open_data
from perceptual import load_lpips
from sample import load_tokenizer
from vqgan import (VQGAN, Discriminator, VQGANConfig, discriminator_loss, full_precision, generator_loss,
                   r1_penalty)

FLAGS = {
    "image_size": "pixels along each side",
    "filters": "width of the tokenizer at full resolution",
    "multipliers": "widths at each resolution, finest first, in units of --filters; one more halves the token grid",
    "res_blocks": "residual blocks at each resolution",
    "groups": "groups of each GroupNorm",
    "codebook_size": "entries in the codebook",
    "codebook_dim": "numbers in each entry",
    "codebook_lr": "learning rate of the codebook in units of --lr; where over 1, it also starts from encoded images",
    "disc_width": "width of the discriminator at 256 pixels, doubling at each halving",
    "disc_max_width": "and its largest width",
    "steps": "training steps",
    "batch": "images in a step, over all devices",
    "lr": "learning rate of Adam, for the tokenizer",
    "disc_lr": "and for the discriminator",
    "beta1": "Adam's first beta; the second is 0.99",
    "warmup": "steps of linear warm-up",
    "decay": "yes: cosine decay to 1%%; no: constant learning rate",
    "ema": "decay of the averaged weights",
    "reconstruction": "weight of the squared error",
    "perceptual": "lpips (VGG16 features, 528 MB fetched once), none, or auto: lpips from 128 pixels on",
    "perceptual_weight": "weight of the perceptual loss",
    "entropy": "weight of the codebook entropy loss",
    "adversarial": "weight of the adversarial loss; 0 switches the discriminator off",
    "gan_start": "share of the steps after which the discriminator sets in",
    "gan_ramp": "steps over which the adversarial weight then grows to its full value",
    "gan_loss": "non-saturating or hinge",
    "r1": "cost of the discriminator's gradient penalty",
    "r1_every": "steps between applications of the penalty, which is scaled up by as much",
    "recompute": "yes: recompute activations in the backward pass, for less memory; always done from 512 pixels on",
}
SHAPES = dict(image_size=32, filters=32, multipliers=(1, 1, 1), res_blocks=1, groups=1, codebook_size=256, codebook_dim=8,
              codebook_lr=3.0, disc_width=2, disc_max_width=64, steps=3000, batch=16, lr=3e-3, disc_lr=1e-3, beta1=0.9,
              warmup=100, decay=True, ema=0.995, reconstruction=20.0, perceptual="auto", perceptual_weight=0.1, entropy=0.1,
              adversarial=0.4, gan_start=0.5, gan_ramp=100, gan_loss="non-saturating", r1=0.1, r1_every=16, recompute=False)
IMAGENET = dict(image_size=256, filters=128, multipliers=(1, 1, 2, 2, 4), res_blocks=2, groups=32, codebook_size=1024,
                codebook_dim=256, codebook_lr=1.0, disc_width=64, disc_max_width=512, steps=1_000_000, batch=256, lr=1e-4,
                disc_lr=1e-4, beta1=0.0, warmup=0, decay=False, ema=0.999, reconstruction=1.0, perceptual="auto",
                perceptual_weight=0.1, entropy=0.1, adversarial=0.1, gan_start=0.0, gan_ramp=1, gan_loss="non-saturating",
                r1=10.0, r1_every=16, recompute=False, micro_batch=32)
PRESETS = {"shapes": SHAPES, "cifar10": SHAPES | dict(codebook_size=1024, steps=20_000, batch=32),
           "folder": SHAPES | dict(codebook_size=1024), "imagenet": IMAGENET, "places2": IMAGENET}


@torch.no_grad()
def start_codebook(model, images, generator, machine):
    """Starts the codebook from features of the first images, so that every entry is near some feature from the start."""
    features = model.encoder(images).permute(0, 2, 3, 1).flatten(0, 2)
    size = model.config.codebook_size
    chosen = torch.randperm(len(features), generator=generator).repeat(-(-size // len(features)))[:size].to(features.device)
    noise = torch.randn(size, features.shape[1], generator=generator).to(features.device)
    start = features[chosen] + 0.05 * features.std(0) * noise                                 # no two entries alike
    only_first = torch.tensor([float(machine.rank == 0)]).to(start.device)
    model.quantizer.codebook.copy_(machine.mean(start * only_first) * machine.world)           # rank 0's, on all


def tokenizer_losses(args, model, images, judge, adversarial, lpips=None):
    """The tokenizer: reconstruct, stay near the codes, look alike to `lpips`, and, where adversarial > 0, pass for real.

    images: (B, 3, S, S) in [0, 1]. judge: images -> logits. adversarial: its weight now. lpips: perceptual.LPIPS, or None.
    Returns the total, a scalar, the losses by name, and the reconstructions, detached."""
    restored, _, losses = model(images)
    losses["reconstruction"] = F.mse_loss(restored.float(), images)
    total = args.reconstruction * losses["reconstruction"] + losses["commitment"] + losses["codebook"] + losses["entropy"]
    if lpips:
        losses["perceptual"] = lpips(restored, images).mean()
        total = total + args.perceptual_weight * losses["perceptual"]
    losses["generator"] = torch.zeros_like(total)
    if adversarial > 0:
        losses["generator"] = generator_loss(judge(restored).float(), args.gan_loss)
        total = total + adversarial * losses["generator"]
    return total, losses, restored.detach()


def judge_losses(args, judge, plain_judge, images, restored, penalty):
    """The discriminator: real images against the tokenizer's reconstructions of them. penalty: whether R1 is due.

    plain_judge: the same discriminator uncompiled, since torch.compile has no second derivatives. Returns the total and the
    loss without the penalty."""
    real, fake = judge(torch.cat([images, restored])).float().chunk(2)
    loss = discriminator_loss(real, fake, args.gan_loss)
    if not penalty:
        return loss, loss
    with full_precision(images):      # the square of a gradient needs float32
        return loss + args.r1_every * args.r1 * r1_penalty(plain_judge, images), loss


def preview(model, images, batch, path):
    """Writes validation images above their reconstructions. images: (n, 3, S, S) in [0, 1], `batch` of them at a time.

    Returns PSNR in dB (mean over images), the share of the codebook in use, and sharpness relative to the images."""
    model.eval()
    with torch.no_grad():
        indices = torch.cat([model.encode(x) for x in images.split(batch)])
        restored = torch.cat([model.decode(i) for i in indices.split(batch)])
    psnr = -10 * (restored - images).square().mean((1, 2, 3)).clamp(min=1e-10).log10().mean()
    usage = torch.bincount(indices.flatten(), minlength=model.config.codebook_size).gt(0).float().mean()
    rows = [row for i in (0, 16) for row in (images[i:i + 16], restored[i:i + 16]) if len(row)]
    runtime.save_image(path, runtime.grid(rows, ["image", "restored"] * 2))
    return {"psnr": psnr.item(), "usage": usage.item(),
            "sharpness": (runtime.sharpness(restored) / runtime.sharpness(images)).item()}


def train(args, machine):
    if args.perceptual == "auto":
        args.perceptual = "lpips" if args.image_size >= 128 else "none"
    if args.perceptual not in ("lpips", "none"):
        raise ValueError(f"unknown --perceptual '{args.perceptual}'; choose lpips, none or auto")
    settings = {name: getattr(args, name) for name in (*FLAGS, "data", "seed", "init")}
    config = VQGANConfig(args.codebook_size, args.codebook_dim, args.filters, args.multipliers, args.res_blocks,
                         args.groups, entropy=args.entropy)
    if args.init:
        start, _ = load_tokenizer(Path(args.init, "vqgan.pt"))
        config = replace(start.config, entropy=args.entropy)
    if args.image_size % config.stride:
        raise ValueError(f"--image-size {args.image_size} is not divisible by the tokenizer's stride {config.stride}")
    if args.gan_loss not in ("non-saturating", "hinge"):
        raise ValueError(f"unknown --gan-loss '{args.gan_loss}'; choose non-saturating or hinge")
    device, parts = machine.device, devices.micro_batches(args, machine)
    run = runtime.Run(args.run or Path("runs", Path(args.data).name), "vqgan", settings,
                      ["reconstruction", "perceptual", "commitment", "codebook", "entropy", "generator", "discriminator", "gradient",
                       "psnr", "usage", "sharpness"], args, machine)
    data, val = open_data(args.data, args.image_size, args.data_dir)
    shown = min(512 if args.image_size <= 64 else 64, len(val))
    sample = val.batch(torch.linspace(0, len(val) - 1, shown).long().numpy())[0].to(device).float() / 255

    torch.manual_seed(args.seed)
    model = VQGAN(config)
    if args.init:
        model.load_state_dict(start.state_dict())
    model.to(device, memory_format=machine.layout)
    lpips = load_lpips().to(device, memory_format=machine.layout) if args.perceptual == "lpips" else None
    disc = Discriminator(args.image_size, args.disc_width, args.disc_max_width).to(device, memory_format=machine.layout)
    model.encoder.recompute = model.decoder.recompute = args.recompute or args.image_size >= 512
    codebook = model.quantizer.codebook
    groups = [{"params": [p for p in model.parameters() if p is not codebook], "base": args.lr},
              {"params": [codebook], "base": args.lr * args.codebook_lr}]
    optimizer = torch.optim.Adam(groups, lr=args.lr, betas=(args.beta1, 0.99), fused=machine.fused)
    disc_optimizer = torch.optim.Adam(disc.parameters(), lr=args.disc_lr, betas=(args.beta1, 0.99), fused=machine.fused)
    ema = runtime.EMA(model, args.ema)
    saved = {"model": model, "disc": disc, "ema": ema.model, "optimizer": optimizer, "disc_optimizer": disc_optimizer}
    if run.state:
        for name, part in saved.items():
            part.load_state_dict(run.state[name])
    run.say(f"{run.folder}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, "
            f"{(args.image_size // config.stride) ** 2} tokens of {config.codebook_size}, on {device} x {machine.world}")

    model.quantizer.mean_over_ranks = machine.mean
    trained, trained_disc = machine.trainable(model), machine.trainable(disc)
    judge = lambda images: disc(images * 2 - 1)      # centred inputs: from [0, 1] the discriminator learns far slower
    trained_judge = lambda images: trained_disc(images * 2 - 1)
    gan_start = int(args.gan_start * args.steps) if args.adversarial > 0 else args.steps
    stream = batches(data, args.batch, args.seed, run.step, args.steps, args.workers, machine)
    for step, (images, _) in enumerate(stream, run.step):
        generator = machine.seed_step(args.seed, step)
        images = images.to(device, non_blocking=True).float().div(255).contiguous(memory_format=machine.layout)
        if step == 0 and args.codebook_lr > 1 and not args.init:
            start_codebook(model, images, generator, machine)
        adversarial = args.adversarial * min(1, (step - gan_start + 1) / args.gan_ramp) if step >= gan_start else 0
        for group in optimizer.param_groups:
            group["lr"] = runtime.learning_rate(step, group["base"], args.warmup, args.steps, args.decay)

        disc.requires_grad_(False)
        optimizer.zero_grad(set_to_none=True)
        restored, metrics = [], []
        for i, part in enumerate(images.chunk(parts)):
            with machine.accumulating(trained, i + 1 < parts):
                with machine.autocast():
                    total, losses, output = tokenizer_losses(args, trained, part, judge, adversarial, lpips)
                (total / parts).backward()
            restored.append(output)
            metrics.append(losses)
        metrics = {name: sum(losses[name].detach() for losses in metrics) / parts for name in losses}
        machine.reduce_gradients(optimizer)
        metrics["gradient"] = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        ema.update(model, step)

        # The discriminator warms up as well, or its first steps overshoot.
        metrics["discriminator"] = torch.zeros_like(metrics["generator"])
        if adversarial:
            for group in disc_optimizer.param_groups:
                group["lr"] = runtime.learning_rate(step - gan_start, args.disc_lr, args.gan_ramp, args.steps, decay=False)
            disc.requires_grad_(True)
            disc_optimizer.zero_grad(set_to_none=True)
            for i, (part, output) in enumerate(zip(images.chunk(parts), restored)):
                with machine.accumulating(trained_disc, i + 1 < parts):
                    with machine.autocast():
                        penalty = args.r1 > 0 and step % args.r1_every == 0
                        total, loss = judge_losses(args, trained_judge, judge, part, output, penalty)
                    (total / parts).backward()
                metrics["discriminator"] = metrics["discriminator"] + loss.detach() / parts
            machine.reduce_gradients(disc_optimizer)
            disc_optimizer.step()
        run.end_step(metrics)

        save = run.saves(step + 1)
        if save and run.leads:
            run.extra = preview(ema.model, sample, args.micro_batch or 64, run.files["png"])
            machine.sync(alone=True)                 # or torch-xla adds what is left of this to the next step, on rank 0 alone
        if save or (step + 1) % args.log_every == 0:
            run.log(step + 1)
        if save:
            run.save(step + 1, {name: part.state_dict() for name, part in saved.items()},
                     {"config": asdict(config), "model": ema.model.state_dict(), "data": args.data,
                      "image_size": args.image_size, "classes": list(data.classes)})
            run.draw_curve()
            run.exit_if_signalled(step + 1)
    run.say(f"the tokenizer is {run.files['pt']}; look at {run.files['png']}. Next: python train_transformer.py")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--init", metavar="RUN", help="start from the tokenizer of a run, sizes included, such as runs/imagenet256")
    devices.launch(train, runtime.parse_training_flags(parser, PRESETS, FLAGS))


if __name__ == "__main__":
    devices.command_line(main)
