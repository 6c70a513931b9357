"""Measures a trained run as the paper does: the row it would have in Table 1, the ablation of Table 3 and Figure 8.

    python evaluate.py --run runs/shapes                          # the newest run, where none is named
    python evaluate.py --num 50000 --features inception           # FID and IS as in the literature (torch-fidelity)
    python evaluate.py --ablate                                   # seven mask schedules x decoding steps, three seeds
    python evaluate.py --sweep choice_temperature                 # one setting of the sampler
    python evaluate.py --manipulate                               # outpainting and inpainting
    python evaluate.py --folders GENERATED REAL --features inception
    torchrun --nproc_per_node 8 -- evaluate.py --run runs/imagenet --num 50000 --features inception

Distances between classifier features are called FCD, never FID. Results go to eval.json in the run's folder; what is there
already is not done again, and an interrupted evaluation goes on where it was.
"""
import argparse
import math
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import devices
import metrics
import runtime
from classifier import Chosen, Drawn, accuracy, load_classifier, load_inception, to_floats, train_classifier
from data import open_data, read_image
from maskgit import ORDERS, SCHEDULES, decode
from sample import add_sampler_flags, load_run, restore, sampler_options
from streaming import (FEATURES_KEPT, LOOKS, NAMED, NEIGHBOURS, SPLITS, Ledger, Task, image_sums, looks, measures,
                       real_images, repainted, samples, stage_figures, training_images)

SWEEPS = {"choice_temperature": [0, 1, 2, 4.5, 8, 12], "cfg": [0, 0.5, 1, 2, 4], "order": ORDERS}


# ------------------------------------------------------------------------------------------------- what is asked for

def name_of(what, options, seed):
    """How a condition is called in eval.json."""
    return " ".join([what, *(f"{name}={value}" for name, value in options.items()), f"seed={seed}"])


def table1(task, ledger, args, options, train, real):
    """The run's row of Table 1, beside that of as many real training images. Returns {name of the row: result}."""
    def cas(data, what):                                 # Ravuri & Vinyals 2019: trained on these images, tested on real ones
        if not args.classifier_steps:
            return {}
        model = train_classifier(data, args.classifier_steps, task.seed, task.machine, f"classifier of {what}")
        return dict(zip(("CAS top-1", "CAS top-5"), accuracy(model, task.real, task.machine)))

    def to_images(tokens):
        with task.machine.autocast():
            return runtime.quantize(restore(task.tokenizer, tokens.long().to(task.machine.device))).cpu()

    def of_samples(sums):
        drawn = Drawn(sums["tokens"], torch.arange(args.num) % len(train.classes), train.classes, to_images)
        return measures(task, sums, real) | looks(sums, real, train.classes) | cas(drawn, "samples")

    room = lambda count: {"features": min(count, FEATURES_KEPT)}
    chosen = Chosen(train, shuffled(len(train))[:args.num], task.batch)
    drawn = ledger.result(name_of("samples, row", options, task.seed), args.num, samples(task, args.num, options, task.seed),
                          of_samples, room(args.num) | {"tokens": args.num})
    trained = ledger.result(name_of("training images, row", {}, task.seed), len(chosen), training_images(task, chosen),
                            lambda sums: measures(task, sums, real) | cas(chosen, "real training images"), room(len(chosen)))
    return {"samples": drawn, "real training images": trained}


def repeated(task, ledger, args, options, real):
    """Distance and score of samples over --seeds seeds -> {"mean", "deviation" (of the distance), "score"}."""
    found = [ledger.result(name_of("samples", options, seed), args.num, samples(task, args.num, options, seed),
                           lambda sums: measures(task, sums, real)) for seed in range(args.seed, args.seed + args.seeds)]
    if not ledger.leads:
        return {}
    distances = np.array([result[task.distance] for result in found])
    return {"mean": distances.mean(), "deviation": distances.std(ddof=1) if len(found) > 1 else 0.0,
            "score": np.mean([result[task.score] for result in found])}


def as_columns(task, at):
    """What repeated() returns, as columns of a table."""
    return {task.distance: at["mean"], "± over seeds": at["deviation"], task.score: at["score"]}


