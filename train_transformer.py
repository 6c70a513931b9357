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

from lib import costs, flags, optim, pictures, runtime
from lib.data import DATA_FLAGS, admit_pixels, batches, open_data, spread
from lib.features import JUDGE_FLAGS, open_judge
from lib.files import rebuild, write_atomically
from lib.flags import UserError, count, fraction, non_negative, whole, yes_or_no
from lib.run import Run, micro_batches
from lib.runtime import from_host
from lib.sampling import STAGES
from lib.tokens import CachedTokens, FrozenTokenizer
from maskgit import SCHEDULES, MaskGIT, MaskGITConfig, decode, decode_sequential, mask_tokens, mvtm_loss
from vqgan import VQGAN, as_grid

# Each hyperparameter: its type; its value for `shapes` (a CPU), `cifar10` (a GPU), `imagenet` (the paper's); its help.
FLAGS = {
    "dim": (count, 128, 384, 768, "width of the transformer; that of its perceptrons is four times this"),
    "depth": (count, 4, 12, 24, "layers"),
    "heads": (count, 4, 6, 8, "attention heads"),
    "dropout": (fraction, 0.0, 0.1, 0.1, "dropout probability"),
    "schedule": (SCHEDULES, "cosine", "cosine", "cosine", "mask schedule in training"),
    "label_smoothing": (fraction, 0.0, 0.0, 0.1, "label smoothing of the loss"),
    "class_dropout": (fraction, 0.1, 0.1, 0.0, "share of the labels replaced by the null class, for guided decoding"),
    "steps": (count, 4000, 60_000, 1_501_000, "training steps"),                                # imagenet: 300 epochs
    "batch": (count, 64, 256, 256, "images in a step, over all devices"),
    "micro_batch": (count, None, None, 64, "images in memory at once on each device; gradients add up to --batch"),
    "optimizer": (["muon", "adamw"], "muon", "muon", "adamw", "muon: for the blocks' matrices; the rest has AdamW"),
    "muon_lr": (non_negative, 0.02, 0.02, 0.02, "learning rate of Muon"),
    "lr": (non_negative, 4e-3, 2e-3, 1e-4, "learning rate of AdamW (betas 0.9, 0.96)"),
    "weight_decay": (non_negative, 0.045, 0.045, 0.045, "weight decay of the optimizers"),
    "warmup": (whole, 100, 1000, 5000, "steps of linear warm-up"),
    "decay": (yes_or_no, True, True, False, "yes: cosine decay to 1%%; no: constant learning rate"),
    "ema": (fraction, 0.995, 0.9995, 0.999, "decay of the averaged weights"),
    "cache_tokens": (whole, 1, 4, 0, "encode every training image once, in so many views; 0: encode on the fly"),
}
PRESETS = flags.presets(FLAGS, {"folder": ("shapes", {"cache_tokens": 10}),
                                   "places2": ("imagenet", {"steps": 1_409_000})})
# Codes, tokens of an image, and classes, for --dry-run, which reads no tokenizer and no data.
PLANNED = {"shapes": (256, 64, 10), "cifar10": (1024, 256, 10), "imagenet": (1024, 256, 1000),
           "places2": (1024, 256, 365), "folder": (1024, 64, 10)}
LOGGED = ["loss", "accuracy", "gradient", "val_loss", "val_nll", "FCD", "FID"]


def mask_for_training(schedule, model, tokens, generator):
    """§3.2: masks γ(r)·N tokens of each image -> what the model sees and which tokens it is to predict, both (B, N).

    The autoregressive baseline sees all tokens, each position those before it, and predicts all of them."""
    if model.config.causal:
        return tokens, torch.ones_like(tokens, dtype=torch.bool)
    return mask_tokens(tokens, schedule, model.mask_id, generator)


def loss_and_accuracy(logits, tokens, mask, label_smoothing):
    """Eq. 1, and as metrics the same and the share of the masked tokens (B, N) that are predicted right; scalars."""
    loss, right = mvtm_loss(logits, tokens, mask, label_smoothing), (logits.detach().argmax(-1) == tokens) & mask
    return loss, {"loss": loss, "accuracy": right.sum() / mask.sum()}


