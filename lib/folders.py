"""Folders of images as data sets: which images train and which validate, and their batches."""
import hashlib
import os
import sys

import numpy as np
import torch
from PIL import Image, ImageOps

from lib.flags import UserError, memory
from lib.image_files import random_crop, read_image
from lib.loader import ImagesAndLabels
from lib.runtime import cores, hashed_uniform
from lib.scan import (
    MOST_BROKEN,
    Listing,
    as_bytes,
    check_all,
    decode_all,
    list_images,
    size_and_time,
)

SPLITS = ["train", "val", "valid", "validation", "test"]      # the first of the last four validates


class Folder:
    """Images of a folder: crops, flipped at random, if a batch is given draws; else the centres.

    root: the folder. files: paths. labels: (len(files),) ints. classes: names by label. size: S.
    pixels: the decoded images (H, W, 3) uint8, or None to read the files for each batch.
    fixed: the files never change; see signatures()."""

    def __init__(self, root: str, files: list[str], labels: np.ndarray, classes: list[str],
                 size: int, pixels: list[np.ndarray] | None = None, fixed: bool = False):
        self.root = root
        self.files = files
        self.labels = labels
        self.classes = classes
        self.image_size = size
        self.pixels = pixels
        self.fixed = fixed
        self.workers = 0 if pixels else cores()
        # Which files turned out to be broken, in memory that reader processes share.
        self.broken = torch.zeros(len(files), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.files)

    def batch(self, indices: np.ndarray, draws: np.ndarray | None = None) -> ImagesAndLabels:
        """Returns images (B, 3, S, S) uint8 and labels (B,) int64. draws: (B,) ints seed the crops.

        A broken file is named on stderr and replaced by the next whole one. Raises UserError once
        more than 1% of the files have turned out to be broken."""
        uniform = None
        if draws is not None:
            uniform = hashed_uniform(3, draws, 5).astype(float)
        squares = []
        used = []
        for place, wanted in enumerate(indices):
            image, index = self.read(wanted)
            square = self.centre(image) if draws is None else self.augment(image, uniform[place])
            squares.append(square)
            used.append(index)
        labels = torch.from_numpy(self.labels[used]).long()
        return torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2), labels

    def read(self, index: int) -> tuple[Image.Image, int]:
        """Returns the image at an index, or the next whole one after it; and the index of that."""
        if self.pixels:
            return Image.fromarray(self.pixels[index]), index
        while True:
            if not self.broken[index]:
                try:
                    return read_image(self.files[index], self.image_size), index
                except UserError as error:
                    self.note_broken(index, error)
            index = (index + 1) % len(self.files)

    def note_broken(self, index: int, error: UserError) -> None:
        """Names a broken file on stderr. Raises UserError if it is one too many."""
        self.broken[index] = True
        count = int(self.broken.sum())
        if count > MOST_BROKEN * len(self.files):
            raise UserError(f"{error} ({count} of {len(self.files)} images in {self.root} are "
                            f"broken, over 1%)")
        print(f"passed over: {error}", file=sys.stderr, flush=True)

    def centre(self, image: Image.Image) -> np.ndarray:
        """Returns the square in the centre of an image, (S, S, 3) uint8."""
        size = (self.image_size, self.image_size)
        return np.asarray(ImageOps.fit(image, size, Image.Resampling.BICUBIC))

    def augment(self, image: Image.Image, uniform: np.ndarray) -> np.ndarray:
        """Returns a random crop of an image, flipped or not, (S, S, 3) uint8.

        uniform: five numbers in [0, 1) that choose it."""
        box = random_crop(*image.size, *uniform[:4])
        size = (self.image_size, self.image_size)
        crop = image.resize(size, Image.Resampling.BICUBIC, box=box)
        return np.asarray(ImageOps.mirror(crop) if uniform[4] < 0.5 else crop)

    def signatures(self) -> np.ndarray:
        """Returns a hash (uint64) of each image's path, label, size and time of change.

        If the files are fixed, of path and label alone: to ask for the times of a million files on
        a network disk takes minutes."""
        digests = []
        for path, label in zip(self.files, self.labels.tolist(), strict=True):
            status = [] if self.fixed else size_and_time(path)
            text = f"{path.removeprefix(self.root)} {label} {status}"
            digests.append(hashlib.blake2b(as_bytes(text), digest_size=8).digest())
        return np.frombuffer(b"".join(digests), np.uint64)


def open_folder(root: str, size: int, check: bool = True) -> tuple[Folder, Folder]:
    """Returns the training and validation images of a folder with a subfolder for each class.

    A folder of such folders, train/ and val/ (valid/, validation/ or test/), is already split;
    otherwise 5% of each class is held out. size: S. check: decode every file once, and leave out
    what is broken. Raises UserError if there are no images, too many broken ones, or train/ and
    val/ have different classes."""
    root = os.path.abspath(root)                  # kept scans are found from any working folder
    folders = split_folders(root)
    listings = [list_images(folder) for folder in folders]
    if len(listings) == 2:
        check_same_classes(folders, listings)
    images = [readable_images(*pair, size, check) for pair in zip(folders, listings, strict=True)]
    class_of = {}
    for listing in listings:
        class_of.update(zip(listing.files, listing.names, strict=True))
    classes = nonempty_classes(root, listings[0].classes, {class_of[path] for path in images[0]})
    if len(images) == 2:
        train, val = images
    else:
        train, val = hold_out(root, images[0], class_of)
    return (as_data_set(root, train, class_of, classes, size, fixed=not check),
            as_data_set(root, val, class_of, classes, size, fixed=not check))