def ablate(task, ledger, args, options, real, nll, path):
    """Table 3 and Figure 8: every schedule at several T. nll: by schedule. Writes the plot, returns the rows of Table 3."""
    steps = sorted({T for T in args.ablate_steps if 1 <= T <= task.transformer.config.num_tokens})
    found = {schedule: {T: repeated(task, ledger, args, options | {"steps": T, "schedule": schedule}, real) for T in steps}
             for schedule in SCHEDULES}
    if not ledger.leads:
        return {}
    print_table(f"{task.distance} ± deviation over {args.seeds} seeds, by T", {
        schedule: {f"T={T}": f"{at['mean']:.4g} ± {at['deviation']:.2g}" for T, at in found[schedule].items()}
        for schedule in found})
    best = {schedule: min(steps, key=lambda T: found[schedule][T]["mean"]) for schedule in SCHEDULES}
    draw_curves(path, found, best, "T, decoding steps", task.distance)
    order = sorted(SCHEDULES, key=lambda schedule: found[schedule][best[schedule]]["mean"])
    return {schedule: {"T": best[schedule], **as_columns(task, found[schedule][best[schedule]]), "NLL": nll[schedule]}
            for schedule in order}


def sweep(task, ledger, args, options, real, path):
    """One setting of the sampler, at each of its values. Writes the plot, returns the rows."""
    values = sweep_values(args)
    found = {value: repeated(task, ledger, args, options | {args.sweep: value}, real) for value in values}
    if not ledger.leads:
        return {}
    best = min(values, key=lambda value: found[value]["mean"])
    draw_curves(path, {args.sweep: found}, {args.sweep: best}, args.sweep, task.distance)
    return {str(value): as_columns(task, at) for value, at in found.items()}


def sweep_values(args):
    """The values of --sweep: those of --values, else sensible ones. Raises ValueError where one is no number."""
    if not args.values or args.sweep == "order":
        return args.values or SWEEPS[args.sweep]
    try:
        return [runtime.positive(value) for value in args.values]
    except ValueError:
        raise ValueError(f"--values of {args.sweep} must be numbers, 0 or more, not: {' '.join(args.values)}") from None


