"""Measures a trained run as the paper does: its rows in Tables 1, 2 and 3, and Figure 8.

    python evaluate.py --run runs/shapes              # Table 1; without --run, of the newest run
    python evaluate.py --num 50000 --features inception         # FID and IS as in the literature
    python evaluate.py --manipulate                   # Table 2: outpainting and inpainting
    python evaluate.py --ablate                       # Table 3: seven mask schedules, several T
    python evaluate.py --sweep choice_temperature     # one setting of the sampler
    torchrun --nproc_per_node 8 -- evaluate.py --run runs/imagenet --num 50000 --features inception

A distance between features of the classifier is called FCD, never FID. Results are written to
eval.json in the run's folder as they come, and are reused when the script is started again.
"""
import argparse
import functools
import math
import os
import platform
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lib import features, flags, metrics, pictures, runtime, sets, terminal
from lib.data import DATA_FLAGS, admit_pixels, open_data
from lib.features import BY_CLASS, RECOGNISED, SHARPNESS, Measurements, Networks, Reference
from lib.files import fingerprint, rebuild
from lib.flags import UserError
from lib.results import Results
from lib.sampling import add_run_flags, add_sampler_flags, load_run, sampler_options
from lib.sets import Batch, ImageSet, random_subset, read_batches
from maskgit import ORDERS, SCHEDULES, MaskGIT, decode, decode_sequential, mask_tokens, mvtm_loss
from vqgan import VQGAN, as_grid, to_pixels

NEXT_TOKEN = "next token"
LIKELIHOODS = """\
negative log-likelihood per token in nats, by mask schedule
("linear" is an upper bound on -log p(image) / tokens, "next token" is exact; the bound of the parallel
decoder would be as low if its predictions were as good)"""
BINS = 20                       # of mask ratios
IN_MEMORY = 1 << 30             # bytes of images that are kept in memory for CAS
DEVIATION = "± over seeds"
SWEEPS = {
    "choice_temperature": [0, 1, 2, 4.5, 8, 12],
    "temperature": [0.6, 0.7, 0.8, 0.9, 1, 1.1],
    "cfg": [0, 0.5, 1, 2, 4],
    "order": list(ORDERS),
}


@dataclass
class Evaluation:
    """The run that is measured, and what it is measured with."""
    args: argparse.Namespace
    machine: runtime.Machine
    folder: Path                    # the run's
    tokenizer: VQGAN
    transformer: MaskGIT            # the one that draws
    sequential: MaskGIT | None      # the run's autoregressive transformer, which may be the same
    data: str                       # the name of the data set
    train: ImageSet
    real: ImageSet                  # validation images
    networks: Networks
    results: Results
    title: str

    @functools.cached_property
    def reference(self) -> Reference:
        """Returns the measured real images; they are measured when they are needed first."""
        batches = read_batches(self.real, self.args.batch)
        measured = self.networks.measure(batches, len(self.real), "real images")
        images, dimensions = measured.features.shape
        if self.machine.leads and images <= dimensions:
            print(f"note: {images} images are too few for {dimensions} features: the "
                  f"{self.networks.distance} would be lower with more images", flush=True)
        return Reference(self.networks, measured)

    @property
    def parallel(self) -> MaskGIT | None:
        """Returns the transformer that draws if it is decoded in parallel."""
        return None if self.transformer is self.sequential else self.transformer


def evaluate(args: argparse.Namespace, machine: runtime.Machine) -> None:
    """Measures what the flags ask for, prints it and writes eval.json. Raises UserError."""
    run = open_evaluation(args, machine)
    if machine.leads:
        print(f"{run.title}, on {machine.device} x {machine.devices}", flush=True)
    tables = {}
    if args.manipulate:
        tables["manipulation"] = table2(run)
    if args.ablate:
        tables["ablation"] = table3(run)
    if args.sweep:
        tables["sweep"] = sweep(run)
    if not tables:
        tables = table1(run)
    run.results.write({
        "run": str(run.folder), "data": run.data, "seed": args.seed,
        "sampler": sampler_settings(args, run.transformer), **tables})
    if machine.leads:
        print(f"wrote {run.folder}/eval.json")


# ----------------------------------------------------------------------------------- the tables

