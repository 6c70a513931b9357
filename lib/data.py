"""The data sets by name: `shapes` (drawn on the fly, the default), cifar10, imagenet, places2.

Any other name is the path of a folder of images (lib.folders). To add a data set, write a
lib.loader.DataSet such as Cifar10 below, and enter a function that opens it in DATA_SETS.
"""
import hashlib
import os
import tarfile
from pathlib import Path

import numpy as np
import torch

from lib.errors import UserError
from lib.files import download
from lib.flags import count
from lib.folders import Folder, open_folder, open_splits
from lib.imagenet import SYNSETS, by_scene, find_folders, refuse_archive
from lib.loader import DataSet, ImagesAndLabels
from lib.runtime import hashed_uniform
from lib.scan import list_images
from lib.shapes import Shapes

DATA_FLAGS = {
    "data_dir": (str, "data", "the folder of cifar10, imagenet and places2"),
    "max_pixels": (count, 178_956_970,
                   "largest image file to read, in pixels; a larger one may be a trap")}
IMAGENET_CLASSES = list(SYNSETS.values())
CIFAR_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"


class Cifar10(DataSet):
    """50,000 training and 10,000 validation images, 32 x 32, flipped at random in training.

    folder: where cifar-10-binary.tar.gz is, or is downloaded to. Raises UserError if it cannot be
    downloaded or has a wrong checksum."""

    image_size = 32
    workers = 0

    def __init__(self, split: str, folder: Path):
        path = download(CIFAR_URL, "cifar-10-binary.tar.gz", folder=Path(folder))
        if hashlib.md5(path.read_bytes()).hexdigest() != CIFAR_MD5:
            raise UserError(f"{path} has a wrong checksum, not MD5 {CIFAR_MD5}: delete it and run "
                            f"this again to download it")
        names = ["test_batch.bin"]
        if split == "train":
            names = [f"data_batch_{i}.bin" for i in range(1, 6)]
        with tarfile.open(path) as archive:
            content = [archive.extractfile(f"cifar-10-batches-bin/{name}").read() for name in names]
            classes = archive.extractfile("cifar-10-batches-bin/batches.meta.txt").read()
        records = np.frombuffer(b"".join(content), np.uint8).reshape(-1, 3073)
        self.labels = records[:, 0]                           # the first byte of each record
        self.images = records[:, 1:].reshape(-1, 3, 32, 32)
        self.classes = classes.decode().split()

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: np.ndarray, seeds: np.ndarray | None = None) -> ImagesAndLabels:
        """Returns images (B, 3, 32, 32) uint8 and labels (B,) int64."""
        images = self.images[indices]
        if seeds is not None:
            flip = hashed_uniform(3, seeds, 1)[:, 0, None, None, None] < 0.5
            images = np.where(flip, images[..., ::-1], images)
        return torch.from_numpy(images), torch.from_numpy(self.labels[indices]).long()


def open_shapes(size: int | None, data_dir: str) -> tuple[DataSet, DataSet]:
    size = size or 32
    return Shapes("train", size), Shapes("val", size)


def open_cifar10(size: int | None, data_dir: str) -> tuple[DataSet, DataSet]:
    if size not in (None, 32):
        raise UserError(f"cifar10 has images of 32 pixels, not {size}: give --image-size 32")
    return Cifar10("train", data_dir), Cifar10("val", data_dir)


def open_imagenet(size: int | None, data_dir: str) -> tuple[DataSet, DataSet]:
    return open_large("imagenet", size, data_dir)


def open_places2(size: int | None, data_dir: str) -> tuple[DataSet, DataSet]:
    return open_large("places2", size, data_dir)


# Each function takes the image size (None: the default of the set) and the folder --data-dir. It
# returns the training and the validation set.
DATA_SETS = {"shapes": open_shapes, "cifar10": open_cifar10, "imagenet": open_imagenet,
             "places2": open_places2}