def manipulate(task, ledger, options, real):
    """Outpainting and inpainting of validation images (§4.3), their true class given. Returns {name: result}."""
    side, rows = math.isqrt(task.transformer.config.num_tokens), {}
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    inside = lambda z: (z >= side // 4) & (z < side - side // 4)
    for name, region in {"outpainting, right 50%": x >= side // 2, "inpainting, centre 50% x 50%": inside(x) & inside(y)}.items():
        rows[name] = ledger.result(name_of(name, options, task.seed), len(task.real), repainted(task, region, options),
                                   lambda sums: measures(task, sums, real) | {
                                       name: value for name, value in looks(sums, real, ()).items() if name in LOOKS})
    return rows


def shuffled(count):
    """A fixed random order: the first images in it are a fair choice, also where the data set is sorted by class."""
    return np.random.Generator(np.random.Philox(key=[2020, 0])).permutation(count)


def open_run(args, machine):
    """-> the run's folder, both models, the transformer's checkpoint, training and validation data.

    Raises ValueError where the data are not those that the run was trained on, as load_run and open_data do."""
    folder, tokenizer, transformer, checkpoint = load_run(args.run, machine.device, args.vqgan, args.decoder)
    train, val = open_data(checkpoint["data"], checkpoint["image_size"], args.data_dir)
    if list(train.classes) != list(checkpoint["classes"]):
        raise ValueError(f"the {len(train.classes)} classes of {checkpoint['data']} are not those the run {folder} was trained on")
    return folder, tokenizer, transformer, checkpoint, train, val


def open_features(args, machine, folder, train):
    """-> {"extract", "distance", "score", "classifier"}, as in Task, and a line that says which features they are.

    Raises as load_inception does."""
    inception = load_inception(args.inception, machine) if args.features == "inception" else None
    classifier = None
    if train is not None and args.classifier_steps:
        classifier = load_classifier(folder / "classifier.pt", train, args.classifier_steps, machine)
    if inception:
        return {"extract": inception, "distance": "FID", "score": "IS", "classifier": classifier}, \
            f"Inception's ({runtime.fingerprint(inception)})"

    def extract(images):
        features = classifier.features(to_floats(images, machine))
        return features, classifier.out(features)
    return {"extract": extract, "distance": "FCD", "score": "IS(classifier)", "classifier": classifier}, \
        f"the classifier's ({runtime.fingerprint(classifier)})"


def common_shift(task, images):
    """The mean of a batch's features, the same on all ranks: what metrics.moments takes off. images: uint8."""
    with torch.no_grad():
        return task.machine.mean(task.extract(images.to(task.machine.device))[0].double().mean(0))


def checked_options(args, transformer, device):
    """What the decoding function is given. Raises ValueError where it cannot be, by --ablate and --sweep too: before anything
    takes long."""
    config, options = transformer.config, sampler_options(args, transformer)
    if config.causal:
        if args.ablate or args.sweep or args.manipulate:
            raise ValueError("--ablate, --sweep and --manipulate are about parallel decoding: add --decoder parallel, or name "
                             "another run")
        return options
    if args.ablate and not any(1 <= T <= config.num_tokens for T in args.ablate_steps):
        raise ValueError(f"--ablate-steps must be from 1 to the number of tokens, {config.num_tokens}")
    for changed in [{args.sweep: value} for value in sweep_values(args)] if args.sweep else [{}]:
        decode(transformer, torch.zeros(1, dtype=torch.long, device=device), **options | changed)        # says what is wrong
    return options


def evaluate(args, machine):
    """Measures what the flags ask for, prints it, writes eval.json. Raises ValueError or OSError for bad input."""
    if args.batch < 1 or args.seeds < 1:
        raise ValueError("--batch and --seeds must be at least 1")
    if not args.classifier_steps and args.features == "classifier":
        raise ValueError("--classifier-steps 0 leaves nothing to measure with: add --features inception")
    if args.folders:
        return compare_folders(args, machine)
    enough(args.num, f"--num {args.num}")
    folder, tokenizer, transformer, checkpoint, train, val = open_run(args, machine)
    count = min(args.num, len(val))
    enough(count, f"the validation set of {checkpoint['data']} ({count})")
    options = checked_options(args, transformer, machine.device)
    networks, features = open_features(args, machine, folder, train)
    task = Task(machine, batch=args.batch, seed=args.seed, tokenizer=tokenizer, transformer=transformer,
                real=Chosen(val, shuffled(len(val))[:count], args.batch), **networks)
    task.shift = common_shift(task, task.real[0][0])
    setup = {"tokenizer": runtime.fingerprint(tokenizer), "transformer": runtime.fingerprint(transformer), "features": features,
             "generated images": args.num, "real images": count, "batch": args.batch, "classifier steps": args.classifier_steps,
             "device": machine.device.type, "bf16": machine.bf16, "torch": str(torch.__version__),
             "python": platform.python_version()}
    ledger = Ledger(folder, setup, machine, args.batch, args.again)
    title = f"{folder}: {args.num} generated and {count} real validation images, {args.features} features, seed {args.seed}"
    announce(task, ledger, f"{title}, on {machine.device} x {machine.world}", min(args.num, count), args.num)

    sums = ledger.total(name_of("real images", {}, args.seed), count, real_images(task), {"features": min(count, FEATURES_KEPT)})
    stages = stage_figures(task, sums, train.classes) if ledger.leads else {"NLL": {}}
    found = {"run": str(folder), "data": checkpoint["data"], "seed": args.seed, "sampler": options}
    if not (args.ablate or args.sweep or args.manipulate):
        rows = table1(task, ledger, args, options, train, sums)
        if ledger.leads:
            found |= {"rows": rows | {"reconstructions": stages.pop("reconstructions")}, "stages": stages}
            print_row(title + "; " + name_of("sampler", options, args.seed), found["rows"], stages)
            if not transformer.config.causal:
                draw_accuracy(folder / "eval.accuracy.png", stages["accuracy by mask ratio"])
    if args.ablate:
        found["ablation"] = ablate(task, ledger, args, options, sums, stages["NLL"], folder / "eval.ablation.png")
        say_table(ledger, f"{title}; each schedule at its best T", found["ablation"])
    if args.sweep:
        found["sweep"] = sweep(task, ledger, args, options, sums, folder / f"eval.{args.sweep}.png")
        say_table(ledger, f"{title}; {args.sweep}", found["sweep"])
    if args.manipulate:
        found["manipulation"] = manipulate(task, ledger, options, sums)
        say_table(ledger, title, found["manipulation"])
    ledger.write(**found)
    if ledger.leads:
        print(f"wrote {folder}/eval.json")


def enough(count, what):
    """Raises ValueError where there are too few images for precision and recall."""
    if count <= NEIGHBOURS:
        raise ValueError(f"{what}: precision and recall, with {NEIGHBOURS} neighbours, need at least {NEIGHBOURS + 1} images")


def announce(task, ledger, title, fewest, most):
    """What is about to be measured, and what to know about such numbers of images."""
    if not ledger.leads:
        return
    print(title, flush=True)
    if fewest <= len(task.shift):
        print(f"note: {fewest} images are few for {len(task.shift)} features: {task.distance} is far above that of more", flush=True)
    if most > FEATURES_KEPT:
        print(f"note: precision and recall are of the first {FEATURES_KEPT} images of each set", flush=True)


# ------------------------------------------------------------------------------------------------------ two folders

def image_files(folder):
    """The images of a folder and those in it, sorted. Raises ValueError where they are too few, or of several sizes."""
    paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp", ".bmp"))
    enough(len(paths), f"{folder} holds {len(paths)} images")
    sizes = {}
    for path in paths:
        try:
            with Image.open(path) as image:
                sizes.setdefault(image.size, path)
        except OSError as error:
            raise ValueError(f"{path} is not a readable image ({error})") from error
    if len(sizes) > 1:
        (a, first), (b, second), *_ = sizes.items()
        raise ValueError(f"{folder} holds images of several sizes: {first} is {a[0]} x {a[1]} and {second} is {b[0]} x {b[1]}; "
                         f"resize them first")
    return paths, sizes.popitem()[0]


def compare_folders(args, machine):
    """FID (or FCD) between two folders of images; IS, precision and recall of the first."""
    listed, run, train = [image_files(folder) for folder in args.folders], None, None
    if args.features == "classifier":
        if not args.run:
            raise ValueError("classifier features need a run whose classifier to use: add --run, or --features inception")
        run, _, _, checkpoint, train, _ = open_run(args, machine)
        size = checkpoint["image_size"]
        for folder, (_, found) in zip(args.folders, listed):
            if found != (size, size):
                raise ValueError(f"the images in {folder} are {found[0]} x {found[1]}, those of the run {size} x {size}")
    pool, totals = ThreadPoolExecutor(), []

    def read(paths):                                     # uint8 (n, 3, H, W)
        return torch.from_numpy(np.stack([np.asarray(image) for image in pool.map(read_image, paths)])).permute(0, 3, 1, 2)

    networks, features = open_features(args, machine, run, train)
    task, ledger = Task(machine, batch=args.batch, **networks), Ledger(None, None, machine, args.batch)
    task.shift = common_shift(task, read(listed[1][0][:args.batch]))
    counts = [len(paths) for paths, _ in listed]
    title = f"{counts[0]} images in {args.folders[0]}, {counts[1]} in {args.folders[1]}, features: {features}"
    announce(task, ledger, title, min(counts), max(counts))
    for folder, (paths, _) in zip(args.folders, listed):
        split = metrics.split_of(len(paths), SPLITS)

        @torch.no_grad()
        def source(numbers):
            for b in numbers:
                part = slice(b * args.batch, (b + 1) * args.batch)
                sums, features = image_sums(task, read(paths[part]), split[part])
                yield sums, {"features": features}
        totals.append(ledger.total(str(folder), len(paths), source, {"features": min(len(paths), FEATURES_KEPT)}))
    if not ledger.leads:
        return {}
    result = measures(task, *totals)
    print_table(title, {"generated": result})
    return result


# ------------------------------------------------------------------------------------------------- tables and plots

def print_table(title, rows, columns=None):
    """Prints {name of the row: {column: value}}; columns: those to show (None: all)."""
    plain = lambda value: value if isinstance(value, str) else f"{value:.4g}"
    columns = columns or list(dict.fromkeys(column for row in rows.values() for column in row))
    cells = [["", *columns]] + [[name, *(plain(row[c]) if c in row else "-" for c in columns)] for name, row in rows.items()]
    widths = [max(map(len, column)) for column in zip(*cells)]
    print(f"\n{title}")
    for first, *others in cells:
        print("  ".join([first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:]))]), flush=True)


