"""Measures a trained run as the paper does: its rows in Tables 1, 2 and 3, and Figure 8.

    python evaluate.py --run runs/shapes              # Table 1; without --run, of the newest run
    python evaluate.py --tokenizer runs/shapes        # the tokenizer, before there is a transformer
    python evaluate.py --num 50000 --features inception         # FID and IS as in the literature
    python evaluate.py --manipulate                   # Table 2: outpainting and inpainting
    python evaluate.py --ablate                       # Table 3: seven mask schedules, several T
    python evaluate.py --sweep choice_temperature     # one setting of the sampler
    torchrun --nproc_per_node 8 -- evaluate.py --run runs/imagenet --num 50000 --features inception

The distance between features of the classifier is called FCD, never FID. Results are written to
eval.json in the run's folder as they come, and are reused when the script is started again.
"""
import argparse
import math
import statistics
from typing import Any

import numpy as np
from torch import Tensor

from lib import features, flags, pictures, runtime, sets
from lib.data import DATA_FLAGS
from lib.editing import centre_region, outpaint_region
from lib.errors import command_line
from lib.features import BY_CLASS, PRECISION_IMAGES, RECOGNISED, SHARPNESS, Measurements
from lib.files import cache_folder
from lib.loader import DataSet
from lib.sampling import (
    ACCEPT_FLAG,
    DECODER_FLAG,
    RUN_FLAGS,
    add_sampler_flags,
    sampler_settings,
)
from lib.sets import random_subset, read_batches_of_rank
from lib.terminal import print_table
from maskgit import SCHEDULES
from measure import (
    SWEEPS,
    Evaluation,
    Samples,
    changed,
    draw_tokens,
    measure_validation_images,
    open_evaluation,
    repainted_batches,
    used_sampler_flags,
)

LIKELIHOODS = """\
negative log-likelihood per token in nats, with tokens masked under each schedule ("linear" bounds
-log p(image) / tokens from above, "next token" equals it: these two can be compared)"""
DEVIATION = "± over seeds"
IN_MEMORY = 1 << 30             # bytes of images that are kept in memory to train on, for CAS


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
    if args.tokenizer:
        tables["tokenizer"] = tokenizer_alone(run)
    if not tables:
        tables = table1(run)                                    # "rows" and "stages"
    run.results.write({"run": str(run.folder), "data": run.data, **settings_of(run), **tables})
    if machine.leads:
        print(f"wrote {run.folder}/eval.json")


def settings_of(run: Evaluation) -> dict:
    """Returns the settings that the tables are measured with, for eval.json."""
    settings = {"seed": run.args.seed}
    if run.args.ablate or run.args.sweep:
        settings["seeds"] = run.args.seeds              # so many, from "seed" upwards
    if not run.args.tokenizer:
        used = used_sampler_flags(run.args)
        of_sampler = sampler_settings(run.args, run.transformer)
        settings["sampler"] = {name: of_sampler[name] for name in of_sampler if name in used}
    return settings


# --------------------------------------------------------------------------------------- the tables

def table1(run: Evaluation) -> dict:
    """Measures the run's row of Table 1, beside those of real training images and reconstructions.

    Returns {"rows": {name: row}, "stages": validation_figures()}."""
    if run.machine.leads and run.args.num > PRECISION_IMAGES:
        print(f"note: precision and recall are of the first {PRECISION_IMAGES} images of each set")
    stages = validation_figures(run)
    rows = {
        "samples": row_of_samples(run, run.args, complete=True),
        "real training images": row_of_training_images(run),
        "reconstructions": stages["reconstructions"],
    }
    if run.machine.leads:
        print_table1(run, rows, stages)
        if "accuracy by mask ratio" in stages:
            path = run.folder / "eval.accuracy.png"
            pictures.draw_accuracy(path, stages["accuracy by mask ratio"])
    return {"rows": rows, "stages": stages}


def print_table1(run: Evaluation, rows: dict, stages: dict) -> None:
    """Prints what table1() has measured."""
    samples = rows["samples"]
    appearance = [name for name in (SHARPNESS, RECOGNISED) if name in samples]
    columns = [name for name in samples if name not in (*appearance, BY_CLASS)]
    sampler = describe("sampler", sampler_settings(run.args, run.transformer), run.args.seed)
    print_table(f"{run.title}; {sampler}", rows, columns)
    print_table("do the images look right?", rows, appearance)
    print_table("tokenizer", {"": stages})
    print_table(LIKELIHOODS, {"": stages["NLL"]})
    if BY_CLASS in samples:
        by_class = list(samples[BY_CLASS].items())
        title = f"samples: {BY_CLASS}"
        if len(by_class) > 20:
            title += f" (the first 20 of {len(by_class)}; eval.json holds all)"
        print_table(title, {"": dict(by_class[:20])})


