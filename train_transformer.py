"""Trains stage 2, the bidirectional transformer, by masked visual token modelling (§3.2).

    python train_transformer.py                     # on the tokens of runs/shapes/vqgan.pt: about 9 minutes on two cores
    python train_transformer.py --data cifar10
    python train_transformer.py --data FOLDER --vqgan OTHER/vqgan.pt
    python train_transformer.py --resume            # go on after an interruption

Writes runs/NAME/transformer.pt, and beside it the log, the loss curve and the latest samples.
"""
import argparse
from dataclasses import asdict
from pathlib import Path

import torch

import runtime
from data import batches, open_data
from maskgit import SCHEDULES, MaskGIT, MaskGITConfig, mask_tokens, mvtm_loss
from sample import draw, load_tokenizer

FLAGS = {
    "dim": "width of the transformer",
    "depth": "layers",
    "heads": "attention heads",
    "mlp_dim": "width of the perceptron in each layer",
    "dropout": "dropout probability",
    "schedule": f"mask schedule in training: {', '.join(SCHEDULES)}",
    "label_smoothing": "label smoothing of the loss",
    "class_dropout": "share of the labels replaced by the null class, for classifier-free guidance",
    "steps": "training steps",
    "batch": "images in a step",
    "lr": "learning rate of AdamW (betas 0.9, 0.96)",
    "weight_decay": "weight decay of AdamW",
    "warmup": "steps of linear warm-up",
    "decay": "yes: cosine decay to 1%%; no: constant learning rate",
    "ema": "decay of the averaged weights",
}
SHAPES = dict(dim=128, depth=4, heads=4, mlp_dim=512, dropout=0.0, schedule="cosine", label_smoothing=0.0, class_dropout=0.0,
              steps=4200, batch=32, lr=4e-3, weight_decay=0.045, warmup=100, decay=True, ema=0.995)
IMAGENET = dict(dim=768, depth=24, heads=8, mlp_dim=3072, dropout=0.1, schedule="cosine", label_smoothing=0.1, class_dropout=0.0,
                steps=1_501_000, batch=256, lr=1e-4, weight_decay=0.045, warmup=5000, decay=False, ema=0.999)   # 300 epochs
PRESETS = {"shapes": SHAPES, "cifar10": SHAPES | dict(steps=20_000), "folder": SHAPES, "imagenet": IMAGENET}


@torch.no_grad()
def validate(model, tokens, labels, schedule, label_smoothing):
    """Loss of validation tokens (n, N) under fixed random masks: the same at every call."""
    generator, losses = torch.Generator(tokens.device).manual_seed(0), []
    for part, label in zip(tokens.split(64), labels.split(64)):
        masked, mask = mask_tokens(part, schedule, model.mask_id, generator)
        losses.append(mvtm_loss(model(masked, label), part, mask, label_smoothing))
    return torch.stack(losses).mean().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vqgan", help="tokenizer file (default: vqgan.pt in the run's folder)")
    args = runtime.parse_training_flags(parser, PRESETS, FLAGS)
    if args.schedule not in SCHEDULES:
        raise ValueError(f"unknown schedule '{args.schedule}'; choose one of: {', '.join(SCHEDULES)}")
    device = runtime.pick_device(args.device)
    folder = Path(args.run or Path("runs", Path(args.data).name))
    tokenizer, of_tokenizer = load_tokenizer(args.vqgan or folder / "vqgan.pt")
    size = of_tokenizer["image_size"]
    settings = {name: getattr(args, name) for name in (*FLAGS, "data", "seed")}
    settings["tokenizer"] = runtime.fingerprint(tokenizer)
    run = runtime.Run(folder, "transformer", settings, ["loss", "accuracy", "gradient", "val_loss"], args.steps,
                      args.batch, args.resume, args.overwrite)
    train, val = open_data(args.data, size)
    config = MaskGITConfig(tokenizer.config.codebook_size, len(train.classes), (size // tokenizer.config.stride) ** 2,
                           args.dim, args.depth, args.heads, args.mlp_dim, args.dropout, args.class_dropout > 0)

    torch.manual_seed(args.seed)
    tokenizer.to(device, memory_format=torch.channels_last)
    model = MaskGIT(config).to(device)
    # Weight decay for matrices; biases, LayerNorms and the output's bias are left alone.
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": args.weight_decay},
                                   {"params": others, "weight_decay": 0.0}], lr=args.lr, betas=(0.9, 0.96))
    ema = runtime.EMA(model, args.ema)
    parts = {"model": model, "ema": ema.model, "optimizer": optimizer}
    if run.state:
        for name, part in parts.items():
            part.load_state_dict(run.state[name])

    def tokenize(images):
        images = images.to(device, non_blocking=True).float().div(255).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            return tokenizer.encode(images).flatten(1)                                      # (B, N)

    val_images, val_labels = val.batch(torch.linspace(0, len(val) - 1, min(512, len(val))).long().numpy())
    val_tokens, val_labels = torch.cat([tokenize(part) for part in val_images.split(64)]), val_labels.to(device)
    shown = min(10, len(train.classes))
    preview_labels = torch.arange(shown, device=device).repeat_interleave(8)
    print(f"{run.folder}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {config.num_tokens} tokens of "
          f"{config.codebook_size}, {config.num_classes} classes, on {device}", flush=True)

    stream = batches(train, args.batch, args.seed, run.step, args.steps, args.workers, device.type == "cuda")
    for step, (images, labels) in enumerate(stream, run.step):
        runtime.seed_step(args.seed, step)
        tokens, labels = tokenize(images), labels.to(device, non_blocking=True)
        if args.class_dropout > 0:
            labels = torch.where(torch.rand(labels.shape, device=device) < args.class_dropout, model.null_label, labels)
        rate = runtime.learning_rate(step, args.lr, args.warmup, args.steps, args.decay)
        for group in optimizer.param_groups:
            group["lr"] = rate

        # §3.2: mask γ(r)·N tokens, predict them from the others, cross-entropy on the masked ones.
        masked, mask = mask_tokens(tokens, args.schedule, model.mask_id)
        logits = model(masked, labels)
        loss = mvtm_loss(logits, tokens, mask, args.label_smoothing)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        gradient = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        ema.update(model, step)

        accuracy = ((logits.detach().argmax(-1) == tokens) & mask).sum() / mask.sum()
        save = (step + 1) % args.save_every == 0 or step + 1 == args.steps or run.signal
        if save:
            run.extra["val_loss"] = validate(ema.model, val_tokens, val_labels, args.schedule, args.label_smoothing)
            pictures, _ = draw(tokenizer, ema.model, preview_labels, steps=min(8, config.num_tokens),
                               generator=torch.Generator(device).manual_seed(0))
            runtime.save_image(run.files["png"], runtime.grid(list(pictures.split(8)), train.classes[:shown]))
        run.log(step + 1, {"loss": loss, "accuracy": accuracy, "gradient": gradient}, every=1 if save else args.log_every)
        if save:
            run.save(step + 1, {name: part.state_dict() for name, part in parts.items()},
                     {"config": asdict(config), "model": ema.model.state_dict(), "data": args.data, "image_size": size,
                      "classes": list(train.classes), "tokenizer": settings["tokenizer"]})
            run.draw_curve()
            run.exit_if_signalled(step + 1)
    print(f"the transformer is {run.files['pt']}; look at {run.files['png']}. Next: python sample.py --run {run.folder}")


if __name__ == "__main__":
    runtime.command_line(main)
