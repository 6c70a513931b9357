"""The networks that judge images, and what they measure.

Inception's features are those of the literature, but its weights are not always at hand, and they
say little about drawn shapes. So by default features come from a small classifier, trained on the
run's real images. It also tells whether samples show the class that was asked for. Another one,
trained on samples alone, gives the classification accuracy score (CAS; Ravuri & Vinyals 2019)."""
import argparse
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib import metrics
from lib.errors import UserError
from lib.files import (
    fingerprint,
    load_checkpoint,
    load_tensors,
    load_weights,
    on_cpu,
    save_checkpoint,
)
from lib.flags import whole
from lib.loader import DataSet, training_batches
from lib.optim import set_learning_rate
from lib.runtime import Machine
from lib.sets import Batch, all_batches, concatenate, gather_batches, read_batches
from lib.terminal import Progress

SHARPNESS = "sharpness / real"
RECOGNISED = "class recognised"
BY_CLASS = "class recognised, by class"
PRECISION_IMAGES = 10_000       # precision and recall are of so many: time grows with the square
CLASSIFIER_STEPS = 600          # of the classifier that is kept as classifier.pt

FEATURE_FLAGS = {
    "features": (["classifier", "inception"], "classifier", "network whose features are compared"),
    "inception": ({"metavar": "FILE"}, None,
                  "file of Inception's weights (default: torch-fidelity fetches them)"),
    "classifier_steps": (whole, CLASSIFIER_STEPS,
                         "training steps of each classifier; 0: train none (only with --features "
                         "inception): no CAS, no 'class recognised'"),
}


# ------------------------------------------------------------------------------------- the networks