def tokenizer_alone(run: Evaluation) -> dict:
    """Measures the tokenizer: its codes, and its reconstructions beside real images.

    Returns the figures."""
    if run.machine.leads and run.lpips is None:
        print(f"note: no LPIPS, since its weights are not in {cache_folder()}: train_vq.py "
              f"--perceptual lpips fetches them")
    figures = validation_figures(run)
    row = {name: value for name, value in figures["reconstructions"].items() if name != BY_CLASS}
    if run.machine.leads:
        print_table(run.title, {"": figures})
        print_table("reconstructions", {"": row})
    return figures


def table2(run: Evaluation) -> dict:
    """Measures outpainting and inpainting of validation images (§4.3), given their class.

    Returns {name: row}."""
    side = math.isqrt(run.transformer.config.num_tokens)
    regions = {
        "outpainting, right 50%": outpaint_region("right", 0.5, side),
        "inpainting, centre 50% x 50%": centre_region(side),
    }
    rows = {name: row_of_repainted(run, name, region) for name, region in regions.items()}
    if run.machine.leads:
        print_table(f"{run.title}, seed {run.args.seed}", rows)
    return rows


def table3(run: Evaluation) -> dict:
    """Measures every mask schedule at several T (§4.4) and draws Figure 8.

    Returns {schedule: row at its best T}, the best schedule first."""
    distance = run.networks.distance
    nll = validation_figures(run)["NLL"]
    num_tokens = run.transformer.config.num_tokens
    numbers_of_steps = sorted({steps for steps in run.args.ablate_steps if steps <= num_tokens})
    if run.machine.leads and max(run.args.ablate_steps) > num_tokens:
        print(f"note: T is at most the number of tokens, {num_tokens}: larger numbers of steps are "
              f"left out")
    curves = {}
    rows = []
    for schedule in SCHEDULES:
        curve = {}
        for steps in numbers_of_steps:
            curve[steps] = mean_over_seeds(run, schedule=schedule, steps=steps)
        curves[schedule] = curve
        best = min(curve, key=lambda steps, curve=curve: curve[steps][distance])
        rows.append((schedule, {"T": best, **curve[best], "NLL": nll[schedule]}))
    rows.sort(key=lambda schedule_and_row: schedule_and_row[1][distance])
    table = dict(rows)
    if run.machine.leads:
        print_curves(f"{distance} ± deviation over {seeds_of(run)}, by T", curves, distance)
        pictures.draw_curves(run.folder / "eval.ablation.png", curves, "T, decoding steps",
                             distance, DEVIATION)
        print_table(f"{run.title}, {seeds_of(run)}; each schedule at its best T", table)
    return table


def print_curves(title: str, curves: dict, distance: str) -> None:
    """Prints {schedule: {T: row}} as a table of distances, with a column for every T."""
    table = {}
    for schedule, curve in curves.items():
        table[schedule] = {}
        for steps, row in curve.items():
            table[schedule][f"T={steps}"] = f"{row[distance]:.4g} ± {row[DEVIATION]:.2g}"
    print_table(title, table)


def sweep(run: Evaluation) -> dict:
    """Measures one setting of the sampler at each of its values. Returns {value: row}."""
    name = run.args.sweep
    curve = {value: mean_over_seeds(run, **{name: value}) for value in SWEEPS[name]}
    rows = {str(value): row for value, row in curve.items()}
    if run.machine.leads:
        path = run.folder / f"eval.{name}.png"
        pictures.draw_curves(path, {name: curve}, name, run.networks.distance, DEVIATION)
        print_table(f"{run.title}, {seeds_of(run)}; {name}", rows)
    return rows


def seeds_of(run: Evaluation) -> str:
    """Returns in words which seeds mean_over_seeds() draws with."""
    first = run.args.seed
    if run.args.seeds == 1:
        return f"seed {first}"
    return f"seeds {first} to {first + run.args.seeds - 1}"


def mean_over_seeds(run: Evaluation, **changes: Any) -> dict:
    """Measures samples of --seeds seeds, with some of the sampler's flags changed.

    Returns a row of the mean distance, its deviation, and the mean score."""
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


# ----------------------------------------------------------------------------------------- the rows

def validation_figures(run: Evaluation) -> dict:
    """Returns the figures of measure_validation_images(), of which "reconstructions" is a row."""
    title = "validation images" if run.lpips is None else "validation images, with LPIPS"
    condition = describe(title, {"schedules": ",".join(SCHEDULES)}, run.args.seed)
    known = run.results.find(condition)
    if known is not None:
        return known
    return run.results.keep(condition, measure_validation_images(run))


