"""The networks that evaluate.py looks at images with: a small classifier, and Inception.

Trained on a run's real images, the classifier names what samples show, and its pooled activations are features: Inception's
weights are not always at hand, and say little about drawn shapes. Trained on samples alone, it is the classification accuracy
score (CAS). Last, the two kinds of data sets that it is trained and tested on.
"""
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import runtime
from data import batches, loader


class Classifier(nn.Module):
    """(B, 3, S, S) in [0, 1] -> class logits (B, classes): four residual stages, each halving the resolution."""

    def __init__(self, classes, width=24):
        super().__init__()
        widths = [width, 2 * width, 4 * width, 4 * width]
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.down = nn.ModuleList([nn.Conv2d(a, b, 3, 2, 1) for a, b in zip([width] + widths, widths)])
        self.same = nn.ModuleList([nn.Sequential(nn.BatchNorm2d(w), nn.ReLU(), nn.Conv2d(w, w, 3, padding=1)) for w in widths])
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


def to_floats(images, machine):
    """uint8 images (n, 3, S, S) -> floats in [0, 1] on the machine's device, in its layout."""
    return images.to(machine.device, non_blocking=True).float().div(255).contiguous(memory_format=machine.layout)


def train_classifier(data, steps, seed, machine, name):
    """Trains on a data set, in batches of 128 -> a Classifier in eval mode. name: what to call it in the progress lines."""
    torch.manual_seed(seed)
    model = Classifier(len(data.classes)).to(machine.device, memory_format=machine.layout)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    for step, (images, labels) in enumerate(batches(data, 128, seed, 0, steps)):
        optimizer.param_groups[0]["lr"] = runtime.learning_rate(step, 3e-3, 50, steps, decay=True)
        with machine.autocast():
            logits = model(to_floats(images, machine))
        loss = F.cross_entropy(logits.float(), labels.to(machine.device), label_smoothing=0.1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        machine.sync(alone=True)
        if (step + 1) % 100 == 0 or step + 1 == steps:
            print(f"{name}: step {step + 1}/{steps}  loss {loss.item():.4f}", flush=True)
    return model.eval()


@torch.no_grad()
def accuracy(model, data, machine):
    """Of a classifier on images of its classes, a Chosen -> (top-1, top-5), floats in [0, 1]."""
    right = torch.zeros(5, dtype=torch.float64, device=machine.device)
    for images, labels in data.read(range(math.ceil(len(data) / data.size))):
        with machine.autocast():
            logits = model(to_floats(images, machine))
        best = logits.topk(min(5, logits.shape[1]), 1).indices                                          # (n, 5)
        right[:best.shape[1]] += (best == labels.to(machine.device)[:, None]).sum(0)
        machine.sync(alone=True)
    first, *others = (right / len(data)).tolist()
    return first, first + sum(others)


def load_classifier(path, train, steps, machine):
    """The run's own classifier, kept at `path`: trained on its real images by rank 0 where it is not there yet."""
    model = Classifier(len(train.classes))
    expected = {"kind": "classifier", "classes": list(train.classes), "steps": steps}
    kept = runtime.load_checkpoint(path, "classifier") if path.exists() else {}
    if machine.rank == 0 and not expected.items() <= kept.items():
        trained = train_classifier(train, steps, 0, machine, "classifier of real images")
        runtime.save_checkpoint(path, expected | {"model": trained.state_dict()})
    machine.wait_for_ranks()
    weights = runtime.load_checkpoint(path, "classifier")["model"]
    return runtime.load_weights(model, weights, path).eval().requires_grad_(False).to(machine.device, memory_format=machine.layout)


def load_inception(path, machine):
    """Inception-v3 as FID and IS were defined with, torch-fidelity's: images uint8 -> features (n, 2048), logits (n, 1008).

    path: of its weights; None: torch-fidelity fetches them, on rank 0. Raises ValueError without the package or for a file
    that is none, OSError where the weights cannot be had."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError:
        raise ValueError("--features inception needs torch-fidelity: pip install torch-fidelity") from None
    if path and not Path(path).is_file():
        raise FileNotFoundError(f"--inception {path} does not exist: name the file weights-inception-2015-12-05-6726825d.pth of "
                                f"torch-fidelity's releases")
    if path:
        runtime.load_tensors(path)                   # refuses all but a plain state dict: the package would run code in it
    if machine.rank > 0:
        machine.wait_for_ranks()
    try:
        model = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=path)
    except RuntimeError:
        raise ValueError(f"{path or 'what was fetched'} does not hold the weights of torch-fidelity's Inception") from None
    except OSError as error:
        raise OSError(f"torch-fidelity could not fetch Inception's weights ({error}): name their file with --inception") from error
    if machine.rank == 0:
        machine.wait_for_ranks()
    return model.to(machine.device)


class Chosen(torch.utils.data.Dataset):
    """Images of a data set at `indices`, as a data set of their own, never augmented. [b]: batch number b, of `size` images."""

    def __init__(self, data, indices, size):
        self.data, self.indices, self.size = data, indices, size
        self.classes, self.workers, self.pixels = data.classes, data.workers, getattr(data, "pixels", None)

    def __len__(self):
        return len(self.indices)

    def batch(self, places, draws=None):
        return self.data.batch(self.indices[places])

    def __getitem__(self, b):
        return self.batch(np.arange(b * self.size, min((b + 1) * self.size, len(self))))

    def read(self, numbers):
        """Iterates over the batches of these numbers: images uint8 (n, 3, S, S), labels (n,)."""
        return iter(loader(self, list(numbers), self))


class Drawn:
    """Samples as a data set: tokens (n, N) and labels (n,), which `restore` turns into images uint8 where they are asked for.

    Small sets are turned once and kept (up to 1 GiB); a large one would fill the memory."""
    workers = 0

    def __init__(self, tokens, labels, classes, restore):
        self.tokens, self.labels, self.classes, self.restore, self.images = tokens, labels, classes, restore, None
        if len(tokens) * restore(tokens[:1]).numel() < 1 << 30:
            self.images = torch.cat([restore(part) for part in tokens.split(100)])

    def __len__(self):
        return len(self.tokens)

    def batch(self, indices, draws=None):
        images = self.restore(self.tokens[indices]) if self.images is None else self.images[indices]
        return images, self.labels[indices]
