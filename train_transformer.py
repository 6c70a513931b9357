"""Trains stage 2, the bidirectional transformer, by masked visual token modelling (§3.2).

    python train_transformer.py                     # on the tokens of runs/shapes/vqgan.pt: about 9 minutes on two cores
    python train_transformer.py --data cifar10
    python train_transformer.py --data FOLDER --vqgan OTHER/vqgan.pt
    python train_transformer.py --resume            # go on after an interruption
    python train_transformer.py --cache-tokens 1    # encode every image once, train from the tokens
    python train_transformer.py --decoder autoregressive    # the raster-scan baseline that the paper compares with
    torchrun --nproc_per_node 8 train_transformer.py --data imagenet --cache-tokens 10       # eight GPUs
    python train_transformer.py --data imagenet --device xla                                 # all TPU chips of a host

Writes runs/NAME/transformer.pt (autoregressive.pt), and beside it the log, the loss curve and the latest samples.
"""
import argparse
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

import devices
import runtime
from data import batches, open_data
from maskgit import SCHEDULES, MaskGIT, MaskGITConfig, mask_tokens, mvtm_loss
from sample import STAGES, draw, load_tokenizer
from tokens import CachedTokens

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
    "batch": "images in a step, over all devices",
    "lr": "learning rate of AdamW (betas 0.9, 0.96)",
    "weight_decay": "weight decay of AdamW",
    "warmup": "steps of linear warm-up",
    "decay": "yes: cosine decay to 1%%; no: constant learning rate",
    "ema": "decay of the averaged weights",
}
SHAPES = dict(dim=128, depth=4, heads=4, mlp_dim=512, dropout=0.0, schedule="cosine", label_smoothing=0.0,
              class_dropout=0.0, steps=4200, batch=32, lr=4e-3, weight_decay=0.045, warmup=100, decay=True, ema=0.995)
IMAGENET = dict(dim=768, depth=24, heads=8, mlp_dim=3072, dropout=0.1, schedule="cosine", label_smoothing=0.1,
                class_dropout=0.0, steps=1_501_000, batch=256, lr=1e-4, weight_decay=0.045, warmup=5000, decay=False,
                ema=0.999, micro_batch=64)                  # 300 epochs
PRESETS = {"shapes": SHAPES, "cifar10": SHAPES | dict(steps=20_000), "folder": SHAPES, "imagenet": IMAGENET,
           "places2": IMAGENET | dict(steps=1_409_000)}      # 200 epochs


def training_loss(args, model, mask_id, tokens, labels, generator):
    """§3.2: mask γ(r)·N tokens, predict them from the others, cross-entropy on the masked ones.

    tokens: (B, N), labels: (B,). model: (tokens, labels) -> logits. Returns the loss and the share of masked tokens
    predicted right, scalars. The autoregressive baseline predicts every token from those before it instead."""
    if args.decoder == "autoregressive":
        masked, mask = tokens, torch.ones_like(tokens, dtype=torch.bool)
    else:
        masked, mask = mask_tokens(tokens, args.schedule, mask_id, generator)
    logits = model(masked, labels)
    loss = mvtm_loss(logits, tokens, mask, args.label_smoothing)
    return loss, ((logits.detach().argmax(-1) == tokens) & mask).sum() / mask.sum()


@torch.no_grad()
def validate(args, model, tokens, labels):
    """Loss of validation tokens (n, N) under fixed random masks: the same at every call."""
    generator = torch.Generator().manual_seed(0)
    return torch.stack([training_loss(args, model, model.mask_id, part, label, generator)[0]
                        for part, label in zip(tokens.split(64), labels.split(64))]).mean().item()