def row_of_samples(run: Evaluation, args: argparse.Namespace, complete: bool = False) -> dict:
    """Returns the row of --num samples, drawn with the sampler's flags in `args`.

    complete: with precision, recall and CAS, as in Table 1."""
    title = "samples for Table 1" if complete else "samples"
    condition = describe(title, sampler_settings(args, run.transformer), args.seed)
    known = run.results.find(condition)
    if known is not None:
        return known
    samples = Samples(draw_tokens(run, args, condition), run)
    batches = read_batches_of_rank(samples, args.batch, "decoding the samples")
    measured = run.networks.measure(batches)
    row = run.reference.figures(measured)
    if complete:
        row |= precision_recall_and_cas(run, measured, samples)
    return run.results.keep(condition, row)


def row_of_training_images(run: Evaluation) -> dict:
    """Returns the row of --num real training images, measured as if they were samples."""
    condition = describe("real training images", {}, run.args.seed)
    known = run.results.find(condition)
    if known is not None:
        return known
    images = random_subset(run.train, run.args.num)
    measured = run.networks.measure(read_batches_of_rank(images, run.args.batch, condition))
    row = run.reference.figures(measured)
    row |= precision_recall_and_cas(run, measured, images)
    return run.results.keep(condition, row)


def precision_recall_and_cas(run: Evaluation, measured: Measurements, images: DataSet) -> dict:
    """Returns further columns of Table 1 for a set of images.

    CAS is the accuracy on real images of a classifier that was trained on these images alone
    (Ravuri & Vinyals 2019). Only rank 0 measures it, as the others would find the same."""
    row = {}
    row["precision"], row["recall"] = run.reference.precision_recall(measured)
    if run.args.classifier_steps and run.machine.leads:
        example, _ = images.batch(np.arange(1))
        if len(images) * example.numel() < IN_MEMORY:
            images = sets.InMemory(images)
        model = features.train_classifier(
            images, run.args.classifier_steps, run.args.seed, run.machine, "CAS")
        row["CAS top-1"], row["CAS top-5"] = features.accuracy(model, run.real, run.machine)
    return row


def row_of_repainted(run: Evaluation, title: str, region: Tensor) -> dict:
    """Returns the row of validation images, of which a region (h, w) of tokens is drawn anew."""
    condition = describe(title, sampler_settings(run.args, run.transformer), run.args.seed)
    known = run.results.find(condition)
    if known is not None:
        return known
    measured = run.networks.measure(repainted_batches(run, region, condition))
    return run.results.keep(condition, run.reference.figures(measured))


def describe(title: str, settings: dict, seed: int) -> str:
    """Returns a line that says what is measured, with which settings: the key in eval.json."""
    words = [f"{name}={value}" for name, value in settings.items()]
    return " ".join([title, *words, f"seed={seed}"])


# ---------------------------------------------------------------------------------------- the flags

def parse_flags(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line, or other words in its place."""
    parser = flags.Parser(__doc__)
    flags.add_flags(parser, RUN_FLAGS | DECODER_FLAG)
    add_sampler_flags(parser)
    switch = {"action": "store_true"}
    several = {"type": flags.count, "nargs": "+"}
    flags.add_flags(parser, {
        **ACCEPT_FLAG,
        **features.FEATURE_FLAGS,
        "num": (flags.whole, 2000, "images to draw, and to compare with; the paper: 50000"),
        "batch": (flags.count, 100, "images at a time"),
        "tokenizer": ({"metavar": "RUN"}, None,
                      "measure only this run's tokenizer, which needs no transformer"),
        "manipulate": (switch, None, "measure outpainting and inpainting of validation images"),
        "ablate": (switch, None, "measure every mask schedule at several T"),
        "ablate_steps": (several, [4, 8, 12, 16, 32, 64], "numbers of steps for --ablate"),
        "sweep": (list(SWEEPS), None, "measure one setting of the sampler at several values"),
        "seeds": (flags.count, 3, "seeds for --ablate and --sweep, from --seed upwards"),
        "again": (switch, None, "measure again what eval.json already holds"),
        **DATA_FLAGS,
    })
    flags.add_machine_flags(parser, compiles=False)
    return flags.parse(parser, arguments)


def main() -> None:
    """Runs the script."""
    runtime.launch(evaluate, parse_flags())


if __name__ == "__main__":
    command_line(main, interrupted=(
        "stopped: the results so far are kept in eval.json in the run's folder; start the same "
        "command again, without --again, for the rest"))
