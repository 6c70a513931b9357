"""Trains stage 2, the bidirectional transformer, by masked visual token modelling (§3.1).

    python train_transformer.py             # from runs/shapes/vqgan.pt: 10 minutes on two cores
    python train_transformer.py --resume         # go on after an interruption
    python train_transformer.py --decoder autoregressive        # the raster-scan baseline
    torchrun --nproc_per_node 8 train_transformer.py --data imagenet --cache-tokens 10

Writes runs/NAME/transformer.pt (or autoregressive.pt), a log, its curves and the latest samples.
"""
import argparse
from dataclasses import replace

import torch
from torch import Tensor

from lib import flags, optim, plans
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
from lib.judge import JUDGE_FLAGS, Judge
from lib.loader import training_batches
from lib.log import Log
from lib.pictures import draw_log, grid, save_image, to_uint8
from lib.run import Run, command, initial_model
from lib.runtime import Machine, launch
from lib.sampling import MODELS, STAGES, default_guidance, rand_of_images
from lib.tokens import CachedTokens, FrozenTokenizer
from maskgit import (
    SCHEDULES,
    MaskGIT,
    MaskGITConfig,
    by_confidence,
    decode,
    drop_labels,
    mask_tokens,
    masked_accuracy,
    mvtm_loss,
)
from sequential import CausalTransformer, decode_sequential
from vqgan import VQGAN, as_grid

# Each flag: its type; its value for `shapes` (a CPU), `cifar10` (a GPU), `imagenet` (the paper's);
# its help.
FLAGS = {
    "dim": (count, 128, 384, 768, "width of the transformer; its MLPs are 4 times as wide"),
    "depth": (count, 4, 12, 24, "number of layers"),
    "heads": (count, 4, 6, 8, "number of attention heads"),
    "dropout": (fraction, 0.0, 0.1, 0.1, "dropout probability"),
    "schedule": (SCHEDULES, "cosine", "cosine", "cosine", "mask schedule in training"),
    "label_smoothing": (fraction, 0.0, 0.0, 0.1, "label smoothing of the loss"),
    "class_dropout": (fraction, 0.1, 0.1, 0.0, "fraction of labels to drop, for guided decoding"),
    "choice_temperature": (non_negative, 1.0, 4.5, 4.5,
                           "noise in the choice of which tokens to keep: in previews, and where "
                           "sample.py and others are not given another"),
    "steps": (count, 4000, 60_000, 1_501_000, "training steps"),             # imagenet: 300 epochs
    "batch": (count, 64, 256, 256, "images in a step, over all devices"),
    "micro_batch": (count, None, None, 64, "images in memory at once on each device"),
    "optimizer": (["muon", "adamw"], "muon", "muon", "adamw",
                  "for the matrices of the blocks; everything else uses AdamW"),
    "muon_lr": (non_negative, 0.02, 0.02, 0.02, "learning rate of Muon"),
    "lr": (non_negative, 4e-3, 2e-3, 1e-4, "learning rate of AdamW (betas 0.9, 0.96)"),
    "weight_decay": (non_negative, 0.045, 0.045, 0.045, "weight decay of both optimizers"),
    "warmup": (whole, 100, 1000, 5000, "steps of linear warm-up"),
    "decay": (yes_or_no, True, True, False, "yes: cosine decay to 1%%; no: a constant rate"),
    "ema": (fraction, 0.995, 0.9995, 0.999, "decay of the averaged weights"),
    "cache_tokens": (whole, 1, 4, 0, "encode so many views of each image in advance; 0: none"),
    "log_every": (count, 50, 50, 50, "steps between log lines"),
    "picture_every": (count, 500, 1000, 5000, "steps between validations, with a picture"),
    "save_every": (count, 500, 1000, 5000, "steps between checkpoints"),
}
PRESETS = flags.presets(FLAGS, {
    "folder": ("shapes", {"cache_tokens": 10, "choice_temperature": 4.5}),
    "places2": ("imagenet", {"steps": 1_409_000}),
})
# A resumed run may change every flag but these: weights and tokens depend on them.
FIXED = {
    "data", "init", "classes", "image_size", "tokenizer", "dim", "depth", "heads",
    "class_dropout > 0", "optimizer",
}