def adopt(model, start, same_classes):
    """Takes over the weights of `start`; the rows of the classes only where both have the same."""
    weights, own, codes = start.state_dict(), model.state_dict(), model.config.codebook_size
    for name in ("token_embedding.weight", "head_bias"):
        table, theirs = own[name].clone(), weights[name]
        table[:codes], table[model.mask_id] = theirs[:codes], theirs[start.mask_id]
        if same_classes:
            table[codes:model.mask_id] = theirs[codes:start.mask_id]
        weights[name] = table
    model.load_state_dict(weights)


def train(args, machine):
    if args.schedule not in SCHEDULES:
        raise ValueError(f"unknown schedule '{args.schedule}'; choose one of: {', '.join(SCHEDULES)}")
    device, parts = machine.device, devices.micro_batches(args, machine)
    folder = Path(args.run or Path("runs", Path(args.data).name))
    tokenizer, of_tokenizer = load_tokenizer(args.vqgan or folder / "vqgan.pt")
    size = args.image_size or of_tokenizer["image_size"]
    if size % tokenizer.config.stride:
        raise ValueError(f"--image-size {size} is not divisible by the tokenizer's stride {tokenizer.config.stride}")
    settings = {name: getattr(args, name) for name in (*FLAGS, "data", "seed", "cache_tokens")}
    settings |= {"init": args.init, "image_size": size, "tokenizer": runtime.fingerprint(tokenizer)}
    stage = STAGES[args.decoder]
    run = runtime.Run(folder, stage, settings, ["loss", "accuracy", "gradient", "val_loss"], args, machine)
    if args.vqgan and run.leads and not (folder / "vqgan.pt").exists():     # a run holds all that sampling needs
        runtime.write_atomically(folder / "vqgan.pt", lambda file: file.write(Path(args.vqgan).read_bytes()))
    data, val = open_data(args.data, size, args.data_dir)
    config = MaskGITConfig(tokenizer.config.codebook_size, len(data.classes), (size // tokenizer.config.stride) ** 2,
                           args.dim, args.depth, args.heads, args.mlp_dim, args.dropout, causal=args.decoder == "autoregressive",
                           null_class=args.class_dropout > 0)
    if args.init:
        start, of_start = runtime.rebuild(Path(args.init, f"{stage}.pt"), stage, MaskGITConfig, MaskGIT)
        if of_start["tokenizer"] != settings["tokenizer"]:
            raise ValueError(f"the transformer of {args.init} belongs to another tokenizer: add --vqgan {args.init}/vqgan.pt")
        if start.config.num_tokens != config.num_tokens:
            raise ValueError(f"the transformer of {args.init} draws {start.config.num_tokens} tokens, not {config.num_tokens}: "
                             f"add --image-size {of_start['image_size']}")
        config = replace(start.config, num_classes=config.num_classes, dropout=config.dropout, null_class=config.null_class)

    torch.manual_seed(args.seed)
    tokenizer.to(device, memory_format=machine.layout)
    model = MaskGIT(config)
    if args.init:
        adopt(model, start, list(data.classes) == of_start["classes"])
    model.to(device)
    # Weight decay for matrices; biases, LayerNorms and the output's bias are left alone.
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": args.weight_decay},
                                   {"params": others, "weight_decay": 0.0}], lr=args.lr, betas=(0.9, 0.96), fused=machine.fused)
    ema = runtime.EMA(model, args.ema)
    saved = {"model": model, "ema": ema.model, "optimizer": optimizer}
    if run.state:
        for name, part in saved.items():
            part.load_state_dict(run.state[name])

    def tokenize(images):
        """(n, 3, S, S) uint8 -> (n, N) int64."""
        images = images.to(device, non_blocking=True).float().div(255).contiguous(memory_format=machine.layout)
        with torch.no_grad(), machine.autocast():
            return torch.cat([tokenizer.encode(part).flatten(1) for part in images.split(args.micro_batch or 64)])

    if args.cache_tokens:
        data = CachedTokens(folder / "tokens", data, args.cache_tokens, settings["tokenizer"], config.num_tokens)
        data.encode(tokenize, machine.rank, machine.world)
        machine.wait_for_ranks()
    val_images, val_labels = val.batch(torch.linspace(0, len(val) - 1, min(512, len(val))).long().numpy())
    val_tokens, val_labels = tokenize(val_images), val_labels.to(device)
    shown = min(10, len(data.classes))
    preview_labels = torch.arange(shown, device=device).repeat_interleave(8)
    run.say(f"{run.folder}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {config.num_tokens} tokens of "
            f"{config.codebook_size}, {config.num_classes} classes, on {device} x {machine.world}")

    trained = machine.trainable(model)
    run.started = time.time()                                                               # encoding is not training
    stream = batches(data, args.batch, args.seed, run.step, args.steps, args.workers, machine)
    for step, (images, labels) in enumerate(stream, run.step):
        generator = machine.seed_step(args.seed, step)
        tokens = images.to(device, non_blocking=True).long() if args.cache_tokens else tokenize(images)
        labels = labels.to(device, non_blocking=True)
        if args.class_dropout > 0:
            drop = torch.rand(labels.shape, generator=generator).to(device) < args.class_dropout
            labels = torch.where(drop, model.null_label, labels)
        rate = runtime.learning_rate(step, args.lr, args.warmup, args.steps, args.decay)
        for group in optimizer.param_groups:
            group["lr"] = rate

        optimizer.zero_grad(set_to_none=True)
        results = []
        for i, (part, label) in enumerate(zip(tokens.chunk(parts), labels.chunk(parts))):
            with machine.accumulating(trained, i + 1 < parts):
                with machine.autocast():
                    loss, accuracy = training_loss(args, trained, model.mask_id, part, label, generator)
                (loss / parts).backward()
            results.append(torch.stack([loss.detach(), accuracy]))
        machine.reduce_gradients(optimizer)
        gradient = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        ema.update(model, step)
        loss, accuracy = torch.stack(results).mean(0)
        run.end_step({"loss": loss, "accuracy": accuracy, "gradient": gradient})

        save = run.saves(step + 1)
        if save and run.leads:
            run.extra["val_loss"] = validate(args, ema.model, val_tokens, val_labels)
            options = {} if config.causal else {"steps": min(8, config.num_tokens)}
            pictures, _ = draw(tokenizer, ema.model, preview_labels, generator=machine.generator(0), **options)
            runtime.save_image(run.files["png"], runtime.grid(list(pictures.split(8)), data.classes[:shown]))
            machine.sync(alone=True)                 # or torch-xla adds what is left of this to the next step, on rank 0 alone
        if save or (step + 1) % args.log_every == 0:
            run.log(step + 1)
        if save:
            run.save(step + 1, {name: part.state_dict() for name, part in saved.items()},
                     {"config": asdict(config), "model": ema.model.state_dict(), "data": args.data, "image_size": size,
                      "classes": list(data.classes), "tokenizer": settings["tokenizer"]})
            run.draw_curve()
            run.exit_if_signalled(step + 1)
    run.say(f"the {stage} is {run.files['pt']}; look at {run.files['png']}. Next: python sample.py --run {run.folder}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decoder", default="parallel", choices=STAGES,
                        help="autoregressive: next-token prediction in raster order with a causal mask (default: %(default)s)")
    parser.add_argument("--init", metavar="RUN",
                        help="start from the transformer of a run, sizes included, such as runs/imagenet256")
    parser.add_argument("--vqgan", help="tokenizer file (default: vqgan.pt in the run's folder)")
    parser.add_argument("--image-size", type=runtime.whole,
                        help="pixels along each side (default: what the tokenizer was trained at)")
    parser.add_argument("--cache-tokens", type=runtime.whole, default=0, metavar="K",
                        help="encode every training image once, in K augmented views, and train from the tokens; "
                             "0: encode on the fly (default: %(default)s)")
    devices.launch(train, runtime.parse_training_flags(parser, PRESETS, FLAGS))


if __name__ == "__main__":
    devices.command_line(main)
