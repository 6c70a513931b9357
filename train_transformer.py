"""Trains stage 2, the bidirectional transformer, by masked visual token modelling (§3.2).

    python train_transformer.py                     # from runs/shapes/vqgan.pt: about 9 minutes on two cores
    python train_transformer.py --resume            # go on after an interruption
    python train_transformer.py --decoder autoregressive    # the raster-scan baseline that the paper compares with
    torchrun --nproc_per_node 8 train_transformer.py --data imagenet --cache-tokens 10       # eight GPUs

Writes runs/NAME/transformer.pt (autoregressive.pt), beside it the log, the loss curves and the latest samples.
"""
import functools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch

from lib import devices, pictures, training
from lib.checkpoints import STAGES, fingerprint, rebuild, write_atomically
from lib.data import batches, open_data, spread
from lib.devices import count, positive, share, whole, yes_or_no
from lib.tokens import CachedTokens
from maskgit import SCHEDULES, MaskGIT, MaskGITConfig, decode, decode_sequential, mask_tokens, mvtm_loss
from vqgan import VQGAN, as_grid

# Each hyperparameter: its type; its value for `shapes` (a CPU), `cifar10` (a GPU), `imagenet` (the paper's); its help.
FLAGS = {
    "dim": (count, 128, 384, 768, "width of the transformer; that of its perceptrons is four times this"),
    "depth": (count, 4, 12, 24, "layers"),
    "heads": (count, 4, 6, 8, "attention heads"),
    "dropout": (share, 0.0, 0.1, 0.1, "dropout probability"),
    "schedule": (SCHEDULES, "cosine", "cosine", "cosine", "mask schedule in training"),
    "label_smoothing": (share, 0.0, 0.0, 0.1, "label smoothing of the loss"),
    "class_dropout": (share, 0.0, 0.1, 0.0, "share of the labels replaced by the null class, for guidance"),
    "steps": (count, 4000, 60_000, 1_501_000, "training steps"),                                # imagenet: 300 epochs
    "batch": (count, 64, 256, 256, "images in a step, over all devices"),
    "micro_batch": (count, None, None, 64, "images in memory at once on each device; gradients add up to --batch"),
    "optimizer": (["muon", "adamw"], "muon", "muon", "adamw", "muon: for the blocks' matrices; the rest has AdamW"),
    "muon_lr": (positive, 0.02, 0.02, 0.02, "learning rate of Muon"),
    "lr": (positive, 4e-3, 2e-3, 1e-4, "learning rate of AdamW (betas 0.9, 0.96)"),
    "weight_decay": (positive, 0.045, 0.045, 0.045, "weight decay of the optimizers"),
    "warmup": (whole, 100, 1000, 5000, "steps of linear warm-up"),
    "decay": (yes_or_no, True, True, False, "yes: cosine decay to 1%%; no: constant learning rate"),
    "ema": (share, 0.995, 0.9995, 0.999, "decay of the averaged weights"),
    "cache_tokens": (whole, 1, 4, 0, "encode every training image once, in so many views; 0: encode on the fly"),
}
PRESETS = training.presets(FLAGS, {"folder": ("shapes", {"cache_tokens": 10}),
                                   "places2": ("imagenet", {"steps": 1_409_000})})
LOGGED = ["loss", "accuracy", "gradient", "val_loss", "val_nll"]


# --------------------------------------------------------------------------------------------- one step, building

def mask_for_training(schedule, model, tokens, generator):
    """§3.2: masks γ(r)·N tokens of each image -> what the model sees and which tokens it is to predict, both (B, N).

    The autoregressive baseline sees all tokens, each position those before it, and predicts all of them."""
    if model.config.causal:
        return tokens, torch.ones_like(tokens, dtype=torch.bool)
    return mask_tokens(tokens, schedule, model.mask_id, generator)


def drop_labels(labels, null_label, probability, generator):
    """Replaces a share of the labels by that of no class, so that the model learns to draw without one as well."""
    dropped = torch.rand(labels.shape, generator=generator).to(labels.device) < probability
    return torch.where(dropped, null_label, labels)


