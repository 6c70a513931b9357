"""Measuring many images in one pass: what a batch adds, the figures that follow from sums, and the Ledger that adds up.

    image_sums, token_sums                               what is summed over a batch
    real_images, training_images, samples, repainted     where the batches come from, each a source for Ledger.total
    measures, looks, stage_figures                       from sums to figures
    Ledger                                               adds up over batches and ranks, saves, resumes; keeps the results
"""
import json
import math
import os
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

import devices
import metrics
import runtime
from classifier import to_floats
from maskgit import SCHEDULES, decode, decode_sequential, mask_tokens, mvtm_loss
from sample import restore, to_pixels

FEATURES_KEPT = 10_000    # precision and recall need the features themselves: of so many images of a set
SPLITS = 10               # of the Inception Score
BINS = 20                 # of mask ratios
NEIGHBOURS = 3            # k of precision and recall
NAMED = "classifier names the class"
LOOKS = ["sharpness / real", "spread within a class / real", NAMED]


@dataclass
class Task:
    """What is measured and how. extract: images uint8 (n, 3, S, S) on the device -> features (n, D), logits (n, classes)."""
    machine: Any
    extract: Any
    distance: str                 # what a distance between such features is called: FCD or FID
    score: str                    # and the Inception Score from such logits
    batch: int
    seed: int = 0
    shift: Any = None             # (D,), see metrics.moments
    tokenizer: Any = None
    transformer: Any = None
    classifier: Any = None
    real: Any = None              # validation images, in a fixed random order


# ------------------------------------------------------------------------------------- what is summed over a batch

def image_sums(task, images, split, labels=None):
    """Sums over a batch of images uint8 (n, 3, H, W), for `measures` and (with labels) `looks`; and their features (n, D).

    split: (n,), see metrics.split_of. labels: (n,), the class that each was asked to be, or is."""
    images = images.to(task.machine.device)
    features, logits = task.extract(images)
    sums = metrics.moments(features, task.shift) | metrics.score_sums(logits, split.to(images.device), SPLITS)
    if labels is not None:
        floats = to_floats(images, task.machine)
        member = F.one_hot(labels.to(images.device), task.transformer.config.num_classes).double().T        # (classes, n)
        small = F.adaptive_avg_pool2d(floats, 16).flatten(1).double()
        sums |= {"class_count": member.sum(1), "class_sum": member @ small, "class_squares": member @ small.square().sum(1),
                 "sharpness": runtime.sharpness(floats).double() * len(images)}
        if task.classifier:
            named = (logits if task.distance == "FCD" else task.classifier(floats)).argmax(1)
            sums["class_right"] = member @ (named == labels.to(images.device)).double()
    return sums, features


