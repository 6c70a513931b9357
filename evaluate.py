"""Measures a trained run as the paper does: its rows in Tables 1, 2 and 3, and Figure 8.

    python evaluate.py --run runs/shapes                          # Table 1; the newest run, where none is named
    python evaluate.py --num 50000 --features inception           # FID and IS as in the literature (torch-fidelity)
    python evaluate.py --manipulate                               # Table 2: outpainting and inpainting
    python evaluate.py --ablate                                   # Table 3: seven mask schedules x steps, three seeds
    python evaluate.py --sweep choice_temperature                 # one setting of the sampler
    torchrun --nproc_per_node 8 -- evaluate.py --run runs/imagenet --num 50000 --features inception

Distances between classifier features are called FCD, never FID. Results go to eval.json in the run's folder; what is
there is not done again. The file descends: tables, rows, the batches behind a row, what is summed over a batch.
"""
import argparse
import functools
import math
import platform

import numpy as np
import torch
import torch.nn.functional as F

from lib import features as features_
from lib import flags, metrics, pictures, runtime, terminal
from lib.data import DATA_FLAGS, admit_pixels, open_data
from lib.features import BESIDE_REAL, BY_CLASS, SampledImages, Subset, sampled_batches
from lib.files import fingerprint, rebuild
from lib.flags import UserError
from lib.ledger import Ledger, name_of
from lib.sampling import add_run_flags, add_sampler_flags, load_run, sampler_options
from maskgit import SCHEDULES, MaskGIT, decode, decode_sequential, mvtm_loss
from train_transformer import mask_for_training
from vqgan import VQGAN, as_grid, to_pixels

LIKELIHOODS = ("negative log-likelihood of tokens, nats (linear: a bound on -log p(image) / tokens, which the next "
               "token's is exactly;\nhow far it lies above is what the parallel decoder lacks, whatever the sampler)")
FEATURES = {"features": 10_000}     # kept for precision and recall, of so many images of a set
RESTORED = "restored "    # before the names of sums over reconstructions
BINS = 20                 # of mask ratios
DEVIATION, NEXT_TOKEN = "± over seeds", "next token"
SWEEPS = {"choice_temperature": [0, 1, 2, 4.5, 8, 12], "temperature": [0.6, 0.7, 0.8, 0.9, 1, 1.1],
          "cfg": [0, 0.5, 1, 2, 4], "order": ORDERS}


def evaluate(args, machine):
    """Measures what the flags ask for, prints it, writes eval.json. Raises ValueError or OSError for bad input."""
    task = Task(args, machine)
    few, dimensions, distance = len(task.real), len(task.features.shift), task.features.distance
    if machine.leads:
        print(f"{task.title}, on {machine.device} x {machine.devices}", flush=True)
    if machine.leads and few <= dimensions:
        print(f"note: {few} images are few for {dimensions} features: {distance} is far above that of more", flush=True)
    if machine.leads and args.num > FEATURES["features"]:
        print(f"note: precision and recall are of the first {FEATURES['features']} images of each set", flush=True)
    real = task.ledger.add_up(name_of("real images", {}, args.seed), len(task.real), task.real.read,
                              functools.partial(sums_of_stages, task), FEATURES)
    found = {"run": str(task.folder), "data": task.data, "seed": args.seed, "sampler": task.options}
    asked = {"manipulation": (args.manipulate, table2), "ablation": (args.ablate, table3), "sweep": (args.sweep, sweep)}
    found |= {name: table(task, real) for name, (wanted, table) in asked.items() if wanted} or table1(task, real)
    task.ledger.write(**found)
    if machine.leads:
        print(f"wrote {task.folder}/eval.json")


def table1(task, real):
    """The run's row of Table 1, those of real training images and of reconstructions, and figures of both stages."""
    args, stages, rows = task.args, figures_of_stages(task, real), {}
    keep = FEATURES | {"tokens": args.num}
    rows["samples"] = row_of_samples(task, real, "samples, row", task.options, args.seed, keep)
    chosen = Subset(task.train, features_.fair_choice(task.train, args.num), args.batch)
    name = name_of("training images, row", {}, args.seed)
    rows["real training images"] = row_of(task, real, name, len(chosen), chosen.read, FEATURES, chosen)
    restored = {name.removeprefix(RESTORED): value for name, value in real.items() if name.startswith(RESTORED)}
    rows["reconstructions"] = task.features.figures(restored, real)
    if task.machine.leads:
        samples, title = rows["samples"], f"{task.title}; {name_of('sampler', task.options, args.seed)}"
        terminal.print_table(title, rows, [name for name in samples if name not in (*BESIDE_REAL, BY_CLASS)])
        terminal.print_table("beside the real images", rows, [name for name in BESIDE_REAL if name in samples])
        terminal.print_table("both stages", {"": stages})
        terminal.print_table(LIKELIHOODS, {"": stages["NLL"]})
        if BY_CLASS in samples:
            terminal.print_table(BY_CLASS, {"": dict(list(samples[BY_CLASS].items())[:20])})
        if not task.transformer.config.causal:
            pictures.draw_accuracy(task.folder / "eval.accuracy.png", stages["accuracy by mask ratio"])
    return {"rows": rows, "stages": stages}