def train(args: argparse.Namespace, machine: Machine) -> None:  # noqa: C901 (long, but flat)
    """Trains the transformer, from the flags to the finished run."""
    stage = STAGES[args.decoder]
    sequential = args.decoder == "autoregressive"
    refuse_useless_flags(args)
    num_micro_batches = optim.count_micro_batches(args.batch, args.micro_batch, machine.devices)
    if args.dry_run:
        codebook_size, num_tokens, num_classes = plans.planned_tokens(args)
        config = configuration(args, codebook_size, num_tokens, num_classes)
        plans.print_transformer_plan(args, machine, MODELS[stage](config), num_micro_batches)
        return

    # The tokenizer of stage 1, the run's folder, the data.
    admit_pixels(args.max_pixels)
    args.data = resolve_data(args.data)
    check_run_outside_data(args.run, args.data)
    run_tokenizer = args.run / "vqgan.pt"       # so that sampling needs nothing but the run
    encode_batch = min(64, args.batch // machine.world // num_micro_batches)
    tokenizer = FrozenTokenizer(
        args.vqgan or run_tokenizer, VQGAN, args.image_size, encode_batch, machine)
    run = Run(stage, args, machine)
    if args.vqgan and not args.overwrite and machine.leads:
        tokenizer.check_same_as(run_tokenizer)
    with machine.first_rank_first():
        fetch_data(args.data, tokenizer.image_size, args.data_dir)
    train_images, val = open_data(args.data, tokenizer.image_size, args.data_dir)
    classes = list(train_images.classes)
    config = configuration(args, tokenizer.codebook_size, tokenizer.num_tokens, len(classes))
    metadata = {                                            # stored beside the weights for use
        "data": args.data,
        "classes": classes,
        "image_size": tokenizer.image_size,
        "tokenizer": tokenizer.fingerprint,
    }
    run.note_settings(metadata | {"class_dropout > 0": config.null_class}, FLAGS)
    if run.state is not None:
        run.state["settings"].setdefault("choice_temperature", 4.5)     # before runs recorded it
    run.compare_with_saved(FIXED)
    if run.step >= args.steps:
        run.say(f"{run.folder} is already at step {run.step}: raise --steps to train on")
        return

    # The model, its average, its optimizers.
    torch.manual_seed(args.seed)
    model = MODELS[stage](config)
    if args.init:
        load_pretrained(args, model, tokenizer.fingerprint, classes)
    flops = plans.transformer_flops(model)
    model = machine.place(model)
    ema = optim.averaged(model)
    optimizers = optim.transformer_optimizers(
        model, args.optimizer, args.lr, args.muon_lr, args.weight_decay, machine)
    resumable = {"model": model, "ema": ema, **optimizers}
    run.restore(resumable)
    ddp_model = machine.wrap(model, model.blocks)
    run.say(f"{run.folder}: {optim.count_parameters(model) / 1e6:.2f} M parameters, "
            f"{config.num_tokens} tokens of {config.codebook_size}, {len(classes)} classes, "
            f"on {machine.device} x {machine.devices}")
    judge = None
    if args.evaluate_every:
        judge = Judge(args, machine, train_images, val, run.folder)

    # Images become tokens: all of them now, or each batch as it comes.
    train_set = train_images
    if args.cache_tokens:
        folder = run.folder / "tokens" / tokenizer.fingerprint
        train_set = CachedTokens(
            folder, train_images, args.cache_tokens, config.num_tokens, config.codebook_size)
        train_set.encode(tokenizer.encode, machine, args.workers)
        machine.wait_for_ranks()
    val_images, val_labels = evenly_spaced(val, 512)
    val_tokens = tokenizer.encode(val_images).cpu()

    # All is checked: only now may this run replace another one (--overwrite).
    run.discard_former()
    if args.vqgan and machine.leads:
        tokenizer.copy_to(run_tokenizer)

    decay_until = args.steps if args.decay else None
    log = Log(run, flops)
    run.catch_signals()
    stream = training_batches(
        train_set, args.batch, args.seed, run.step, args.steps, args.workers, machine)
    for step, (inputs, labels) in enumerate(stream, start=run.step):    # images, or their tokens
        # Every random draw is a function of (seed, step, rank).
        generator = machine.seed_step(args.seed, step)
        for optimizer in optimizers.values():
            optim.set_learning_rate(optimizer, step, args.warmup, decay_until)

        # The batch: tokens, of which some are masked (§3.1).
        if args.cache_tokens:
            tokens = machine.put(inputs, of_this_rank=True).long()                  # (B, N)
        else:
            tokens = tokenizer.encode(inputs, of_this_rank=True).long()
        labels = machine.put(labels, of_this_rank=True)                             # (B,)
        if config.null_class:
            labels = drop_labels(labels, args.class_dropout, model.null_label, generator)
        if sequential:                  # each position sees those before it; all tokens are targets
            visible = tokens
            mask = torch.ones_like(tokens, dtype=torch.bool)
        else:
            visible, mask = mask_tokens(tokens, args.schedule, model.mask_id, generator)

        # The gradients of Eq. 1, summed over micro-batches.
        ddp_model.zero_grad(set_to_none=True)
        parts = optim.micro_batches(len(tokens), num_micro_batches)
        for part in parts:
            with machine.micro_batch(ddp_model, last=part is parts[-1]):
                with machine.autocast():
                    logits = ddp_model(visible[part], labels[part])                 # (b, N, K)
                    loss = mvtm_loss(logits, tokens[part], mask[part], args.label_smoothing)
                (loss / num_micro_batches).backward()
            log.add(loss=loss, accuracy=masked_accuracy(logits, tokens[part], mask[part]))

        # The update of the weights and of their average.
        gradient_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers.values():
            optimizer.step()
        optim.update_average(ema, model, args.ema, step)
        log.add(gradient=gradient_norm)
        machine.sync()

        # Now and then: save first, stop if a signal asked for it, validate, draw, measure, log.
        done = step + 1
        stopping = run.should_stop(done)
        saving = run.due(done, args.save_every)
        drawing = run.due(done, args.picture_every)
        judging = run.due(done, args.evaluate_every)
        if stopping or saving or judging:
            log.check_finite(done)
        if stopping or saving:
            run.save(done, resumable, metadata)
        if stopping:
            log.write(done)
            run.exit(done)
        figures = {}
        if drawing:
            figures = validation(args, ema, val_tokens, val_labels, machine)
            save_preview(run, ema, tokenizer, classes, machine)
        if judging:
            distance = judge.distance(
                lambda labels, numbers: draw(ema, tokenizer, labels, numbers, machine))
            figures[judge.name] = distance
            measure = f"{judge.measure}, choice temperature {config.choice_temperature:g}"
            run.keep_best(done, distance, measure, ema, metadata)
        if drawing or judging or saving or run.due(done, args.log_every):
            log.write(done, **figures)
        if drawing and machine.leads:
            draw_log(run.curve, run.log_file)
    run.say(f"wrote {run.model_file}; look at {run.picture}. Next: {next_command(args)}")


def refuse_useless_flags(args: argparse.Namespace) -> None:
    """Raises UserError for flags that change nothing beside others that were given."""
    if args.decoder == "autoregressive":
        useless = ["schedule", "choice_temperature"]
        if args.class_dropout > 0:
            useless.append("class_dropout")
        flags.refuse_useless(args, useless, "with --decoder autoregressive")
    if args.optimizer == "adamw":
        flags.refuse_useless(args, ["muon_lr"], "with --optimizer adamw")
    if not args.evaluate_every:
        useless = [name for name in JUDGE_FLAGS if name != "evaluate_every"]
        flags.refuse_useless(args, useless, "without --evaluate-every")


def next_command(args: argparse.Namespace) -> str:
    """Returns the command that draws samples from the trained model."""
    words = ["--run", args.run]
    if args.decoder != "parallel":
        words += ["--decoder", args.decoder]
    return command("sample.py", *words)


def configuration(
    args: argparse.Namespace, codebook_size: int, num_tokens: int, num_classes: int,
) -> MaskGITConfig:
    """Returns the configuration that follows from the flags, the tokenizer and the data.

    With --init, the sizes are those of that run. Raises UserError for a width that the heads do
    not divide."""
    guided = args.class_dropout > 0 and args.decoder == "parallel"
    if args.init:
        pretrained, _ = open_pretrained(args)
        return replace(pretrained.config, num_classes=num_classes, num_tokens=num_tokens,
                       dropout=args.dropout, null_class=guided,
                       choice_temperature=args.choice_temperature)
    if args.dim % args.heads:
        raise UserError(f"--dim {args.dim} is not divisible by --heads {args.heads}: choose a "
                        f"multiple")
    return MaskGITConfig(
        codebook_size=codebook_size,
        num_classes=num_classes,
        num_tokens=num_tokens,
        dim=args.dim,
        depth=args.depth,
        heads=args.heads,
        mlp_dim=4 * args.dim,
        dropout=args.dropout,
        null_class=guided,
        choice_temperature=args.choice_temperature,
    )


def load_pretrained(
    args: argparse.Namespace, model: MaskGIT, fingerprint: str, classes: list[str],
) -> None:
    """Copies the weights of the run named by --init into a model of the same sizes.

    The embeddings of classes are copied only if both runs have the same classes. Raises UserError
    if that run has another tokenizer or another number of tokens."""
    pretrained, checkpoint = open_pretrained(args)
    if checkpoint["tokenizer"] != fingerprint:
        raise UserError(f"{args.init} has another tokenizer: add --vqgan {args.init}/vqgan.pt")
    if pretrained.config.num_tokens != model.config.num_tokens:
        raise UserError(f"{args.init} draws {pretrained.config.num_tokens} tokens, not "
                        f"{model.config.num_tokens}: add --image-size {checkpoint['image_size']}")
    weights = pretrained.state_dict()
    codes = model.config.codebook_size
    for name in ("token_embedding.weight", "head_bias"):
        rows = model.state_dict()[name].clone()
        rows[:codes] = weights[name][:codes]
        rows[model.mask_id] = weights[name][pretrained.mask_id]
        if checkpoint["classes"] == classes:
            rows[codes:model.mask_id] = weights[name][codes:pretrained.mask_id]
        if model.config.null_class and pretrained.config.null_class:
            rows[-1] = weights[name][-1]
        weights[name] = rows
    model.load_state_dict(weights)


def open_pretrained(args: argparse.Namespace) -> tuple[MaskGIT, dict]:
    """Returns the transformer of the run named by --init, and its checkpoint."""
    stage = STAGES[args.decoder]
    return rebuild(initial_model(args, stage), stage, MODELS[stage])


@torch.no_grad()
def validation(
    args: argparse.Namespace, model: MaskGIT, tokens: Tensor, labels: Tensor, machine: Machine,
) -> dict[str, float]:
    """Returns the loss as in training, and a bound on the negative log-likelihood; masks are fixed.

    tokens: (n, N), labels: (n,), on the CPU. Under the linear schedule all mask ratios are equally
    frequent, and the mean loss bounds -log p(tokens) / N in nats (Uria et al. 2014). So it can be
    compared with the loss of the autoregressive decoder."""
    loss = masked_loss(args, model, tokens, labels, args.schedule, args.label_smoothing, machine)
    nll = masked_loss(args, model, tokens, labels, "linear", 0.0, machine)
    return {"val_loss": loss, "val_nll": nll}


def masked_loss(
    args: argparse.Namespace, model: MaskGIT, tokens: Tensor, labels: Tensor,
    schedule: str, label_smoothing: float, machine: Machine,
) -> float:
    """Returns the mean of Eq. 1 over validation tokens, masked with a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    losses = []
    for targets, classes in zip(tokens.split(64), labels.split(64), strict=True):
        targets = machine.put(targets)
        visible = targets
        mask = torch.ones_like(targets, dtype=torch.bool)
        if not isinstance(model, CausalTransformer):
            visible, mask = mask_tokens(targets, schedule, model.mask_id, generator)
        with machine.autocast():
            logits = model(visible, machine.put(classes))
            loss = mvtm_loss(logits, targets, mask, label_smoothing)
        losses.append(loss.cpu() * len(targets))
    return torch.stack(losses).sum().item() / len(tokens)


@torch.no_grad()
def draw(
    model: MaskGIT, tokenizer: FrozenTokenizer, labels: Tensor, numbers: Tensor, machine: Machine,
) -> Tensor:
    """Draws samples as sample.py does with seed 0: uint8 images (n, 3, S, S).

    labels, numbers: (n,) on the CPU, the class of each image and its number within the class."""
    rand = rand_of_images(0, labels, numbers, machine)
    labels = machine.put(labels)
    with machine.autocast():
        if isinstance(model, CausalTransformer):
            tokens = decode_sequential(model, labels, rand=rand)
        else:
            steps = model.config.default_steps
            order = by_confidence(model.config.choice_temperature)
            tokens = decode(
                model, labels, steps, order=order, cfg=default_guidance(model), rand=rand)
        # Eight at a time: at full resolution the decoder needs more memory than the transformer.
        images = [to_uint8(tokenizer.model.decode(part)) for part in as_grid(tokens).split(8)]
    return torch.cat(images)


def save_preview(
    run: Run, model: MaskGIT, tokenizer: FrozenTokenizer, classes: list[str], machine: Machine,
) -> None:
    """Writes a picture of samples: a row of eight for each of the first ten classes."""
    shown = torch.arange(min(10, len(classes)))
    labels = shown.repeat_interleave(8)
    numbers = torch.arange(8).repeat(len(shown))
    images = draw(model, tokenizer, labels, numbers, machine)
    machine.sync()
    if machine.leads:
        save_image(run.picture, grid((images.cpu() / 255).split(8), classes[:len(shown)]))


def main() -> None:
    args = flags.parse_training_flags(__doc__, FLAGS, PRESETS, {
        "decoder": (list(STAGES), "parallel", "autoregressive: predict the next token"),
        "vqgan": (str, None, "tokenizer file (default: vqgan.pt in the run's folder)"),
        "image_size": (count, None, "pixels along each side (default: the tokenizer's)"),
        **JUDGE_FLAGS,
        **DATA_FLAGS,
    })
    launch(train, args, training_steps=args.steps)


if __name__ == "__main__":
    command_line(main)