def token_sums(task, tokens, labels, seed):
    """The negative log-likelihood of masked tokens under each schedule (Table 3), and how many are predicted right at each ratio.

    tokens (n, N), labels (n,): real ones. seed: of the masks. Causal: of each token after those before it."""
    model, N, generator = task.transformer, tokens.shape[1], torch.Generator().manual_seed(seed)
    nll, by_ratio = [], torch.zeros(BINS, 3, dtype=torch.float64, device=tokens.device)
    for schedule in ["none"] if model.config.causal else SCHEDULES:
        masked, mask = (tokens, torch.ones_like(tokens, dtype=torch.bool)) if model.config.causal else \
            mask_tokens(tokens, schedule, model.mask_id, generator)
        with task.machine.autocast():
            logits = model(masked, labels)
        nll.append(mvtm_loss(logits, tokens, mask, label_smoothing=0).double() * len(tokens))
        right, count = ((logits.argmax(-1) == tokens) & mask).sum(1), mask.sum(1)
        bins = F.one_hot((count * BINS + N - 1) // N - 1, BINS).double()                # ratios up to 1/20, 2/20, ...
        by_ratio += bins.T @ torch.stack([right, count, torch.ones_like(count)], 1).double()
    return {"nll": torch.stack(nll), "by_ratio": by_ratio}


def real_images(task):
    """Validation images, the tokenizer's reconstructions of them, the transformer on their tokens."""
    split = metrics.split_of(len(task.real), SPLITS)

    @torch.no_grad()
    def source(numbers):
        for b, (images, labels) in zip(numbers, task.real.read(numbers)):
            part, labels = split[b * task.batch:][:len(images)], labels.to(task.machine.device)
            floats = to_floats(images, task.machine)
            with task.machine.autocast():
                tokens = task.tokenizer.encode(floats).flatten(1)
                restored = restore(task.tokenizer, tokens).float()
            psnr = -10 * (restored - floats).square().mean((1, 2, 3)).clamp(min=1e-10).log10().double().sum()
            sums, features = image_sums(task, images, part, labels)
            others, _ = image_sums(task, runtime.quantize(restored), part, labels)
            codes = torch.bincount(tokens.flatten(), minlength=task.tokenizer.config.codebook_size).double()
            yield sums | {f"restored {name}": value for name, value in others.items()} | {"psnr": psnr, "codes": codes} | \
                token_sums(task, tokens, labels, devices.step_seed(task.seed, b)), {"features": features}
    return source


def training_images(task, chosen):
    """Real images of the training set, a Chosen of it."""
    split = metrics.split_of(len(chosen), SPLITS)

    @torch.no_grad()
    def source(numbers):
        for b, (images, labels) in zip(numbers, chosen.read(numbers)):
            sums, features = image_sums(task, images, split[b * task.batch:][:len(images)], labels)
            yield sums, {"features": features}
    return source


def samples(task, count, options, seed):
    """Images drawn by the transformer, classes in turn. options: of the decoding function."""
    split, config = metrics.split_of(count, SPLITS), task.transformer.config
    sampler = decode_sequential if config.causal else decode

    @torch.no_grad()
    def source(numbers):
        for b in numbers:
            index = torch.arange(b * task.batch, min((b + 1) * task.batch, count))
            labels = (index % config.num_classes).to(task.machine.device)
            # A generator for each batch: the samples are the same on any number of ranks, and after an interruption.
            generator = task.machine.generator(devices.step_seed(seed, b))
            with task.machine.autocast():
                tokens = sampler(task.transformer, labels, generator=generator, **options)
                images = runtime.quantize(restore(task.tokenizer, tokens))
            sums, features = image_sums(task, images, split[index], labels)
            yield sums, {"features": features, "tokens": tokens.int()}
    return source


def repainted(task, region, options):
    """Validation images with a region (h, w) of their tokens, boolean, drawn anew for their class."""
    split, region = metrics.split_of(len(task.real), SPLITS), region.to(task.machine.device)
    pixels = to_pixels(region, task.tokenizer)                                                          # (H, W)

    @torch.no_grad()
    def source(numbers):
        for b, (images, labels) in zip(numbers, task.real.read(numbers)):
            images, labels = images.to(task.machine.device), labels.to(task.machine.device)
            generator = task.machine.generator(devices.step_seed(task.seed, b))
            with task.machine.autocast():
                known = task.tokenizer.encode(to_floats(images, task.machine)).flatten(1)
                known = torch.where(region.flatten(), task.transformer.mask_id, known)
                tokens = decode(task.transformer, labels, known=known, generator=generator, **options)
                painted = runtime.quantize(restore(task.tokenizer, tokens))
            images = torch.where(pixels, painted, images)
            yield image_sums(task, images, split[b * task.batch:][:len(images)], labels)[0], {}
    return source


# --------------------------------------------------------------------------------------------- from sums to figures

def measures(task, sums, real):
    """The columns of Table 1: FID (or FCD) from the real images, IS, and precision and recall where features were kept."""
    distance = metrics.frechet_distance(*metrics.mean_and_covariance(sums, task.shift.cpu()),
                                        *metrics.mean_and_covariance(real, task.shift.cpu()))
    score, spread = metrics.inception_score(sums)
    result = {task.distance: distance, task.score: score, "± over splits": spread}
    if "features" in sums and "features" in real:
        where = task.machine.device if task.machine.device.type == "cuda" else "cpu"
        pair = metrics.precision_recall(sums["features"].to(where), real["features"].to(where), NEIGHBOURS)
        result |= dict(zip(("precision", "recall"), pair))
    return result


def looks(sums, real, classes):
    """How often the classifier names the class that was asked for; sharpness and spread relative to the real images'."""
    def spread(sums):                       # root mean square distance of two images of a class, at 16 x 16 pixels
        some = sums["class_count"] > 1
        n = sums["class_count"][some]
        variance = sums["class_squares"][some] / n - (sums["class_sum"][some] / n[:, None]).square().sum(1)
        return (2 * variance.clamp(min=0) * n / (n - 1)).sqrt().mean()

    sharpness = lambda sums: sums["sharpness"] / sums["class_count"].sum()
    result = dict(zip(LOOKS, ((sharpness(sums) / sharpness(real)).item(), (spread(sums) / spread(real)).item())))
    if "class_right" in sums:
        result[NAMED] = (sums["class_right"].sum() / sums["class_count"].sum()).item()
        shares = (sums["class_right"] / sums["class_count"]).tolist()
        result[NAMED + ", by class"] = {name: share for name, share in zip(classes, shares) if not math.isnan(share)}
    return result


def stage_figures(task, sums, classes):
    """Of both stages on validation images: reconstruction, codebook, likelihood of tokens."""
    n, codes = sums["count"], sums["codes"] / sums["codes"].sum()
    restored = {name.removeprefix("restored "): value for name, value in sums.items() if name.startswith("restored ")}
    nll, names = (sums["nll"] / n).tolist(), ["next token"] if task.transformer.config.causal else SCHEDULES
    right, count, images = sums["by_ratio"][sums["by_ratio"][:, 2] > 0].T
    ratio = count / images / task.transformer.config.num_tokens
    return {"reconstructions": measures(task, restored, sums) | looks(restored, sums, classes),
            "PSNR, dB": (sums["psnr"] / n).item(), "codebook usage": (codes > 0).double().mean().item(),
            "codebook perplexity": torch.exp(-torch.xlogy(codes, codes).sum()).item(), "NLL": dict(zip(names, nll)),
            "accuracy by mask ratio": [[round(r, 4), a] for r, a in zip(ratio.tolist(), (right / count).tolist())]}


# --------------------------------------------------------------------------------------------------- adding up

class Ledger:
    """What an evaluation has found: results in eval.json, sums of what is under way in eval.resume.pt.

    folder: the run's (None: keep nothing on disk). setup: the plain values that every result depends on; results under another
    setup stay in the file. again: use none of what is there; what is found anew replaces it. Ranks share the batches; only rank 0 writes and prints."""
    SAVE_SECONDS = 30

    def __init__(self, folder, setup, machine, batch, again=False):
        self.folder, self.setup, self.machine, self.batch, self.leads = folder, setup, machine, batch, machine.rank == 0
        self.others, self.results, self.partial = [], {}, {}
        if folder and (folder / "eval.json").exists():
            try:
                records = json.loads((folder / "eval.json").read_text())["records"]
            except (ValueError, KeyError):                                      # not of this script: it is replaced
                records = []
            self.others = [record for record in records if again or record["setup"] != setup]
            if not again:
                self.results = {record["condition"]: record["result"] for record in records if record["setup"] == setup}
        if folder and (folder / "eval.resume.pt").exists() and not again:
            try:
                kept = runtime.load_checkpoint(folder / "eval.resume.pt", "evaluation")
                self.partial = kept["partial"] if kept["setup"] == setup else {}
            except ValueError:                                                  # cannot be read: what it held is done again
                pass

    def total(self, condition, count, source, room=()):
        """Adds up what source() yields for the batches of `count` images -> the sums, on the CPU, on rank 0 (others: None).

        source: numbers of batches -> an iterator over (sums, rows) of each. rows: {name: (n, ...)}, a row an image, of which
        the first room[name] are kept; a name without room is passed over."""
        first, sums = self.partial.get(condition, (0, {}))
        batches, world, device = math.ceil(count / self.batch), self.machine.world, self.machine.device
        if first >= batches:
            return runtime.to_cpu(sums) if self.leads else None
        sums = {name: value if name in room else value.to(device) for name, value in sums.items()} if self.leads else {}
        rounds = range(first, batches, world)
        # In the last round a rank may have no batch left: it repeats the last one and adds nothing of it.
        stream = source([min(start + self.machine.rank, batches - 1) for start in rounds])
        started = saved = shown = time.time()
        for start in rounds:
            more, rows = next(stream)
            b, counts = start + self.machine.rank, start + self.machine.rank < batches
            metrics.add(sums, {name: value.to(device) * counts for name, value in more.items()})
            for name, part in rows.items():
                if name in room:
                    sums.setdefault(name, torch.zeros(room[name], *part.shape[1:], dtype=part.dtype))
                    part = part[:max(0, room[name] - b * self.batch)].cpu() * counts
                    sums[name][b * self.batch:b * self.batch + len(part)] += part
            self.machine.sync()
            now, done = time.time(), min((start + world) * self.batch, count)
            if done == count or self.machine.any(self.leads and now - saved > self.SAVE_SECONDS):
                sums, saved = self.over_ranks(sums), now
                self.save(condition, min(start + world, batches), sums)
            if self.leads and (done == count or now - shown > (0.2 if sys.stdout.isatty() else 10)):
                shown = now
                show_progress(condition, done, count, (now - started) / (done - first * self.batch) * (count - done))
        return runtime.to_cpu(sums) if self.leads else None

    def over_ranks(self, sums):
        """The sums of all ranks, on rank 0; zeros on the others, which go on from there."""
        if self.machine.world == 1:
            return sums
        total = {}
        for name, value in sorted(sums.items()):
            whole = self.machine.mean(value.to(self.machine.device).double()) * self.machine.world
            whole = whole if value.is_floating_point() else whole.round()
            total[name] = (whole * self.leads).to(value.device, value.dtype)
        return total

    def save(self, condition=None, done=0, sums=None):
        if condition:
            self.partial[condition] = (done, sums)
        if self.leads and self.folder:
            partial = {name: [done, sums] for name, (done, sums) in self.partial.items()}
            runtime.save_checkpoint(self.folder / "eval.resume.pt",
                                    {"kind": "evaluation", "setup": self.setup, "partial": partial})

    def result(self, condition, count, source, finish, room=()):
        """The result of a condition: the one found before, or finish(its sums), which is then kept. {} on other ranks."""
        if condition not in self.results:
            sums = self.total(condition, count, source, room)
            self.results[condition] = finish(sums) if self.leads else {}
            self.write()
            self.partial.pop(condition, None)
            self.save()
        return self.results[condition]

    def write(self, **latest):
        """eval.json: what was asked for last (a dict), then every result with the setup it was found under."""
        if self.leads and self.folder:
            records = [record for record in self.others
                       if record["setup"] != self.setup or record["condition"] not in self.results]
            records += [{"setup": self.setup, "condition": condition, "result": result}
                        for condition, result in self.results.items()]
            text = json.dumps({**latest, "setup": self.setup, "records": records}, indent=1)
            runtime.write_atomically(self.folder / "eval.json", lambda file: file.write(text.encode()))


def show_progress(condition, done, count, seconds):
    seconds = round(seconds)
    text = f"{condition}: {done}/{count} images  {seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} left"
    if sys.stdout.isatty():
        width = os.get_terminal_size().columns - 1
        print("\r" + text[:width].ljust(width), end="\n" if done == count else "", flush=True)
    else:
        print(text, flush=True)