def table2(task, real):
    """Outpainting and inpainting of validation images (§4.3), their true class given. Returns {name: row}."""
    side, rows = math.isqrt(task.transformer.config.num_tokens), {}
    right, centre = torch.zeros(2, side, side, dtype=torch.bool)
    right[:, side // 2:] = True
    centre[side // 4:side - side // 4, side // 4:side - side // 4] = True
    for what, region in {"outpainting, right 50%": right, "inpainting, centre 50% x 50%": centre}.items():
        read = functools.partial(repainted_images, task, region=region)
        rows[what] = row_of(task, real, name_of(what, task.options, task.args.seed), len(task.real), read)
    if task.machine.leads:
        terminal.print_table(task.title, rows)
    return rows


def table3(task, real):
    """Every schedule at several T (§4.4); draws Figure 8. Returns {schedule: row at its best T}, the best one first."""
    steps = sorted({T for T in task.args.ablate_steps if T <= task.transformer.config.num_tokens})
    distance, nll, curves, rows = task.features.distance, figures_of_stages(task, real)["NLL"], {}, {}
    for schedule in SCHEDULES:
        curve = {T: mean_over_seeds(task, real, {"steps": T, "schedule": schedule}) for T in steps}
        best = min(curve, key=lambda T: curve[T][distance])
        curves[schedule], rows[schedule] = curve, {"T": best, **curve[best], "NLL": nll[schedule]}
    rows = {schedule: rows[schedule] for schedule in sorted(rows, key=lambda schedule: rows[schedule][distance])}
    if task.machine.leads:
        by_steps = {schedule: {f"T={T}": f"{row[distance]:.4g} ± {row[DEVIATION]:.2g}" for T, row in curve.items()}
                    for schedule, curve in curves.items()}
        terminal.print_table(f"{distance} ± deviation over {task.args.seeds} seeds, by T", by_steps)
        pictures.draw_curves(task.folder / "eval.ablation.png", curves, "T, decoding steps", distance, DEVIATION)
        terminal.print_table(f"{task.title}; each schedule at its best T", rows)
    return rows


def sweep(task, real):
    """One setting of the sampler at each of its values; draws a curve. Returns {value: row}."""
    name, distance = task.args.sweep, task.features.distance
    curve = {value: mean_over_seeds(task, real, {name: value}) for value in SWEEPS[name]}
    rows = {str(value): row for value, row in curve.items()}
    if task.machine.leads:
        pictures.draw_curves(task.folder / f"eval.{name}.png", {name: curve}, name, distance, DEVIATION)
        terminal.print_table(f"{task.title}; {name}", rows)
    return rows


def mean_over_seeds(task, real, changed):
    """The row of samples with some options of the sampler changed: mean distance and score of --seeds seeds."""
    seeds = range(task.args.seed, task.args.seed + task.args.seeds)
    rows = [row_of_samples(task, real, "samples", task.options | changed, seed) for seed in seeds]
    distances, scores = ([row[name] for row in rows] for name in (task.features.distance, task.features.score))
    deviation = np.std(distances, ddof=1) if len(rows) > 1 else 0.0
    return {task.features.distance: np.mean(distances), DEVIATION: deviation, task.features.score: np.mean(scores)}


def row_of_samples(task, real, what, options, seed, keep=None):
    """Of --num images drawn with these options of the decoding function. keep: as for row_of()."""
    read = functools.partial(sampled_images, task, options=options, seed=seed)
    return row_of(task, real, name_of(what, options, seed), task.args.num, read, keep)


def row_of(task, real, name, count, read, keep=None, images=None):
    """Figures of a set of images beside the real ones: those known under this name, else those of its batches.

    read, keep: see Ledger.add_up. Where rows are kept, CAS is measured: of `images`, a data set, or else of the tokens
    among these rows."""
    if name not in task.ledger.results:
        args, sums = task.args, task.ledger.add_up(name, count, read, task.features.sums, keep)
        figures = task.features.figures(sums, real)
        # CAS: a classifier trained on these images alone is tested on real ones (Ravuri & Vinyals 2019). The first rank
        # does it, as the others would find the same.
        if keep and args.classifier_steps and task.machine.leads:
            images = images or SampledImages(sums["tokens"], task.train.classes, functools.partial(restore, task))
            model = features_.train_classifier(images, args.classifier_steps, args.seed, task.machine, "CAS")
            figures["CAS top-1"], figures["CAS top-5"] = features_.accuracy(model, task.real, task.machine)
        task.ledger.keep(name, figures)
    return task.ledger.results[name]


def restore(task, tokens):
    """Tokens (n, N) -> images uint8 (n, 3, S, S), as they would be in a file."""
    with task.machine.autocast():
        return pictures.to_uint8(task.tokenizer.decode(as_grid(task.machine.put(tokens))))


def sampled_images(task, numbers, options, seed):
    """Of --num images drawn by the transformer, classes in turn. options: of the decoding function."""
    config = task.transformer.config
    sampler = decode_sequential if config.causal else decode

    def draw(labels, generator, machine):
        with machine.autocast():
            tokens = sampler(task.transformer, labels, generator=generator, **options)
        return restore(task, tokens), tokens
    return sampled_batches(draw, numbers, task.args.batch, task.args.num, config.num_classes, seed, task.machine)


def repainted_images(task, numbers, region):
    """Of validation images with a region (h, w) of their tokens, boolean, drawn anew for their class."""
    region = region.to(task.machine.device)
    pixels = to_pixels(region, task.tokenizer.config.stride)                                            # (S, S)
    for batch in task.real.read(numbers):
        images, labels = task.machine.put(batch.images), task.machine.put(batch.labels)
        generator = task.machine.generator(runtime.step_seed(task.args.seed, batch.number))
        with task.machine.autocast():
            known = task.tokenizer.encode(task.machine.to_floats(images)).flatten(1)
            known = torch.where(region.flatten(), task.transformer.mask_id, known)
            tokens = decode(task.transformer, labels, known=known, generator=generator, **task.options)
        yield batch._replace(images=torch.where(pixels, restore(task, tokens), images))


@torch.no_grad()
def sums_of_stages(task, batch):
    """Of a batch of validation images: the sums over them, their reconstructions and their tokens; and their rows."""
    floats = task.machine.to_floats(batch.images)
    with task.machine.autocast():
        tokens = task.tokenizer.encode(floats).flatten(1)
        restored = task.tokenizer.decode(as_grid(tokens)).float()
    sums, rows = task.features.sums(batch)
    others, _ = task.features.sums(batch._replace(images=pictures.to_uint8(restored)))
    sums |= {RESTORED + name: value for name, value in others.items()}
    sums |= token_sums(task, tokens, task.machine.put(batch.labels), runtime.step_seed(task.args.seed, batch.number))
    sums["psnr"] = metrics.psnr(floats, restored).sum()
    ones = torch.ones_like(tokens, dtype=torch.float64).flatten()                # bincount, which TPUs do not have
    sums["codes"] = ones.new_zeros(task.tokenizer.config.codebook_size).index_add_(0, tokens.flatten(), ones)
    return sums, rows


def token_sums(task, tokens, labels, seed):
    """How likely masked tokens are under each schedule (Table 3), and how many are predicted right at each mask ratio.

    tokens (n, N), labels (n,): real ones. seed: of the masks. Causal: of each token after those before it."""
    N, generator = tokens.shape[1], torch.Generator().manual_seed(seed)
    nll, by_ratio = [], torch.zeros(BINS, 3, dtype=torch.float64, device=tokens.device)
    for name, model in task.likelihoods.items():
        seen, mask = mask_for_training(name, model, tokens, generator)
        with task.machine.autocast():
            logits = model(seen, labels)
        nll.append(mvtm_loss(logits, tokens, mask, label_smoothing=0).double() * len(tokens))
        if model is task.transformer:
            right, count = ((logits.argmax(-1) == tokens) & mask).sum(1), mask.sum(1)
            bins = F.one_hot((count * BINS + N - 1) // N - 1, BINS).double()            # ratios up to 1/20, 2/20, ...
            by_ratio += bins.T @ torch.stack([right, count, torch.ones_like(count)], 1).double()
    return {"nll": torch.stack(nll), "by_ratio": by_ratio}


def figures_of_stages(task, real):
    """Of both stages on validation images: reconstruction, codebook, likelihood of tokens (Table 3), accuracy."""
    codes = real["codes"] / real["codes"].sum()
    right, masked, images = real["by_ratio"][real["by_ratio"][:, 2] > 0].T
    ratios = (masked / images / task.transformer.config.num_tokens).tolist()
    return {"PSNR, dB": (real["psnr"] / real["count"]).item(),
            "codebook usage": (codes > 0).double().mean().item(),
            "codebook perplexity": torch.exp(-torch.xlogy(codes, codes).sum()).item(),
            "NLL": dict(zip(task.likelihoods, (real["nll"] / real["count"]).tolist())),
            "accuracy by mask ratio": [[round(r, 4), a] for r, a in zip(ratios, (right / masked).tolist())]}


class Task:
    """What is measured, and what with: opens the models, the data, the networks that look at images, and the Ledger.

    Attributes: folder, the run's; tokenizer, transformer; options of the decoding function; data, a name; train and
    real, training and validation images; features; ledger; title. Raises ValueError or OSError for bad input."""

    def __init__(self, args, machine):
        self.args, self.machine = args, machine
        self.folder, self.tokenizer, self.transformer, checkpoint = load_run(
            args.run, machine, VQGAN, MaskGIT, args.vqgan, args.decoder)
        config, path = self.transformer.config, self.folder / "autoregressive.pt"
        # Beside the schedules, the run's autoregressive decoder is measured, if there is one.
        self.likelihoods = dict.fromkeys([NEXT_TOKEN] if config.causal else SCHEDULES, self.transformer)
        if not config.causal and path.exists():
            decoder, beside = rebuild(path, "autoregressive", MaskGIT)
            if beside["tokenizer"] == checkpoint["tokenizer"]:
                self.likelihoods[NEXT_TOKEN] = machine.freeze(decoder.to(machine.device))
        self.data, self.options = checkpoint["data"], sampler_options(args, config)
        admit_pixels(args.max_pixels)
        self.train, val = open_data(self.data, checkpoint["image_size"], args.data_dir)
        if list(self.train.classes) != list(checkpoint["classes"]):
            raise UserError(f"the {len(self.train.classes)} classes of {self.data} are not those that the run "
                             f"{self.folder} was trained on")
        self.real = Subset(val, features_.fair_choice(val, args.num), args.batch)
        if len(self.real) <= metrics.NEIGHBOURS:
            raise UserError(f"--num {args.num}: of the {len(val)} validation images of {self.data} this takes "
                             f"{len(self.real)}; precision and recall need at least {metrics.NEIGHBOURS + 1} images")
        if config.causal and (args.ablate or args.sweep or args.manipulate):
            raise UserError("--ablate, --sweep and --manipulate need a parallel decoder: add --decoder parallel")
        if args.ablate and min(args.ablate_steps) > config.num_tokens:
            raise UserError(f"--ablate-steps must be from 1 to the number of tokens, {config.num_tokens}")
        if not config.causal:                                     # a bad option shows here, before anything takes long
            changed = {args.sweep: SWEEPS[args.sweep][-1]} if args.sweep else {}
            with machine.autocast():
                decode(self.transformer, machine.put(torch.tensor([0])), **self.options | changed)
        self.features = features_.open_features(args, machine, self.real[0].images, self.train, self.folder)
        setup = {"tokenizer": fingerprint(self.tokenizer), "transformer": fingerprint(self.transformer),
                 "beside it": [fingerprint(model) for model in set(self.likelihoods.values()) - {self.transformer}],
                 "features": self.features.name, "generated images": args.num, "real images": len(self.real),
                 "batch": args.batch, "classifier steps": args.classifier_steps, "device": machine.device.type,
                 "bf16": machine.bf16, "torch": str(torch.__version__), "python": platform.python_version()}
        self.ledger = Ledger(self.folder, setup, machine, args.batch, args.again)
        self.title = (f"{self.folder}: {args.num} generated and {len(self.real)} real validation images, "
                      f"{args.features} features, seed {args.seed}")


def parse_flags(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_flags(parser)
    add_sampler_flags(parser, SCHEDULES, ORDERS)
    flags.add_flags(parser, {
        **features_.FLAGS,
        "num": (flags.whole, 2000, "images to sample; the paper: 50000"),
        "batch": (flags.count, 100, "images at a time"),
        "ablate_steps": ({"type": flags.count, "nargs": "+"}, [4, 8, 12, 16, 32, 64], "decoding steps of --ablate"),
        "sweep": (list(SWEEPS), None, "one setting of the sampler at several values"),
        "seeds": (flags.count, 3, "of --ablate and --sweep, from --seed upwards"), **DATA_FLAGS})
    parser.add_argument("--manipulate", action="store_true", help="outpainting and inpainting of validation images")
    parser.add_argument("--ablate", action="store_true", help="every mask schedule at several T")
    parser.add_argument("--again", action="store_true", help="do anew what eval.json holds already")
    flags.add_machine_flags(parser, compiles=False)
    return parser.parse_args(arguments)


def main():
    runtime.launch(evaluate, parse_flags())


if __name__ == "__main__":
    flags.command_line(main)
