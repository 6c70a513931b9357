"""What evaluate.py looks at images with, a small classifier or Inception; sets of images; and what is seen in them.

Trained on a run's real images, the classifier names what samples show, and its pooled activations are features:
Inception's weights are not always at hand, and say little about drawn shapes. Trained on samples alone, it gives the
classification accuracy score (CAS).
"""
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from lib import flags, metrics, runtime
from lib.data import batches, loader
from lib.files import fingerprint, load_checkpoint, load_tensors, load_weights, on_cpu, save_checkpoint
from lib.flags import UserError, whole
from lib.ledger import Ledger
from lib.optim import set_learning_rate
from lib.runtime import mean_over_ranks
from lib.terminal import Progress

BESIDE_REAL = ["sharpness / real", "classifier names the class"]
BY_CLASS = "classifier names the class, by class"

FLAGS = {
    "features": (["classifier", "inception"], "classifier", "of images"),
    "inception": ({"metavar": "FILE"}, None, "file of Inception's weights (default: torch-fidelity fetches them)"),
    "classifier_steps": (whole, 600, "training steps of each classifier; 0, with Inception: none, no CAS")}
JUDGE_FLAGS = {
    "evaluate_every": (whole, 0, "steps between measurements of samples, FCD or FID; keeps the best weights; 0: none"),
    "evaluate_num": (flags.number(int, 2), 2000, "samples that are measured"), **FLAGS}


class Classifier(nn.Module):
    """(B, 3, S, S) in [0, 1] -> class logits (B, classes): four residual stages, each halving the resolution."""

    def __init__(self, classes, width=24):
        super().__init__()
        widths = [width, 2 * width, 4 * width, 4 * width]
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.down = nn.ModuleList([nn.Conv2d(a, b, 3, 2, 1) for a, b in zip([width] + widths, widths)])
        self.same = nn.ModuleList([
            nn.Sequential(nn.BatchNorm2d(w), nn.ReLU(), nn.Conv2d(w, w, 3, padding=1)) for w in widths])
        self.out = nn.Linear(widths[-1], classes)

    def features(self, images):
        """-> (B, 4 * width), what the logits are a linear function of."""
        x = self.stem(images * 2 - 1)
        for down, same in zip(self.down, self.same):
            x = down(F.relu(x))
            x = x + same(x)
        return F.relu(x).mean((2, 3))

    def forward(self, images):
        return self.out(self.features(images))