def say_table(ledger, title, rows):
    if ledger.leads:
        print_table(title, rows)


def print_row(title, rows, stages):
    """The row of Table 1 beside those it compares with; then what else is known of the samples and of both stages."""
    first = [column for column in rows["samples"] if column not in LOOKS and not isinstance(rows["samples"][column], dict)]
    print_table(title, rows, first)
    print_table("beside the real images", {name: row for name, row in rows.items() if LOOKS[0] in row},
                [column for column in LOOKS if column in rows["samples"]])
    print()
    for name, value in {**stages, NAMED + ", by class": rows["samples"].get(NAMED + ", by class", [])}.items():
        if isinstance(value, dict):
            print(f"{name}: " + ", ".join(f"{key} {number:.4g}" for key, number in list(value.items())[:20]))
        elif not isinstance(value, list):
            print(f"{name}: {value:.4g}")


def draw_curves(path, curves, best, xlabel, ylabel):
    """Distance against a setting, a curve each, error bars over the seeds, the best value of each marked.

    curves: {name: {x: {"mean", "deviation"}}}; best: {name: x}."""
    figure, axis = new_figure()
    for name, points in curves.items():
        xs = [x if isinstance(x, (int, float)) else str(x) for x in points]
        mean, deviation = zip(*((at["mean"], at["deviation"]) for at in points.values()))
        line = axis.errorbar(xs, mean, deviation, capsize=2, lw=1.2, label=name)
        axis.plot(best[name], points[best[name]]["mean"], "*", ms=11, color=line[0].get_color())
    axis.set(xlabel=xlabel, ylabel=ylabel, yscale="log")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("{x:g}")
    if len(curves) > 1:
        axis.set_xscale("log")
        axis.set_xticks(xs, map(str, xs), minor=False)
        axis.set_xticks([], minor=True)
        figure.legend(loc="outside right upper", fontsize=8)
    runtime.write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=110))