def table1(run: Evaluation) -> dict:
    """Measures the run's row of Table 1, beside those of real training images and reconstructions.

    Returns {"rows": {name: row}, "stages": the figures of both stages}."""
    if run.machine.leads and run.args.num > features.PRECISION_IMAGES:
        print(f"note: precision and recall are of the first {features.PRECISION_IMAGES} images of each set")
    stages = measure_both_stages(run)
    rows = {
        "samples": row_of_samples(run, run.args, complete=True),
        "real training images": row_of_training_images(run),
        "reconstructions": stages["reconstructions"],
    }
    if run.machine.leads:
        print_table1(run, rows, stages)
        if "accuracy by mask ratio" in stages:
            points = stages["accuracy by mask ratio"]
            pictures.draw_accuracy(run.folder / "eval.accuracy.png", points)
    return {"rows": rows, "stages": stages}


def print_table1(run: Evaluation, rows: dict, stages: dict) -> None:
    """Prints what table1() measured."""
    compared = [name for name in (SHARPNESS, RECOGNISED) if name in rows["samples"]]
    columns = [name for name in rows["samples"] if name not in (*compared, BY_CLASS)]
    sampler = describe("sampler", sampler_settings(run.args, run.transformer), run.args.seed)
    terminal.print_table(f"{run.title}; {sampler}", rows, columns)
    terminal.print_table("sharpness and classes", rows, compared)
    figures = {name: value for name, value in stages.items() if isinstance(value, float)}
    terminal.print_table("tokenizer", {"": figures})
    terminal.print_table(LIKELIHOODS, {"": stages["NLL"]})
    if BY_CLASS in rows["samples"]:
        first = list(rows["samples"][BY_CLASS].items())[:20]
        terminal.print_table(f"samples: {BY_CLASS}", {"": dict(first)})