def open_large(name: str, size: int | None, data_dir: str) -> tuple[DataSet, DataSet]:
    """Opens imagenet or places2 without decoding each of its million files first."""
    folders = find_folders(name, os.path.abspath(data_dir))
    splits = [list_images(folder) for folder in folders]
    if name == "places2":
        splits = [by_scene(*split) for split in zip(folders, splits, strict=True)]
    train, val = open_splits(
        os.path.commonpath(folders), folders, splits, size or 256, check=False)
    return name_synsets(train, val)


def name_synsets(train: Folder, val: Folder) -> tuple[Folder, Folder]:
    """Names the classes if all of them are called by synsets of ImageNet, such as n01440764."""
    if all(name in SYNSETS for name in train.classes):
        train.classes = [SYNSETS[name] for name in train.classes]
        val.classes = train.classes
    return train, val


def fetch_data(name: str, size: int | None, data_dir: str) -> None:
    """Downloads what open_data() with these arguments would download, before all ranks call it.

    Raises UserError as open_data() does."""
    if name == "cifar10":
        open_cifar10(size, data_dir)


def open_data(
    name: str, size: int | None = None, data_dir: str = "data",
) -> tuple[DataSet, DataSet]:
    """Returns the training and the validation set.

    name: one of DATA_SETS, or the path of a folder of images. size: S; None: the default of the
    data set, 32 for a folder. data_dir: where the named data sets are. Raises UserError for an
    unknown name or bad data."""
    if name in DATA_SETS:
        train, val = DATA_SETS[name](size, data_dir)
        if size not in (None, train.image_size):
            raise UserError(f"{name} has images of {train.image_size} pixels, not {size}: give "
                            f"--image-size {train.image_size}")
        return train, val
    check_folder(name)
    return name_synsets(*open_folder(name, size or 32))


def check_folder(name: str) -> None:
    """Raises UserError if --data names neither a data set nor a folder."""
    if not os.path.isdir(name):
        refuse_archive(name, "--data")
        names = ", ".join(DATA_SETS)
        raise UserError(f"'{name}' is no data set and no folder: --data takes {names} or a folder "
                        f"of images")


def resolve_data(name: str) -> str:
    """Returns the name of a data set unchanged, and the path of a folder made absolute."""
    return name if name in DATA_SETS else os.path.abspath(name)


def check_run_outside_data(run: str | Path, data: str) -> None:
    """Raises UserError if a run's folder lies in the folder of images that it trains on.

    Its pictures would be taken for images of another class."""
    if data in DATA_SETS:
        return
    if Path(os.path.realpath(run)).is_relative_to(os.path.realpath(data)):
        raise UserError(f"the run's folder {run} lies inside its data, {data}, and would become a "
                        f"class of it: choose another folder with --run")


def evenly_spaced(data: DataSet, count: int) -> ImagesAndLabels:
    """Returns up to `count` images and labels, spread evenly over a data set."""
    indices = torch.linspace(0, len(data) - 1, min(count, len(data))).long()
    return data.batch(indices.numpy())


def find_class(text: str, classes: list[str]) -> int:
    """Returns the label of a class, given its name, its number, or a part of its name alone.

    If any class is called by a number, numbers are names. Raises UserError if no class fits, or
    several do."""
    if text in classes:
        return classes.index(text)
    if text.isdecimal() and not any(name.isdecimal() for name in classes):
        if int(text) < len(classes):
            return int(text)
        raise UserError(f"class {text} does not exist: this run has classes 0 to "
                        f"{len(classes) - 1}")
    similar = [name for name in classes if name.lower() == text.lower()]
    if not similar and not text.isdecimal():
        similar = [name for name in classes if text.lower() in name.lower()]
    if len(similar) == 1:
        return classes.index(similar[0])
    if similar:
        raise UserError(f"class '{text}' fits several: {first_names(similar)}")
    raise UserError(f"class '{text}' does not exist: this run has {first_names(classes)}")


def first_names(names: list[str]) -> str:
    """Returns up to twelve names as a list for a message."""
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
