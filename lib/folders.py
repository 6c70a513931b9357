"""Folders of images as data sets: which images train and which validate, and their batches."""
import hashlib
import os
import sys

import numpy as np
import torch
from PIL import Image, ImageOps

from lib.errors import UserError, memory
from lib.image_files import random_crop, read_image
from lib.imagenet import label_flat
from lib.loader import ImagesAndLabels
from lib.runtime import cores, hashed_uniform
from lib.scan import (
    MOST_BROKEN,
    decode_readable,
    find_readable,
    hash_of,
    holds_images,
    is_folder,
    list_folder,
    list_images,
    natural_order,
    size_and_time,
)

SMALL = 64                  # pixels; images up to this size are kept decoded, if they fit in memory
SPLITS = ["train", "val", "valid", "validation", "test"]      # the first of the last four validates


class Folder:
    """Images of a folder: random crops, half of them flipped, if a batch is given seeds; otherwise
    the centres.

    root: the folder, for messages. classes: names by label. by_class: {class: paths}. size: S.
    pixels: {path: decoded image (H, W, 3) uint8}; {} to read the files for each batch.
    fixed: the files never change; see signatures()."""

    def __init__(self, root: str, classes: list[str], by_class: dict[str, list[str]], size: int,
                 pixels: dict[str, np.ndarray], fixed: bool):
        files = []
        for name in classes:
            files += map(os.fsencode, by_class[name])
        counts = [len(by_class[name]) for name in classes]
        # In an array, since reader processes share it. Of a list each would copy all names in time,
        # as Python counts the references to a name beside it.
        files = np.array(files)
        order = np.argsort(files)
        self.root = root
        self.files = files[order]                           # paths as bytes
        self.labels = np.repeat(np.arange(len(classes)), counts)[order]
        self.classes = classes
        self.image_size = size
        self.pixels = pixels
        self.fixed = fixed
        self.most_pixels = Image.MAX_IMAGE_PIXELS           # --max-pixels; see admit_pixels()
        self.workers = 0 if pixels else cores()
        # Which files turned out to be broken, in memory that reader processes share.
        self.broken = torch.zeros(len(self.files), dtype=torch.bool).share_memory_()

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        Image.MAX_IMAGE_PIXELS = self.most_pixels           # in a reader process that is not forked

    def __len__(self) -> int:
        return len(self.files)

    def path(self, index: int) -> str:
        """Returns the path of the image at an index."""
        return os.fsdecode(self.files[index])

    def batch(self, indices: np.ndarray, seeds: np.ndarray | None = None) -> ImagesAndLabels:
        """Returns images (B, 3, S, S) uint8 and labels (B,) int64. seeds: (B,) ints, of the crops.

        A broken file is named on stderr and replaced by the next readable one. Raises UserError
        once more than 1% of the files have turned out to be broken."""
        if seeds is not None:
            uniform = hashed_uniform(3, seeds, 5).astype(float)
        squares = []
        used = []
        for place, wanted in enumerate(indices):
            image, index = self.read(wanted)
            used.append(index)
            if seeds is None:
                squares.append(self.centre(image))
            else:
                squares.append(self.augment(image, uniform[place]))
        labels = torch.from_numpy(self.labels[used]).long()
        return torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2), labels

    def read(self, index: int) -> tuple[Image.Image, int]:
        """Returns the image at an index, or the next readable one; and the index of that."""
        if self.pixels:
            return Image.fromarray(self.pixels[self.path(index)]), index
        while True:                   # note_broken() raises long before all files are broken
            if not self.broken[index]:
                try:
                    return read_image(self.path(index), self.image_size), index
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

        If the files are fixed, it is of path and label alone: to ask a network disk for the times
        of a million files takes minutes."""
        root = os.fsencode(self.root)
        hashes = []
        for path, label in zip(self.files.tolist(), self.labels.tolist(), strict=True):
            status = [] if self.fixed else size_and_time(path)
            text = path.removeprefix(root) + f" {label} {status}".encode()
            hashes.append(hashlib.md5(text).digest()[8:])
        return np.frombuffer(b"".join(hashes), ">u8").astype(np.uint64)


def open_folder(root: str, size: int, check: bool = True) -> tuple[Folder, Folder]:
    """Returns the training and validation images of a folder with a subfolder for each class.

    A folder of such folders, train/ and val/ (valid/, validation/ or test/), is already split;
    otherwise 5% of each class is held out. size: S. check: decode every file once, and leave out
    what is broken. Raises UserError if there are no images, too many broken ones, or train/ and
    val/ have different classes."""
    root = os.path.abspath(root)
    folders = split_folders(root)
    splits = [list_images(folder) for folder in folders]
    return open_splits(root, folders, splits, size, check)


def open_splits(root: str, folders: list[str], splits: list[dict[str, list[str]]], size: int,
                check: bool) -> tuple[Folder, Folder]:
    """Returns the training and validation images of folders, or of one, whose images are listed.

    folders: absolute. splits: {class: paths} of each. The others and UserError: see open_folder().
    """
    if is_flat(folders[-1], splits[-1]) and not is_flat(folders[0], splits[0]):
        images, = splits[1].values()
        splits = [splits[0], label_flat(folders[1], images, splits[0])]
    different = sorted(splits[0].keys() ^ splits[-1].keys())
    if different:
        raise UserError(f"class '{different[0]}' is in only one of {folders[0]} and {folders[1]}: "
                        f"both need the same class folders")
    pixels = {}
    if check:
        splits, pixels = leave_out_broken(root, splits, size)
    if len(splits) == 2:
        train, val = splits
    else:
        train, val = hold_out(root, splits[0])

    classes = []
    for name in sorted(train, key=natural_order):
        if train[name]:
            classes.append(name)
        else:
            print(f"left out: class '{name}' of {root} has no readable image", file=sys.stderr)
    if not any(val[name] for name in classes):
        raise UserError(f"{root} has no readable image for training or for validation: add some")
    return (Folder(root, classes, train, size, pixels, fixed=not check),
            Folder(root, classes, val, size, pixels, fixed=not check))


def split_folders(root: str) -> list[str]:
    """Returns the folders of training and validation images; [root] if its subfolders are classes.

    Raises UserError if it holds two validation folders, such as val/ and test/, but no train/."""
    subfolders = {entry.name.lower(): entry.path for entry in list_folder(root) if is_folder(entry)}
    splits = [name for name in SPLITS if name in subfolders]
    if splits == ["train"]:
        others = [path for name, path in subfolders.items() if name != "train"]
        if not any(map(holds_images, others)):
            return [subfolders["train"]]
    if len(splits) < 2:
        return [root]
    if splits[0] != "train":
        raise UserError(f"{root} holds {splits[0]}/ and {splits[1]}/, but no train/: add it, or "
                        f"rename them if they are classes")
    return [subfolders["train"], subfolders[splits[1]]]


def is_flat(folder: str, by_class: dict[str, list[str]]) -> bool:
    """Returns whether the images of a folder, as list_images() lists them, are in no class folder.

    It mixes no images in class folders with others, so the first one tells."""
    first = next(iter(by_class.values()))
    return len(by_class) == 1 and bool(first) and os.path.dirname(first[0]) == folder


def leave_out_broken(root: str, splits: list[dict[str, list[str]]],
                     size: int) -> tuple[list[dict[str, list[str]]], dict[str, np.ndarray]]:
    """Decodes all images. Returns (splits without broken files, {path: pixels}).

    splits: {class: paths} of one or two folders. The pixels are {} unless the size is at most
    SMALL and they fit in memory; as they are reduced first, crops of them differ a little from
    crops of the files. Raises UserError if too many are broken."""
    files = []
    for by_class in splits:
        for paths in by_class.values():
            files += paths
    if size <= SMALL and fits_in_memory(root, len(files), 2 * size):
        pixels = decode_readable(root, files, 2 * size)
        readable = set(pixels)
    else:
        pixels = {}
        readable = set(find_readable(root, files, size))
    whole = []
    for by_class in splits:
        whole.append({})
        for name, paths in by_class.items():
            whole[-1][name] = [path for path in paths if path in readable]
    return whole, pixels


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


def hold_out(root: str, by_class: dict[str, list[str]]) -> tuple[dict, dict]:
    """Splits images {class: paths} into those of training and of validation: 5% of each class.

    Hashes of the paths choose them, so they are the same on every machine. Each class keeps an
    image for training; if every class has but one, the first image does both."""
    train = {}
    val = {}
    prefix = os.path.join(root, "")
    for name, files in by_class.items():
        # Rounded up in as many classes as the fraction says: of ten images, one in every second.
        count = int(len(files) / 20 + hash_of(name) / 2 ** 128)
        count = max(0, min(count, len(files) - 1))
        by_hash = sorted((hash_of(path.removeprefix(prefix)), path) for path in files)
        in_order = [path for _, path in by_hash]
        val[name] = in_order[:count]
        train[name] = in_order[count:]
    if not any(val.values()):
        sizes = {name: len(files) for name, files in by_class.items()}
        largest = max(sizes, key=sizes.get)
        val[largest] = by_class[largest][:1]
        if sizes[largest] > 1:
            train[largest].remove(by_class[largest][0])
    return train, val