def table2(run: Evaluation) -> dict:
    """Measures outpainting and inpainting of validation images (§4.3), of which the class is given.

    Returns {name: row}."""
    side = math.isqrt(run.transformer.config.num_tokens)
    right = torch.zeros(side, side, dtype=torch.bool)
    right[:, side // 2:] = True
    centre = torch.zeros(side, side, dtype=torch.bool)
    centre[side // 4:side - side // 4, side // 4:side - side // 4] = True
    rows = {
        "outpainting, right 50%": row_of_repainted(run, "outpainting, right 50%", right),
        "inpainting, centre 50% x 50%": row_of_repainted(run, "inpainting, centre 50% x 50%", centre),
    }
    if run.machine.leads:
        terminal.print_table(run.title, rows)
    return rows


def table3(run: Evaluation) -> dict:
    """Measures every mask schedule at several T (§4.4) and draws Figure 8.

    Returns {schedule: row at its best T}, the best schedule first."""
    distance = run.networks.distance
    nll = measure_both_stages(run)["NLL"]
    curves = {}
    rows = {}
    for schedule in SCHEDULES:
        curve = {}
        for steps in sorted(set(run.args.ablate_steps)):
            if steps <= run.transformer.config.num_tokens:
                curve[steps] = mean_over_seeds(run, schedule=schedule, steps=steps)
        best = min(curve, key=lambda steps, curve=curve: curve[steps][distance])
        rows[schedule] = {"T": best, **curve[best], "NLL": nll[schedule]}
        curves[schedule] = curve
    rows = dict(sorted(rows.items(), key=lambda item: item[1][distance]))
    if run.machine.leads:
        print_curves(f"{distance} ± deviation over {run.args.seeds} seeds", curves, distance)
        pictures.draw_curves(run.folder / "eval.ablation.png", curves, "T, decoding steps",
                             distance, DEVIATION)
        terminal.print_table(f"{run.title}; each schedule at its best T", rows)
    return rows


def print_curves(title: str, curves: dict, distance: str) -> None:
    """Prints {schedule: {T: row}} as a table of distances with a column for every T."""
    table = {}
    for schedule, curve in curves.items():
        table[schedule] = {}
        for steps, row in curve.items():
            table[schedule][f"T={steps}"] = f"{row[distance]:.4g} ± {row[DEVIATION]:.2g}"
    terminal.print_table(title, table)


def sweep(run: Evaluation) -> dict:
    """Measures one setting of the sampler at each of its values. Returns {value: row}."""
    name = run.args.sweep
    curve = {value: mean_over_seeds(run, **{name: value}) for value in SWEEPS[name]}
    rows = {str(value): row for value, row in curve.items()}
    if run.machine.leads:
        pictures.draw_curves(run.folder / f"eval.{name}.png", {name: curve}, name,
                             run.networks.distance, DEVIATION)
        terminal.print_table(f"{run.title}; {name}", rows)
    return rows


def mean_over_seeds(run: Evaluation, **changes: Any) -> dict:
    """Measures samples of --seeds seeds, with some of the sampler's flags changed.

    Returns a row of the mean distance and its deviation, and of the mean score."""
    distance = run.networks.distance
    score = run.networks.score
    rows = []
    for seed in range(run.args.seed, run.args.seed + run.args.seeds):
        rows.append(row_of_samples(run, changed(run.args, seed=seed, **changes)))
    distances = [row[distance] for row in rows]
    return {
        distance: statistics.fmean(distances),
        DEVIATION: statistics.stdev(distances) if len(rows) > 1 else 0.0,
        score: statistics.fmean(row[score] for row in rows),
    }


# ------------------------------------------------------------------------------------- the rows

def row_of_samples(run: Evaluation, args: argparse.Namespace, complete: bool = False) -> dict:
    """Measures --num samples, drawn with the sampler's flags in `args`.

    complete: with precision, recall and CAS, as in Table 1."""
    title = "samples for Table 1" if complete else "samples"
    condition = describe(title, sampler_settings(args, run.transformer), args.seed)
    if condition in run.results.known:
        return run.results.known[condition]
    tokens = draw_tokens(run, args, condition)
    samples = Samples(tokens, run)
    measured = run.networks.measure(read_batches(samples, args.batch), len(samples), "samples")
    row = run.reference.figures(measured)
    if complete:
        row |= precision_recall_and_cas(run, measured, samples)
    return run.results.keep(condition, row)


def row_of_training_images(run: Evaluation) -> dict:
    """Measures --num real training images as if they were samples: the best that can be reached."""
    condition = describe("real training images", {}, run.args.seed)
    if condition in run.results.known:
        return run.results.known[condition]
    images = random_subset(run.train, run.args.num)
    batches = read_batches(images, run.args.batch)
    measured = run.networks.measure(batches, len(images), condition)
    row = run.reference.figures(measured)
    row |= precision_recall_and_cas(run, measured, images)
    return run.results.keep(condition, row)


def precision_recall_and_cas(run: Evaluation, measured: Measurements, images: ImageSet) -> dict:
    """Returns more columns of Table 1 for `images`.

    CAS is the accuracy on real images of a classifier that was trained on these images alone
    (Ravuri & Vinyals 2019). Rank 0 alone measures it, since the others would find the same."""
    args = run.args
    row = {}
    row["precision"], row["recall"] = run.reference.precision_recall(measured)
    if args.classifier_steps and run.machine.leads:
        example, _ = images.batch(np.arange(1))
        if len(images) * example.numel() < IN_MEMORY:
            images = sets.InMemory(images)
        model = features.train_classifier(images, args.classifier_steps, args.seed, run.machine, "CAS")
        row["CAS top-1"], row["CAS top-5"] = features.accuracy(model, run.real, run.machine)
    return row


def row_of_repainted(run: Evaluation, title: str, region: Tensor) -> dict:
    """Measures validation images in which a region (h, w) of tokens, boolean, is drawn anew."""
    condition = describe(title, sampler_settings(run.args, run.transformer), run.args.seed)
    if condition in run.results.known:
        return run.results.known[condition]
    measured = run.networks.measure(repainted_batches(run, region), len(run.real), condition)
    return run.results.keep(condition, run.reference.figures(measured))


# ------------------------------------------------------------------------------- drawing images

def draw_tokens(run: Evaluation, args: argparse.Namespace, title: str) -> Tensor:
    """Draws the tokens (num, N) int32 of --num samples, the classes in turn, on all ranks.

    Every batch has its own generator, so the samples are the same on any number of ranks."""
    config = run.transformer.config
    sampler = decode_sequential if config.causal else decode
    options = sampler_options(args, config)
    progress = terminal.Progress(title, args.num)
    done = 0
    own = []
    for number in sets.own_batches(args.num, args.batch):
        labels = sets.labels_in_turn(number, args.batch, args.num, config.num_classes)
        generator = run.machine.generator(runtime.step_seed(args.seed, number))
        with run.machine.autocast():
            tokens = sampler(run.transformer, run.machine.put(labels), generator=generator, **options)
        run.machine.sync()
        own.append(tokens.to("cpu", torch.int32))
        done += len(labels) * sets.ranks()
        if run.machine.leads:
            progress.show(min(done, args.num))
    return torch.cat(sets.gather_batches(own))


class Samples:
    """Samples as a data set: the tokens (n, N), which are decoded when they are read."""
    workers = 0

    def __init__(self, tokens: Tensor, run: Evaluation):
        self.tokens = tokens
        self.run = run
        self.classes = run.train.classes

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(self, indices: np.ndarray, draws: Any = None) -> tuple[Tensor, Tensor]:
        """Returns images uint8 (n, 3, S, S) and the labels (n,) that they were drawn for."""
        images = to_images(self.run, self.tokens[indices].long())
        return images.cpu(), torch.from_numpy(indices) % len(self.classes)


@torch.no_grad()
def to_images(run: Evaluation, tokens: Tensor) -> Tensor:
    """Decodes tokens (n, N) to images uint8 (n, 3, S, S), as they would be in a file."""
    with run.machine.autocast():
        images = run.tokenizer.decode(as_grid(run.machine.put(tokens)))
    images = pictures.to_uint8(images)
    run.machine.sync()
    return images


@torch.no_grad()
def repainted_batches(run: Evaluation, region: Tensor):
    """Yields this rank's batches of validation images in which a region is drawn anew.

    region: (h, w) boolean, true where the tokens are drawn, for the true class of each image."""
    region = region.to(run.machine.device)
    pixels = to_pixels(region, run.tokenizer.config.stride)                         # (S, S)
    options = sampler_options(run.args, run.transformer.config)
    for number, images, labels in read_batches(run.real, run.args.batch):
        images = run.machine.put(images)
        generator = run.machine.generator(runtime.step_seed(run.args.seed, number))
        with run.machine.autocast():
            known = run.tokenizer.encode(run.machine.to_floats(images)).flatten(1)
            known = torch.where(region.flatten(), run.transformer.mask_id, known)
            tokens = decode(run.transformer, run.machine.put(labels), known=known,
                            generator=generator, **options)
        repainted = torch.where(pixels, to_images(run, tokens), images)
        run.machine.sync()
        yield Batch(number, repainted.cpu(), labels)


# ------------------------------------------------------------------- both stages on real images

class StageMeasurements(NamedTuple):
    """What was measured of both stages on validation images: tensors on the CPU, a row an image."""
    tokens: Tensor          # (n, N)
    psnr: Tensor            # (n,), of the reconstruction
    nll: Tensor             # (n, L), the mean of the image's batch under each of the L likelihoods
    right: Tensor           # (n, schedules), how many masked tokens were predicted right
    masked: Tensor          # (n, schedules), how many were masked


def measure_both_stages(run: Evaluation) -> dict:
    """Measures both stages on validation images.

    Returns figures of the tokenizer; under "reconstructions" a row of Table 1; under "NLL" the
    likelihood of tokens by schedule (Table 3); under "accuracy by mask ratio" a list of [mask
    ratio, share of the masked tokens that are predicted right], if the decoder is a parallel one.
    """
    condition = describe("both stages", {}, run.args.seed)
    if condition in run.results.known:
        return run.results.known[condition]
    progress = terminal.Progress(condition, len(run.real))
    done = 0
    own = []
    own_restored = []
    for batch in read_batches(run.real, run.args.batch):
        measured, restored = measure_stages_of_batch(run, batch)
        own.append(measured)
        own_restored.append(run.networks.measure_batch(restored, batch.labels))
        done += len(batch.images) * sets.ranks()
        if run.machine.leads:
            progress.show(min(done, len(run.real)))
    columns = zip(*sets.gather_batches(own), strict=True)
    measured = StageMeasurements(*(torch.cat(column) for column in columns))
    restored = features.concatenate(sets.gather_batches(own_restored))
    return run.results.keep(condition, stage_figures(run, measured, restored))


@torch.no_grad()
def measure_stages_of_batch(run: Evaluation, batch: Batch) -> tuple[StageMeasurements, Tensor]:
    """Measures both stages on a batch. Returns also the reconstructions, uint8 (n, 3, S, S)."""
    floats = run.machine.to_floats(batch.images)
    labels = run.machine.put(batch.labels)
    with run.machine.autocast():
        tokens = run.tokenizer.encode(floats).flatten(1)                            # (n, N)
        restored = run.tokenizer.decode(as_grid(tokens)).float()
    psnr = metrics.psnr(floats, restored)
    seed = runtime.step_seed(run.args.seed, batch.number)
    generator = torch.Generator().manual_seed(seed)
    likelihoods, right, masked = measure_predictions(run, tokens, labels, generator)
    nll = likelihoods.expand(len(tokens), -1)       # so that the mean over images is the mean
    run.machine.sync()
    measured = StageMeasurements(tokens.cpu(), psnr.cpu(), nll.cpu(), right.cpu(), masked.cpu())
    return measured, pictures.to_uint8(restored)


def measure_predictions(run: Evaluation, tokens: Tensor, labels: Tensor,
                        generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Predicts masked tokens under every schedule, and the next token if the run can.

    tokens: (n, N). labels: (n,). Returns the mean losses in the order of likelihood_names(), and
    how many tokens of each image are predicted right, and masked, (n, schedules)."""
    losses = []
    right = []
    masked = []
    if run.parallel:
        for schedule in SCHEDULES:
            visible, mask = mask_tokens(tokens, schedule, run.parallel.mask_id, generator)
            with run.machine.autocast():
                logits = run.parallel(visible, labels)                              # (n, N, codes)
            losses.append(mvtm_loss(logits, tokens, mask, label_smoothing=0))
            right.append(((logits.argmax(-1) == tokens) & mask).sum(1))
            masked.append(mask.sum(1))
    if run.sequential:
        with run.machine.autocast():
            logits = run.sequential(tokens, labels)
        every_token = torch.ones_like(tokens, dtype=torch.bool)
        losses.append(mvtm_loss(logits, tokens, every_token, label_smoothing=0))
    if not run.parallel:
        nothing = torch.zeros(len(tokens), 0, dtype=torch.long)
        return torch.stack(losses).double(), nothing, nothing
    return torch.stack(losses).double(), torch.stack(right, 1), torch.stack(masked, 1)


def likelihood_names(run: Evaluation) -> list[str]:
    """Returns what the columns of StageMeasurements.nll are of."""
    names = list(SCHEDULES) if run.parallel else []
    if run.sequential:
        names.append(NEXT_TOKEN)
    return names


def stage_figures(run: Evaluation, measured: StageMeasurements, restored: Measurements) -> dict:
    """Returns what measure_both_stages() does, from the measurements of all images."""
    entries = run.tokenizer.config.codebook_size
    used = torch.bincount(measured.tokens.flatten(), minlength=entries) / measured.tokens.numel()
    figures = {
        "PSNR, dB": measured.psnr.mean().item(),
        "codebook usage": (used > 0).double().mean().item(),
        "codebook perplexity": torch.exp(-torch.xlogy(used, used).sum()).item(),
        "NLL": dict(zip(likelihood_names(run), measured.nll.mean(0).tolist(), strict=True)),
        "reconstructions": run.reference.figures(restored),
    }
    if run.parallel:
        figures["accuracy by mask ratio"] = accuracy_by_mask_ratio(
            measured.right.flatten(), measured.masked.flatten(), measured.tokens.shape[1])
    return figures


def accuracy_by_mask_ratio(right: Tensor, masked: Tensor, num_tokens: int) -> list[list[float]]:
    """Returns a list of [mask ratio, share of the masked tokens that were predicted right].

    right, masked: numbers of tokens of each image (n,). Images are put together whose ratios are
    up to 1/20, up to 2/20, and so on."""
    edges = num_tokens * torch.arange(1, BINS + 1)
    bins = torch.bucketize(masked * BINS, edges)
    points = []
    for number in range(BINS):
        inside = bins == number
        if inside.any():
            ratio = masked[inside].double().mean() / num_tokens
            accuracy = right[inside].sum().double() / masked[inside].sum()
            points.append([round(ratio.item(), 4), accuracy.item()])
    return points


# ------------------------------------------------------------------------------- flags and files

def describe(title: str, settings: dict, seed: int) -> str:
    """Returns a condition: what is measured, and with which settings."""
    words = [f"{name}={value}" for name, value in settings.items()]
    return " ".join([title, *words, f"seed={seed}"])


def changed(args: argparse.Namespace, **changes: Any) -> argparse.Namespace:
    """Returns the flags with some of them changed."""
    return argparse.Namespace(**{**vars(args), **changes})


def sampler_settings(args: argparse.Namespace, model: MaskGIT) -> dict:
    """Returns the sampler's flags as plain values, of those that the model's sampler has."""
    settings = {"temperature": args.temperature, "top_k": args.top_k}
    if not model.config.causal:
        options = sampler_options(args, model.config)
        settings["steps"] = options["steps"]
        settings["schedule"] = args.schedule
        settings["choice_temperature"] = args.choice_temperature
        settings["cfg"] = options["cfg"]
        settings["order"] = args.order
    return settings


def open_evaluation(args: argparse.Namespace, machine: runtime.Machine) -> Evaluation:
    """Opens the models, the data, the networks and the results. Raises UserError."""
    folder, tokenizer, transformer, checkpoint = load_run(
        args.run, machine, VQGAN, MaskGIT, args.vqgan, args.decoder)
    check_flags(args, machine, transformer)
    sequential = load_sequential(folder, transformer, checkpoint, machine)
    admit_pixels(args.max_pixels)
    data = checkpoint["data"]
    train, val = open_data(data, checkpoint["image_size"], args.data_dir)
    if list(train.classes) != list(checkpoint["classes"]):
        raise UserError(f"the {len(train.classes)} classes of {data} are not those that the run "
                        f"{folder} was trained on: put the same images there")
    real = random_subset(val, args.num)
    if len(real) <= metrics.NEIGHBOURS:
        raise UserError(f"--num {args.num} takes {len(real)} of the {len(val)} validation images of "
                        f"{data}: precision and recall need at least {metrics.NEIGHBOURS + 1}")
    networks = features.open_networks(args, machine, train, folder)
    setup = {
        "tokenizer": fingerprint(tokenizer),
        "transformer": fingerprint(transformer),
        "sequential transformer": fingerprint(sequential) if sequential else None,
        "features": networks.name,
        "generated images": args.num,
        "real images": len(real),
        "batch": args.batch,
        "classifier steps": args.classifier_steps,
        "device": machine.device.type,
        "bf16": machine.bf16,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }
    results = Results(folder / "eval.json", setup, writes=machine.leads, again=args.again)
    title = (f"{folder}: {args.num} generated and {len(real)} real validation images, "
             f"{args.features} features, seed {args.seed}")
    return Evaluation(args, machine, folder, tokenizer, transformer, sequential, data, train, real,
                      networks, results, title)


def check_flags(args: argparse.Namespace, machine: runtime.Machine, transformer: MaskGIT) -> None:
    """Raises UserError, before anything takes long, for flags that the transformer cannot follow.
    """
    config = transformer.config
    if config.causal:
        if args.ablate or args.sweep or args.manipulate:
            raise UserError("--ablate, --sweep and --manipulate need a parallel decoder: "
                            "add --decoder parallel")
        return
    if args.ablate and min(args.ablate_steps) > config.num_tokens:
        raise UserError(f"--ablate-steps must be from 1 to the number of tokens, {config.num_tokens}")
    if args.sweep:
        args = changed(args, **{args.sweep: SWEEPS[args.sweep][-1]})
    with machine.autocast():
        decode(transformer, machine.put(torch.tensor([0])), **sampler_options(args, config))


def load_sequential(folder: Path, transformer: MaskGIT, checkpoint: dict,
                    machine: runtime.Machine) -> MaskGIT | None:
    """Returns the run's autoregressive transformer, if it has one of the same tokenizer."""
    path = folder / "autoregressive.pt"
    if transformer.config.causal:
        return transformer
    if not path.exists():
        return None
    sequential, its_checkpoint = rebuild(path, "autoregressive", MaskGIT)
    if its_checkpoint["tokenizer"] != checkpoint["tokenizer"]:
        return None
    return machine.freeze(sequential.to(machine.device))


def parse_flags(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line; arguments: other words in place of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_flags(parser)
    add_sampler_flags(parser, SCHEDULES, ORDERS)
    several = {"type": flags.count, "nargs": "+"}
    switch = {"action": "store_true"}
    flags.add_flags(parser, {
        **features.FEATURE_FLAGS,
        "num": (flags.whole, 2000, "images to draw, and to compare with; the paper: 50000"),
        "batch": (flags.count, 100, "images at a time"),
        "manipulate": (switch, None, "measure outpainting and inpainting of validation images"),
        "ablate": (switch, None, "measure every mask schedule at several T"),
        "ablate_steps": (several, [4, 8, 12, 16, 32, 64], "these T, for --ablate"),
        "sweep": (list(SWEEPS), None, "measure one setting of the sampler at several values"),
        "seeds": (flags.count, 3, "seeds, from --seed upwards, for --ablate and --sweep"),
        "again": (switch, None, "measure again what eval.json already holds"),
        **DATA_FLAGS,
    })
    flags.add_machine_flags(parser, compiles=False)
    return parser.parse_args(arguments)


def main() -> None:
    """Runs the script. Ctrl-C ends it with the status of a shell's interrupted command."""
    args = parse_flags()
    try:
        runtime.launch(evaluate, args)
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("\nstopped: the results so far are kept in eval.json in the run's folder; "
                  "run the same command again for the rest", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    flags.command_line(main)