def train_step(nets, tokens, labels, step, args, machine, generator):
    """One step on tokens (B, N) and labels (B,): mask some tokens, predict them from the others (Eq. 1).

    generator: of the CPU, for masks and dropped labels. Returns the metrics by name, on the device."""
    for optimizer in nets.optimizers.values():
        optim.set_learning_rate(optimizer, step, args.lr, args.warmup, args.steps, args.decay)
    if nets.model.config.null_class:        # some are of no class, so that the model learns to draw without one as well
        dropped = from_host(torch.rand(labels.shape, generator=generator), labels) < args.class_dropout
        labels = torch.where(dropped, nets.model.null_label, labels)
    seen, mask = mask_for_training(args.schedule, nets.model, tokens, generator)

    def masked_token_loss(seen, mask, tokens, labels):
        return nets.loss(nets.wrapped(seen, labels), tokens, mask, args.label_smoothing)

    batch = [seen, mask, tokens, labels]
    metrics = optim.accumulate(machine, nets.wrapped, masked_token_loss, batch, args.parts)
    metrics["gradient"] = torch.nn.utils.clip_grad_norm_(nets.model.parameters(), 1.0)
    for optimizer in nets.optimizers.values():
        optimizer.step()
    optim.average(nets.ema, nets.model, args.ema, step)
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
    """What stage 2 trains, on the machine: the model, its averaged weights and optimizers; what is saved of them, by
    name; wrapped, which a step calls: the model compiled, its gradients averaged over all ranks.

    start: a MaskGIT whose weights to take over, or None. same_classes: those of the classes, too."""
    torch.manual_seed(args.seed)
    model = MaskGIT(config)
    if start is not None:
        adopt(model, start, same_classes)
    model.to(machine.device)
    models = {"model": model, "ema": optim.averaged(model)}
    both = optim.transformer_optimizers(model, args, machine)
    return SimpleNamespace(**models, optimizers=both, saved=models | both, wrapped=machine.wrap(model),
                           loss=machine.compile(loss_and_accuracy))


def imagined_step(args, config, batch):
    """For lib.costs: a step of `batch` images."""
    args, machine = SimpleNamespace(**vars(args) | {"parts": 1}), runtime.Machine("meta")
    with machine.device:
        nets = build(args, config, machine)
        tokens = torch.zeros(batch, config.num_tokens, dtype=torch.long)
    return nets.saved, lambda: train_step(nets, tokens, tokens[:, 0], args.warmup, args, machine, None)


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


def configuration(args, codebook_size, num_tokens, num_classes):
    """The flags, and what the tokenizer and the data decide -> a MaskGITConfig."""
    causal = args.decoder == "autoregressive"                              # which is decoded without guidance
    return MaskGITConfig(codebook_size, num_classes, num_tokens, args.dim, args.depth, args.heads, 4 * args.dim,
                         args.dropout, causal, null_class=args.class_dropout > 0 and not causal)


def start_from(args, config, tokenizer_id, classes):
    """The run that --init names -> its sizes, a MaskGITConfig; its MaskGIT; whether that has the same classes. Raises
    ValueError if it belongs to another tokenizer or another number of tokens."""
    stage = STAGES[args.decoder]
    start, checkpoint = rebuild(Path(args.init, f"{stage}.pt"), stage, MaskGIT)
    if checkpoint["tokenizer"] != tokenizer_id:
        raise UserError(f"{args.init} has another tokenizer: add --vqgan {args.init}/vqgan.pt")
    if start.config.num_tokens != config.num_tokens:
        raise UserError(f"{args.init} draws {start.config.num_tokens} tokens, not {config.num_tokens}: add "
                         f"--image-size {checkpoint['image_size']}")
    config = replace(start.config, num_classes=config.num_classes, dropout=config.dropout, null_class=config.null_class)
    return config, start, list(classes) == checkpoint["classes"]