def train_classifier(data, steps, seed, machine, what):
    """Trains on a data set, in batches of 128 -> a Classifier in eval mode. what: its name in the progress lines."""
    torch.manual_seed(seed)
    model = Classifier(len(data.classes)).to(machine.device, memory_format=machine.layout)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    progress = Progress(what, steps, "steps")
    for step, (images, labels) in enumerate(batches(data, 128, seed, 0, steps)):
        set_learning_rate(optimizer, step, 3e-3, 50, steps, decay=True)
        with machine.autocast():
            logits = model(machine.to_floats(images))
        loss = F.cross_entropy(logits.float(), machine.put(labels), label_smoothing=0.1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        machine.sync()
        progress.show(step + 1)
    return model.eval()


@torch.no_grad()
def accuracy(model, subset, machine):
    """Of a classifier on a Subset of images of its classes -> (top-1, top-5), floats in [0, 1]."""
    right = torch.zeros(2, dtype=torch.float64, device=machine.device)
    for batch in subset.read(range(math.ceil(len(subset) / subset.size))):
        with machine.autocast():
            logits = model(machine.to_floats(batch.images))
        best = logits.topk(min(5, logits.shape[1]), 1).indices                                          # (n, 5)
        hits = best == machine.put(batch.labels)[:, None]
        right += torch.stack([hits[:, 0].sum(), hits.sum()])
        machine.sync()
    return tuple((right / len(subset)).tolist())


def load_classifier(path, train, steps, machine):
    """The run's own classifier, kept at `path`: trained on its real images by rank 0 where it is not there yet."""
    expected = {"kind": "classifier", "classes": list(train.classes), "steps": steps}
    kept = load_checkpoint(path, "classifier") if path.exists() else {}
    if machine.leads and not expected.items() <= kept.items():
        model = train_classifier(train, steps, 0, machine, "classifier of real images")
        save_checkpoint(path, on_cpu(expected | {"model": model.state_dict()}))
    machine.any(False)                                         # the other ranks wait until the file is there
    weights = load_checkpoint(path, "classifier")["model"]
    model = load_weights(Classifier(len(train.classes)), weights, path).eval().requires_grad_(False)
    return model.to(machine.device, memory_format=machine.layout)


def load_inception(path, machine):
    """Inception-v3 as FID and IS were defined with, torch-fidelity's: images uint8 -> (n, 2048), logits (n, 1008).

    path: of its weights; None: torch-fidelity fetches them, on rank 0. Raises ValueError without the package or for a
    file that is none, OSError where the weights cannot be had."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as Inception
    except ImportError:
        raise UserError("--features inception needs torch-fidelity: pip install torch-fidelity") from None
    if path and not Path(path).is_file():
        raise UserError(f"--inception {path} does not exist: name the file "
                                f"weights-inception-2015-12-05-6726825d.pth of torch-fidelity's releases")
    if path:
        load_tensors(path)                   # refuses all but a plain state dict: the package would run code in it
    if not machine.leads:
        machine.any(False)                   # the other ranks wait until rank 0 has fetched the file
    try:
        model = Inception("inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=path)
    except RuntimeError:
        raise UserError(f"{path or 'what was fetched'} does not hold the weights of "
                         f"torch-fidelity's Inception") from None
    except OSError as error:
        raise UserError(f"torch-fidelity could not fetch Inception's weights ({error}): name their file with "
                      f"--inception") from error
    if machine.leads:
        machine.any(False)
    return model.to(machine.device)


class Batch(NamedTuple):
    """Some images of a set: its batch of this number."""
    number: int
    split: torch.Tensor                      # (n,), of the Inception Score, as of split_of() for the set
    images: torch.Tensor                     # uint8 (n, 3, S, S)
    labels: torch.Tensor                     # (n,), the class that each was asked to be, or is
    tokens: torch.Tensor | None = None       # (n, N)


def fair_choice(data, count):
    """Indices of `count` images of a data set that may be sorted by class: the first of a fixed random order."""
    return np.random.Generator(np.random.Philox(key=[2020, 0])).permutation(len(data))[:count]


class Subset:
    """Images of a data set at `indices` as a data set of their own, never augmented; [b]: Batch b, of `size` images."""

    def __init__(self, data, indices, size):
        self.data, self.indices, self.size = data, indices, size
        self.classes, self.workers = data.classes, data.workers

    def __len__(self):
        return len(self.indices)

    def batch(self, places, draws=None):
        return self.data.batch(self.indices[places])

    def __getitem__(self, b):
        places = slice(b * self.size, (b + 1) * self.size)
        return Batch(b, metrics.split_of(len(self))[places], *self.batch(places))

    def read(self, numbers):
        """Iterates over the batches of these numbers."""
        return iter(loader(self, list(numbers), self))


class SampledImages:
    """The samples of sampled_batches() as a data set: tokens (n, N), which to_images() turns into uint8 images.

    Small sets are turned once and kept (up to 1 GiB); a large one would fill the memory."""
    workers = 0

    def __init__(self, tokens, classes, to_images):
        self.tokens, self.classes, self.to_images, self.images = tokens, classes, to_images, None
        if len(tokens) * to_images(tokens[:1]).numel() < 1 << 30:
            self.images = torch.cat([to_images(part).cpu() for part in tokens.split(100)])

    def __len__(self):
        return len(self.tokens)

    def batch(self, indices, draws=None):
        images = self.to_images(self.tokens[indices]).cpu() if self.images is None else self.images[indices]
        return images, torch.as_tensor(indices) % len(self.classes)


def open_features(args, machine, example, train, folder):
    """The Features that are asked for. train, folder: the run's. example: see Features. Raises as load_inception, and
    ValueError where no features are left."""
    if not args.classifier_steps and args.features == "classifier":
        raise UserError("--classifier-steps 0 leaves nothing to measure with: add --features inception")
    inception = load_inception(args.inception, machine) if args.features == "inception" else None
    path, steps = folder / "classifier.pt", args.classifier_steps
    classifier = load_classifier(path, train, steps, machine) if steps else None
    return Features(machine, train.classes, classifier, inception, example)


class Features:
    """What is seen in images: features of Inception, or else of a Classifier; sums over them; figures from the sums.

    classes: names of the images' classes. classifier: of these, or None. inception: from load_inception(), or None.
    example: images uint8 (n, 3, S, S), the same on all ranks: the sums are taken around the mean of their features.
    Attributes: name; distance and score, what a Fréchet distance and an Inception Score by them are called."""

    def __init__(self, machine, classes, classifier, inception, example):
        self.machine, self.classes, self.classifier, self.inception = machine, classes, classifier, inception
        self.distance, self.score = ("FID", "IS") if inception else ("FCD", "IS(classifier)")
        self.latest_real = None
        self.name = f"{'Inception' if inception else 'the classifier'}'s ({fingerprint(inception or classifier)})"
        self.shift = mean_over_ranks(self.of(example)[0].double().mean(0))                              # (D,)

    @torch.no_grad()
    def of(self, images):
        """Images uint8 (n, 3, S, S) -> features (n, D) and logits (n, classes of the network)."""
        if self.inception:
            return self.inception(self.machine.put(images))
        features = self.classifier.features(self.machine.to_floats(images))
        return features, self.classifier.out(features)

    @torch.no_grad()
    def sums(self, batch):
        """Of a Batch: sums for figures(), and rows that may be kept."""
        floats, labels = self.machine.to_floats(batch.images), self.machine.put(batch.labels)
        features, logits = self.of(batch.images)
        sums = metrics.moments(features, self.shift) | metrics.score_sums(logits, self.machine.put(batch.split))
        sums["sharpness"] = metrics.sharpness(floats).double() * len(floats)
        if self.classifier:
            named = (self.classifier(floats) if self.inception else logits).argmax(1)
            asked = F.one_hot(labels, len(self.classes)).double()
            sums["class_count"], sums["class_right"] = asked.sum(0), (asked * (named == labels)[:, None]).sum(0)
        return sums, {"features": features, "tokens": batch.tokens}

    def figures(self, sums, real):
        """Table 1's columns, BESIDE_REAL and BY_CLASS, {name: value}. real: the sums of real images."""
        device = self.machine.device if self.machine.device.type == "cuda" else torch.device("cpu")
        ours, theirs = ({name: value.to(device) for name, value in each.items()} for each in (sums, real))
        if real is not self.latest_real:               # for 2,048 features it takes seconds, which each row would wait
            self.latest_real, self.gaussian = real, metrics.gaussian(theirs, self.shift.to(device))
        row = {self.distance: metrics.frechet_distance(*metrics.gaussian(ours, self.shift.to(device)), *self.gaussian)}
        row[self.score], row["± over splits"] = metrics.inception_score(ours)
        if "features" in ours:
            row["precision"], row["recall"] = metrics.precision_recall(ours["features"], theirs["features"])
        sharpness, real_sharpness = (each["sharpness"] / each["count"] for each in (ours, theirs))
        row[BESIDE_REAL[0]] = (sharpness / real_sharpness).item()
        if self.classifier:
            row[BESIDE_REAL[1]] = (ours["class_right"].sum() / ours["count"]).item()
            shares = (ours["class_right"] / ours["class_count"]).tolist()
            row[BY_CLASS] = {name: share for name, share in zip(self.classes, shares) if not math.isnan(share)}
        return row


def sampled_batches(draw, numbers, size, count, classes, seed, machine):
    """Of `count` samples, the number of classes in turn, the batches of these numbers.

    draw(labels, generator, machine) -> images uint8, tokens. A batch has a generator of its own: the samples are the
    same on any number of ranks, and after an interruption."""
    places, splits = torch.arange(count).split(size), metrics.split_of(count).split(size)
    for number in numbers:
        labels = machine.put(places[number] % classes)
        images, tokens = draw(labels, machine.generator(runtime.step_seed(seed, number)), machine)
        yield Batch(number, splits[number], images, labels, tokens)


def open_judge(args, machine, train, val, folder, draw):
    """What measures a model while it learns: call it -> {FID or FCD: of --evaluate-num samples}. train, val: images.
    folder: the run's. draw: as for sampled_batches()."""
    size, count = 100, args.evaluate_num
    real = Subset(val, fair_choice(val, count), size)
    features = open_features(args, machine, real[0].images, train, folder)
    real_sums = Ledger(None, {}, machine, size).add_up("real images", len(real), real.read, features.sums)

    def drawn(numbers):
        return sampled_batches(draw, numbers, size, count, len(train.classes), 0, machine)

    def judge():                                              # a new Ledger each time, as the next samples are others
        sums = Ledger(None, {}, machine, size).add_up("samples", count, drawn, features.sums)
        return {features.distance: features.figures(sums, real_sums)[features.distance]}
    return judge