def as_data_set(root: str, images: dict[str, np.ndarray | None], class_of: dict[str, str],
                classes: list[str], size: int, fixed: bool) -> Folder:
    """Returns the images {path: pixels or None} as a Folder, without those of other classes."""
    label_of = {name: label for label, name in enumerate(classes)}
    files = [path for path in images if class_of[path] in label_of]
    labels = np.array([label_of[class_of[path]] for path in files])
    if not files:
        raise UserError(f"{root} has no readable image for training or for validation: add some")
    pixels = [images[path] for path in files]
    in_memory = pixels[0] is not None
    return Folder(root, files, labels, classes, size, pixels if in_memory else None, fixed)


def split_folders(root: str) -> list[str]:
    """Returns the folders of training and validation images; [root] if its subfolders are classes.

    Raises UserError for a root that does not exist, or holds val/ and test/ but no train/."""
    if not os.path.isdir(root):
        raise UserError(f"'{root}' does not exist or is not a folder: name a folder of images")
    subfolders = {entry.name.lower(): entry.path for entry in os.scandir(root) if entry.is_dir()}
    splits = [name for name in SPLITS if name in subfolders]
    if splits == ["train"] and len(subfolders) == 1:
        return [subfolders["train"]]
    if len(splits) < 2:
        return [root]
    if splits[0] != "train":
        raise UserError(f"{root} holds {splits[0]}/ and {splits[1]}/, but no train/: add it, or "
                        f"rename them if they are classes")
    return [subfolders["train"], subfolders[splits[1]]]


def check_same_classes(folders: list[str], listings: list[Listing]) -> None:
    """Raises UserError if one of two folders lacks a class of the other."""
    for here, there in ((0, 1), (1, 0)):
        missing = sorted(set(listings[here].classes) - set(listings[there].classes))
        if missing:
            raise UserError(f"class '{missing[0]}' is in {folders[here]} but not in "
                            f"{folders[there]}: both need the same class folders")


def readable_images(root: str, listing: Listing, size: int,
                    check: bool) -> dict[str, np.ndarray | None]:
    """Returns {path: pixels, if small images are kept in memory, else None} of the readable files.

    size: S. check: decode each file; otherwise all count as readable. Raises UserError if too many
    are broken."""
    if not check:
        return dict.fromkeys(listing.files)
    if size <= 64 and fits_in_memory(root, len(listing.files), 2 * size):
        return decode_all(root, listing.files, 2 * size)
    return dict.fromkeys(check_all(root, listing.files, size))


def fits_in_memory(root: str, count: int, side: int) -> bool:
    """Returns whether so many images of this shorter side take less than a third of the memory.

    Every process keeps a copy of its own. If they do not fit, says so on stderr."""
    needed = count * side * side * 4 // 3 * 3        # 4:3, in three bytes a pixel
    needed *= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if needed <= memory() / 3:
        return True
    print(f"{root} would take {needed / 1e9:.3g} GB decoded, over a third of the memory: its "
          f"images are read from the disk each time", file=sys.stderr)
    return False


def nonempty_classes(root: str, classes: list[str], with_images: set[str]) -> list[str]:
    """Returns the classes that have a readable training image, and names the others on stderr."""
    for name in classes:
        if name not in with_images:
            print(f"left out: class '{name}' of {root} has no readable image", file=sys.stderr)
    return [name for name in classes if name in with_images]


def hold_out(root: str, images: dict[str, np.ndarray | None],
             class_of: dict[str, str]) -> tuple[dict, dict]:
    """Splits images {path: anything} into training and validation images: 5% of each class.

    Hashes of the paths choose them, so they are the same on every machine. Each class keeps an
    image for training; if every class has but one, the first image does both."""
    by_class = {}
    for path in images:
        by_class.setdefault(class_of[path], []).append(path)
    held_out = set()
    prefix = os.path.join(root, "")
    for name, files in by_class.items():
        # Rounded up in as many classes as the fraction says: of ten images, one in every second.
        count = int(len(files) / 20 + hash_of(name) / 2 ** 128)
        count = min(count, len(files) - 1)
        in_order_of_hash = sorted((hash_of(path.removeprefix(prefix)), path) for path in files)
        held_out.update(path for _, path in in_order_of_hash[:count])
    if not held_out:
        largest = max(by_class.values(), key=len)
        if len(largest) == 1:
            return images, {largest[0]: images[largest[0]]}
        held_out = {largest[0]}
    train = {path: pixels for path, pixels in images.items() if path not in held_out}
    val = {path: pixels for path, pixels in images.items() if path in held_out}
    return train, val


def hash_of(text: str) -> int:
    """Returns the 128 bits of a text's MD5 hash."""
    return int(hashlib.md5(as_bytes(text)).hexdigest(), 16)