def train_step(nets, tokens, labels, step, args, machine, generator):
    """One step on tokens (B, N) and labels (B,): mask some tokens, predict them from the others (Eq. 1).

    generator: of the CPU, for masks and dropped labels. Returns the metrics by name, on the device."""
    for optimizer in nets.optimizers.values():
        training.set_learning_rate(optimizer, step, args.lr, args.warmup, args.steps, args.decay)
    if args.class_dropout > 0:
        labels = drop_labels(labels, nets.model.null_label, args.class_dropout, generator)
    seen, mask = mask_for_training(args.schedule, nets.model, tokens, generator)

    def masked_token_loss(seen, mask, tokens, labels):
        logits = nets.wrapped(seen, labels)
        loss = mvtm_loss(logits, tokens, mask, args.label_smoothing)
        right = (logits.detach().argmax(-1) == tokens) & mask
        return loss, {"loss": loss, "accuracy": right.sum() / mask.sum()}

    batch = [seen, mask, tokens, labels]
    metrics = training.accumulate(machine, nets.wrapped, masked_token_loss, batch, args.parts)
    metrics["gradient"] = torch.nn.utils.clip_grad_norm_(nets.model.parameters(), 1.0)
    for optimizer in nets.optimizers.values():
        optimizer.step()
    nets.ema.update(nets.model, step)
    return metrics


@torch.no_grad()
def validation(args, model, tokens, labels, machine):
    """Of tokens (n, N), on the CPU, under fixed masks: the loss as in training, and the NLL that bounds the likelihood.

    Under the linear schedule all shares of masked tokens are equally frequent. The mean loss is then a bound on
    -log p(image) / N (Uria et al. 2014), in nats, and compares with the loss of the autoregressive decoder."""
    found = {}
    for name, schedule, smoothing in (("val_loss", args.schedule, args.label_smoothing), ("val_nll", "linear", 0.0)):
        generator, losses = torch.Generator().manual_seed(0), []
        for part, label in zip(tokens.split(64), labels.split(64), strict=True):
            part, label = machine.put(part), machine.put(label)
            seen, mask = mask_for_training(schedule, model, part, generator)
            with machine.autocast():
                losses.append(mvtm_loss(model(seen, label), part, mask, smoothing).cpu())
        found[name] = torch.stack(losses).mean().item()
    return found


def build(args, config, machine, start=None, same_classes=False):
    """What stage 2 trains: the model, on the machine, its averaged weights and its optimizer.

    start: a MaskGIT whose weights to take over, or None. same_classes: those of the classes, too."""
    torch.manual_seed(args.seed)
    model = MaskGIT(config)
    if start is not None:
        adopt(model, start, same_classes)
    model.to(machine.device)
    return SimpleNamespace(model=model, ema=training.EMA(model, args.ema),
                           optimizers=training.transformer_optimizers(model, args, machine),
                           wrapped=machine.wrap(model))             # as training calls it: compiled, on all ranks


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