def draw_accuracy(path, points):
    """Token accuracy against the share of masked tokens. points: [(ratio, accuracy), ...]."""
    figure, axis = new_figure()
    axis.plot(*zip(*points), "o-", lw=1.2, ms=3)
    axis.set(xlabel="masked tokens, share", ylabel="masked tokens predicted right, share", xlim=(0, 1), ylim=(0, None))
    runtime.write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=110))


def new_figure():
    from matplotlib.figure import Figure
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.add_subplot()
    axis.grid(alpha=0.3)
    return figure, axis


def parse_flags(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sampler_flags(parser)
    parser.add_argument("--features", default="classifier", choices=("classifier", "inception"), help="of images (default: %(default)s)")
    parser.add_argument("--inception", metavar="FILE", help="Inception's weights (default: torch-fidelity fetches them)")
    parser.add_argument("--num", type=runtime.whole, default=2000, help="images to sample; the paper: 50000 (default: %(default)s)")
    parser.add_argument("--batch", type=runtime.whole, default=100, help="images at a time (default: %(default)s)")
    parser.add_argument("--classifier-steps", type=runtime.whole, default=600,
                        help="training steps of each classifier; 0, with Inception: no classifier and no CAS (default: %(default)s)")
    parser.add_argument("--ablate", action="store_true", help="every mask schedule at several T")
    parser.add_argument("--ablate-steps", type=runtime.whole, nargs="+", default=[4, 8, 12, 16, 32, 64], metavar="T",
                        help="decoding steps of --ablate, those up to the number of tokens (default: 4 8 12 16 32 64)")
    parser.add_argument("--sweep", choices=SWEEPS, help="one setting of the sampler at several values")
    shown = "; ".join(f"{name}: {' '.join(map(str, values))}" for name, values in SWEEPS.items())
    parser.add_argument("--values", nargs="+", help=f"of --sweep (default: {shown})")
    parser.add_argument("--seeds", type=runtime.whole, default=3, help="of --ablate and --sweep, from --seed upwards (default: %(default)s)")
    parser.add_argument("--manipulate", action="store_true", help="outpainting and inpainting of validation images")
    parser.add_argument("--folders", nargs=2, metavar=("GENERATED", "REAL"), help="compare two folders of images")
    parser.add_argument("--again", action="store_true", help="do anew what eval.json holds already")
    parser.add_argument("--data-dir", default="data", help="where cifar10, imagenet and places2 are (default: %(default)s)")
    devices.add_machine_flags(parser)
    return parser.parse_args(arguments)


def main():
    try:
        devices.launch(evaluate, parse_flags())
    except KeyboardInterrupt:
        print("\nstopped: the same command goes on from here", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    devices.command_line(main)