class Classifier(nn.Module):
    """Classifies images (B, 3, S, S) in [0, 1]: four residual stages, each of which halves the
    resolution."""

    def __init__(self, classes: int, width: int = 24):
        super().__init__()
        widths = [width, 2 * width, 4 * width, 4 * width]
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.down = nn.ModuleList()
        for inputs, outputs in zip([width, *widths], widths, strict=False):
            self.down.append(nn.Conv2d(inputs, outputs, 3, stride=2, padding=1))
        self.same = nn.ModuleList()
        for channels in widths:
            self.same.append(nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(),
                                           nn.Conv2d(channels, channels, 3, padding=1)))
        self.out = nn.Linear(widths[-1], classes)

    def features(self, images: Tensor) -> Tensor:
        """Returns the pooled activations (B, 4 * width), of which the logits are a linear function.
        """
        x = self.stem(images * 2 - 1)
        for down, same in zip(self.down, self.same, strict=True):
            x = down(F.relu(x))
            x = x + same(x)
        return F.relu(x).mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits (B, classes)."""
        return self.out(self.features(images))


def train_classifier(data: DataSet, steps: int, seed: int, machine: Machine,
                     title: str) -> Classifier:
    """Trains a Classifier in batches of 128 and returns it in eval mode. title: of its progress."""
    torch.manual_seed(seed)
    model = Classifier(len(data.classes)).to(machine.device, memory_format=machine.layout)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    progress = Progress(title, steps, "steps")
    for step, (images, labels) in enumerate(training_batches(data, 128, seed, 0, steps)):
        set_learning_rate(optimizer, step, warmup=50, decay_until=steps)
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
def accuracy(model: nn.Module, data: DataSet, machine: Machine) -> tuple[float, float]:
    """Returns the top-1 and top-5 accuracy of a classifier on a data set."""
    top_1 = 0
    top_5 = 0
    for batch in read_batches(data, 100, all_batches(len(data), 100)):
        with machine.autocast():
            logits = model(machine.to_floats(batch.images))
        likeliest = logits.topk(min(5, logits.shape[1]), dim=1).indices         # (n, 5)
        machine.sync()
        right = likeliest.cpu() == batch.labels[:, None]
        top_1 += right[:, 0].sum().item()
        top_5 += right.sum().item()
    return top_1 / len(data), top_5 / len(data)


def load_classifier(path: Path, train: DataSet, steps: int, machine: Machine) -> Classifier:
    """Returns the run's classifier, kept at `path`.

    If it is missing, or of other classes, steps or images, rank 0 trains it on `train`, the real
    images, and replaces the file."""
    if machine.leads:
        identity = {
            "kind": "classifier",
            "classes": list(train.classes),
            "steps": steps,
            "image_size": train.image_size,
            "signatures": zlib.crc32(train.signatures().tobytes()),
        }
        kept = load_checkpoint(path, "classifier") if path.exists() else {}
        if any(kept.get(name) != value for name, value in identity.items()):
            model = train_classifier(train, steps, 0, machine, "classifier of real images")
            save_checkpoint(path, {**identity, "model": on_cpu(model.state_dict())})
    machine.wait_for_ranks()                    # until the file is there
    return read_classifier(path, train.classes, train.image_size, machine)


def read_classifier(path: Path, classes: list[str], image_size: int,
                    machine: Machine) -> Classifier:
    """Returns the classifier that is kept at `path`. Raises UserError if it is not of images of
    these classes and this size."""
    kept = load_checkpoint(path, "classifier")
    if kept["classes"] != list(classes) or kept.get("image_size") != image_size:
        raise UserError(f"{path} is not known to be a classifier of the run's images, of "
                        f"{image_size} pixels: delete it, and evaluate.py will train it again")
    model = load_weights(Classifier(len(classes)), kept["model"], path)
    model.eval().requires_grad_(False)
    return model.to(machine.device, memory_format=machine.layout)


def load_inception(path: str | None, machine: Machine) -> nn.Module:
    """Returns the Inception-v3 that FID and IS are defined with.

    It maps images uint8 (n, 3, H, W) to features (n, 2048) and logits (n, 1008). path: the file of
    its weights; None: torch-fidelity fetches them, on rank 0. Raises UserError if the package is
    missing, the file does not hold these weights, or they cannot be fetched."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError:
        raise UserError(
            "--features inception needs torch-fidelity: pip install torch-fidelity") from None
    if path and not Path(path).is_file():
        raise UserError(f"--inception {path} does not exist: name the file "
                        f"weights-inception-2015-12-05-6726825d.pth of torch-fidelity's releases")
    if path:
        load_tensors(path)          # the package would run code in it; this admits tensors only
    with machine.first_rank_first():                            # which fetches the file
        try:
            model = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"],
                                                feature_extractor_weights_path=path)
        except RuntimeError:
            raise UserError(f"{path or 'the fetched file'} does not hold the weights of torch-"
                            f"fidelity's Inception: name another file with --inception") from None
        except OSError as error:
            raise UserError(f"torch-fidelity could not fetch Inception's weights ({error}): name "
                            f"their file with --inception") from error
    return model.to(machine.device)


def open_networks(args: argparse.Namespace, machine: Machine, train: DataSet,
                  folder: Path) -> "Networks":
    """Opens the networks that FEATURE_FLAGS ask for.

    train: the run's real images. folder: the run's. Raises UserError as load_inception() does, and
    if the flags leave no network."""
    if not args.classifier_steps and args.features == "classifier":
        raise UserError("--classifier-steps 0 leaves nothing to measure with: "
                        "add --features inception")
    if args.inception and args.features != "inception":
        raise UserError("--inception names a file of Inception's weights: add --features inception")
    # Fréchet distances are differences of large numbers, for which TF32 on a GPU is too coarse.
    torch.backends.cudnn.allow_tf32 = False
    inception = None
    if args.features == "inception":
        inception = load_inception(args.inception, machine)
    classifier = None
    if args.classifier_steps:
        name = "classifier.pt"
        if args.classifier_steps != CLASSIFIER_STEPS:
            name = f"classifier.{args.classifier_steps}.pt"
        classifier = load_classifier(folder / name, train, args.classifier_steps, machine)
    return Networks(train.classes, classifier, inception, machine)


# ------------------------------------------------------------------------------------- measurements

class Measurements(NamedTuple):
    """What was measured in the images of a set: tensors on the CPU with a row for each image."""
    features: Tensor        # (n, D) float32
    logits: Tensor          # (n, C) float32, of the network that the features are of
    sharpness: Tensor       # (n,)
    labels: Tensor          # (n,), the class that each image is of, or should be
    recognised: Tensor      # (n,) boolean: the classifier finds this class; false without one