@torch.no_grad()
def draw(model, tokenizer, labels, generator, machine):
    """Samples of these classes (B,) in the paper's number of steps -> images uint8 (B, 3, S, S), and their tokens."""
    with machine.autocast():
        if model.config.causal:
            tokens = decode_sequential(model, labels, generator=generator)
        else:
            steps = min(model.config.default_steps, model.config.num_tokens)
            tokens = decode(model, labels, steps, cfg=float(model.config.null_class), generator=generator)
        return torch.cat([pictures.to_uint8(tokenizer.decode(part)) for part in as_grid(tokens).split(8)]), tokens


def train(args, machine):
    admit_pixels(args.max_pixels)
    args.parts = micro_batches(args, machine)
    if args.dry_run:                                                       # before there is a tokenizer
        config = configuration(args, *PLANNED[args.preset])
        what = f"{config.num_tokens} tokens of {config.codebook_size}"
        return costs.print_plan(args, machine, functools.partial(imagined_step, args, config), what)
    own_tokenizer = args.run / "vqgan.pt"                                  # a run holds all that sampling needs
    tokenizer = FrozenTokenizer(args.vqgan or own_tokenizer, VQGAN, args.image_size, args.micro_batch or 64, machine)
    found = {"image_size": tokenizer.image_size, "tokenizer": tokenizer.fingerprint}
    run = Run(STAGES[args.decoder], FLAGS, found, LOGGED, args, machine)
    data, val = open_data(args.data, tokenizer.image_size, args.data_dir)
    classes = list(data.classes)
    config, start = configuration(args, tokenizer.codebook_size, tokenizer.num_tokens, len(classes)), ()
    if args.init:
        config, *start = start_from(args, config, tokenizer.fingerprint, classes)
    nets = build(args, config, machine, *start)
    run.start(nets.saved, {"data": args.data, "classes": classes, **found},
              f"{config.num_tokens} tokens of {config.codebook_size}, {len(classes)} classes",
              costs.flops(imagined_step(args, config, 1)[1]))
    if args.vqgan and machine.leads and (args.overwrite or not own_tokenizer.exists()):
        write_atomically(own_tokenizer, lambda file: file.write(Path(args.vqgan).read_bytes()))
    drawing = functools.partial(draw, nets.ema, tokenizer.model)
    judge = open_judge(args, machine, data, val, run.folder, drawing) if args.evaluate_every else None
    if args.cache_tokens:
        folder = run.folder / "tokens" / tokenizer.fingerprint            # another tokenizer's have another place
        data = CachedTokens(folder, data, args.cache_tokens, config.num_tokens)
        data.encode(tokenizer.encode, machine.rank, machine.world)
        machine.any(False)                                              # waits until all ranks have encoded
    val_images, val_labels = spread(val, 512)
    val_tokens = tokenizer.encode(val_images).cpu()

    def draw_preview():
        shown = machine.put(torch.arange(min(10, len(classes))).repeat_interleave(8))           # eight of each class
        images, _ = drawing(shown, machine.generator(0), machine)
        machine.sync()
        figures = validation(args, nets.ema, val_tokens, val_labels, machine)
        return figures, pictures.grid((images.cpu() / 255).split(8), classes)

    read = machine.put if args.cache_tokens else tokenizer.encode                    # cached tokens, or images
    stream = batches(data, args.batch, args.seed, run.step, args.steps, args.workers, machine)
    for step, (images, labels) in enumerate(stream, run.step):
        generator = machine.seed_step(args.seed, step)
        tokens = read(images, own_share=True).long()
        labels = machine.put(labels, own_share=True)
        metrics = train_step(nets, tokens, labels, step, args, machine, generator)
        run.finish_step(step + 1, metrics, draw_preview, judge)
    run.say(f"wrote {run.model_file}; look at {run.picture}. Next: python sample.py --run {run.folder}")


def main():
    runtime.launch(train, flags.parse_training_flags(__doc__, FLAGS, PRESETS, {
        "decoder": (list(STAGES), "parallel", "autoregressive: next-token prediction in raster order, causal"),
        "vqgan": (str, None, "tokenizer file (default: vqgan.pt in the run's folder)"),
        "image_size": (count, None, "pixels along each side (default: what the tokenizer was trained at)"),
        **JUDGE_FLAGS, **DATA_FLAGS,
    }))


if __name__ == "__main__":
    flags.command_line(main)