def configuration(args, tokenizer, size, classes):
    """-> a MaskGITConfig; a MaskGIT to start from, or None; whether that has the same classes. Raises ValueError if it
    belongs to another tokenizer or another number of tokens."""
    num_tokens = (size // tokenizer.config.stride) ** 2
    config = MaskGITConfig(tokenizer.config.codebook_size, len(classes), num_tokens, args.dim, args.depth, args.heads,
                           4 * args.dim, args.dropout, causal=args.decoder == "autoregressive",
                           null_class=args.class_dropout > 0)
    if not args.init:
        return config, None, False
    stage = STAGES[args.decoder]
    start, checkpoint = rebuild(Path(args.init, f"{stage}.pt"), stage, MaskGIT)
    if checkpoint["tokenizer"] != fingerprint(tokenizer):
        raise ValueError(f"{args.init} has another tokenizer: add --vqgan {args.init}/vqgan.pt")
    if start.config.num_tokens != config.num_tokens:
        raise ValueError(f"{args.init} draws {start.config.num_tokens} tokens, not {config.num_tokens}: add "
                         f"--image-size {checkpoint['image_size']}")
    config = replace(start.config, num_classes=config.num_classes, dropout=config.dropout, null_class=config.null_class)
    return config, start, list(classes) == checkpoint["classes"]


# ---------------------------------------------------------------------------------------------------- the training run

def open_tokenizer(args, machine):
    """-> the tokenizer, on the machine, and the images' size in pixels. Raises ValueError where they do not fit."""
    tokenizer, checkpoint = rebuild(args.vqgan or training.folder_of(args) / "vqgan.pt", "vqgan", VQGAN)
    size = args.image_size or checkpoint["image_size"]
    if size % tokenizer.config.stride:
        raise ValueError(f"--image-size {size} is not divisible by the tokenizer's stride {tokenizer.config.stride}")
    return tokenizer.to(machine.device, memory_format=machine.layout), size


@torch.no_grad()
def tokenize(tokenizer, args, machine, images, own_share=False):
    """(n, 3, S, S) uint8 -> tokens (n, N), on the device."""
    with machine.autocast():
        parts = machine.to_floats(images, own_share).split(args.micro_batch or 64)
        return torch.cat([tokenizer.encode(part).flatten(1) for part in parts])


@torch.no_grad()
def preview(model, tokenizer, classes, machine):
    """A picture of samples: eight of each of the first ten classes; in 8 steps, where the decoder is parallel."""
    generator, rows = machine.generator(0), []
    for label in range(min(10, len(classes))):
        labels = machine.put(torch.full((8,), label))
        if model.config.causal:
            tokens = decode_sequential(model, labels, generator=generator)
        else:
            tokens = decode(model, labels, min(8, model.config.num_tokens), generator=generator)
        rows.append(tokenizer.decode(as_grid(tokens)))
        machine.sync()                                  # a TPU then gets one small program for all rows
    return pictures.grid([row.cpu() for row in rows], classes)


def train(args, machine):
    args.parts = training.micro_batches(args, machine)
    tokenizer, size = open_tokenizer(args, machine)
    tokenizer_id = fingerprint(tokenizer)
    settings = training.decisive_settings(args, FLAGS, "init") | {"image_size": size, "tokenizer": tokenizer_id}
    run = training.Run(STAGES[args.decoder], settings, LOGGED, args, machine)
    own_tokenizer = run.folder / "vqgan.pt"                                # a run holds all that sampling needs
    if args.vqgan and machine.leads and (args.overwrite or not own_tokenizer.exists()):
        write_atomically(own_tokenizer, lambda file: file.write(Path(args.vqgan).read_bytes()))
    data, val = open_data(args.data, size, args.data_dir)
    config, *start = configuration(args, tokenizer, size, data.classes)
    nets = build(args, config, machine, *start)
    run.restore({"model": nets.model, "ema": nets.ema.model, **nets.optimizers},
                {"data": args.data, "image_size": size, "classes": list(data.classes), "tokenizer": tokenizer_id})
    run.introduce(nets.model, f"{config.num_tokens} tokens of {config.codebook_size}, {config.num_classes} classes")

    encode = functools.partial(tokenize, tokenizer, args, machine)
    if args.cache_tokens:
        folder = run.folder / "tokens" / tokenizer_id                     # another tokenizer's have another place
        data = CachedTokens(folder, data, args.cache_tokens, config.num_tokens)
        data.encode(encode, machine.rank, machine.world)
        machine.any(False)                                              # waits until all ranks have encoded
    val_images, val_labels = spread(val, 512)
    val_tokens = encode(val_images).cpu()

    def draw_preview():
        figures = validation(args, nets.ema.model, val_tokens, val_labels, machine)
        return figures, preview(nets.ema.model, tokenizer, data.classes, machine)

    stream = batches(data, args.batch, args.seed, run.step, args.steps, args.workers, machine)
    for step, (images, labels) in enumerate(stream, run.step):
        generator = machine.seed_step(args.seed, step)
        tokens = machine.put(images, own_share=True).long() if args.cache_tokens else encode(images, own_share=True)
        labels = machine.put(labels, own_share=True)
        metrics = train_step(nets, tokens, labels, step, args, machine, generator)
        run.finish_step(step + 1, metrics, draw_preview)
    run.say_the_end(f"python sample.py --run {run.folder}")


def main():
    devices.launch(train, training.parse_training_flags(__doc__, {
        "decoder": (list(STAGES), "parallel", "autoregressive: next-token prediction in raster order, causal"),
        "init": (str, None, "a run whose transformer to start from, sizes included, such as runs/imagenet256"),
        "vqgan": (str, None, "tokenizer file (default: vqgan.pt in the run's folder)"),
        "image_size": (count, None, "pixels along each side (default: what the tokenizer was trained at)"),
    }, FLAGS, PRESETS))


if __name__ == "__main__":
    devices.command_line(main)