class Networks:
    """The networks that look at images. Features are Inception's, or else the classifier's.

    classes: names of the images' classes. classifier: of these classes, or None. inception: from
    load_inception(), or None. Attributes: name, which differs for other weights; distance and
    score, what a Fréchet distance and an Inception Score of these features are called."""

    def __init__(self, classes: list[str], classifier: nn.Module | None,
                 inception: nn.Module | None, machine: Machine):
        self.classes = classes
        self.classifier = classifier
        self.inception = inception
        self.machine = machine
        if inception:
            self.name = f"Inception's ({fingerprint(inception)})"
            if classifier:
                self.name += f", and the classifier's ({fingerprint(classifier)})"
            self.distance = "FID"
            self.score = "IS"
        else:
            self.name = f"the classifier's ({fingerprint(classifier)})"
            self.distance = "FCD"
            self.score = "IS(classifier)"

    @torch.no_grad()
    def measure_batch(self, images: Tensor, labels: Tensor) -> Measurements:
        """Measures images uint8 (n, 3, S, S) of these classes (n,)."""
        floats = self.machine.to_floats(images)
        if self.inception:
            features, logits = self.inception(self.machine.put(images))
        else:
            features = self.classifier.features(floats)
            logits = self.classifier.out(features)
        if self.classifier:
            class_logits = self.classifier(floats) if self.inception else logits
            recognised = class_logits.argmax(1) == self.machine.put(labels)
        else:
            recognised = torch.zeros(len(images), dtype=torch.bool)
        measured = Measurements(features, logits, metrics.sharpness(floats), labels, recognised)
        self.machine.sync()
        return Measurements(*(tensor.cpu() for tensor in measured))

    def measure(self, rank_batches: Iterable[Batch]) -> Measurements:
        """Measures a set of images, of which these are the batches of this rank.

        Returns the measurements of the whole set, on all ranks."""
        measured = [self.measure_batch(batch.images, batch.labels) for batch in rank_batches]
        return concatenate(gather_batches(measured))


class Reference:
    """Real images, with which others are compared."""

    def __init__(self, networks: Networks, real: Measurements):
        self.networks = networks
        self.real = real
        # Large matrices are fast on a GPU; a TPU has no float64.
        on_gpu = networks.machine.device.type == "cuda"
        self.device = networks.machine.device if on_gpu else torch.device("cpu")
        self.gaussian = metrics.gaussian(real.features.to(self.device))

    def distance(self, images: Measurements) -> float:
        """Returns the Fréchet distance of the images to the real ones: FID or FCD."""
        gaussian = metrics.gaussian(images.features.to(self.device))
        return metrics.frechet_distance(gaussian, self.gaussian)

    def precision_recall(self, images: Measurements) -> tuple[float, float]:
        """Returns precision and recall of the first images of both sets."""
        features = images.features[:PRECISION_IMAGES].to(self.device)
        real_features = self.real.features[:PRECISION_IMAGES].to(self.device)
        return metrics.precision_recall(features, real_features)

    def figures(self, images: Measurements) -> dict:
        """Returns the columns of a table, {name: number}; under BY_CLASS, {class: number}."""
        score, deviation = metrics.inception_score(images.logits)
        sharpness = images.sharpness.double().mean() / self.real.sharpness.double().mean()
        row = {
            self.networks.distance: self.distance(images),
            self.networks.score: score,
            "± over splits": deviation,
            SHARPNESS: sharpness.item(),
        }
        if self.networks.classifier:
            row[RECOGNISED] = fraction_true(images.recognised)
            row[BY_CLASS] = {}
            for label, name in enumerate(self.networks.classes):
                of_class = images.recognised[images.labels == label]
                if len(of_class):
                    row[BY_CLASS][name] = fraction_true(of_class)
        return row


def fraction_true(values: Tensor) -> float:
    """Returns the fraction of booleans (n,) that are true."""
    return values.double().mean().item()
