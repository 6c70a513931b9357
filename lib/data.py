"""Data: `shapes` (drawn on the fly, the default), `cifar10`, `imagenet`, `places2`, any folder of images.

`open_data(name, ...)` returns a (train, validation) pair of data sets with
    len(d), d.classes (names by index), d.batch(indices, draws) -> images (B, 3, S, S) uint8, labels (B,) int64
where `draws` (an integer per image, or None for none) seeds the augmentation: a batch is a pure function of its
arguments, so nothing has to be remembered to resume. `batches` makes the endless stream that training reads.
"""
import contextlib
import functools
import hashlib
import json
import os
import signal
import sys
import tarfile
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps

from lib.files import cache_folder, download, write_atomically
from lib.flags import UserError, count
from lib.runtime import cores, hashed_uniform
from lib.shapes import Shapes
from lib.terminal import Progress

DATA_FLAGS = {
    "data_dir": (str, "data", "where cifar10, imagenet and places2 are"),
    "max_pixels": (count, 178_956_970, "of an image file; one of more may be a trap that fills the memory")}
LARGE = 4_000_000                # pixels: an image of more is decoded while no other such one is in memory
ALONE = threading.Lock()
Image.core.set_block_size(1 << 26)   # malloc keeps a freed block of less for its thread, so several huge images add up
IMAGENET_CLASSES = Path(__file__).with_name("imagenet_classes.txt").read_text().splitlines()        # 1,000, by index
CIFAR_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"


class Cifar10:
    """50,000 train and 10,000 validation images, 32 x 32, from the binary archive; random flips for training.

    folder: where cifar-10-binary.tar.gz is, or is fetched to. Raises ValueError for a wrong checksum, OSError where
    the archive can be neither found nor fetched."""
    image_size, workers = 32, 0

    def __init__(self, split, folder):
        path = download(CIFAR_URL, "cifar-10-binary.tar.gz", folder=Path(folder))
        if hashlib.md5(path.read_bytes()).hexdigest() != CIFAR_MD5:
            raise UserError(f"{path} has a wrong checksum, not MD5 {CIFAR_MD5}: delete it and run again to fetch it")
        names = [f"data_batch_{i}.bin" for i in range(1, 6)] if split == "train" else ["test_batch.bin"]
        with tarfile.open(path) as archive:
            files = [archive.extractfile(f"cifar-10-batches-bin/{name}") for name in ["batches.meta.txt", *names]]
            classes, *records = [file.read() for file in files]
        records = np.frombuffer(b"".join(records), np.uint8).reshape(-1, 3073)      # a label, then 3 x 32 x 32 bytes
        self.labels, self.images = records[:, 0], records[:, 1:].reshape(-1, 3, 32, 32)
        self.classes = classes.decode().split()

    def __len__(self):
        return len(self.images)

    def batch(self, indices, draws=None):
        images = self.images[indices]
        if draws is not None:
            flip = hashed_uniform(3, draws, 1)[:, 0, None, None, None] < 0.5
            images = np.where(flip, images[..., ::-1], images)
        return torch.from_numpy(images), torch.from_numpy(self.labels[indices]).long()


def to_rgb(image):
    """A PIL image of any mode -> RGB; transparency is composited on white, 16-bit greys are scaled to 8 bits."""
    if image.mode.startswith("I") or image.mode == "F":
        pixels = np.asarray(image, np.float64)
        white = 1 if pixels.max() <= 1 else 255
        if image.mode.startswith("I;16") or pixels.max() > 255:
            white = 65535
        image = Image.fromarray((pixels / white * 255).clip(0, 255).astype(np.uint8))
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    if image.has_transparency_data:
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image)
        return white
    return image.convert("RGB")


def reduce(image, factor):
    """image.reduce(factor), a strip at a time: Pillow would make a copy of all of an RGBA image for it."""
    strips = [image.crop((0, top, image.width, min(top + 16 * factor, image.height))).reduce(factor)
              for top in range(0, image.height, 16 * factor)]
    reduced = Image.fromarray(np.concatenate(strips))
    reduced.info = image.info                         # with what exif_transpose() and to_rgb() look for
    return reduced


def read_image(path, size=None):
    """Reads a file as an upright RGB image. size: it may be decoded at a reduced scale, not below this side.

    Raises ValueError, naming the file, where it cannot be read as an image."""
    try:
        # Large images are fine; those over --max-pixels are an error.
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            if size:
                image.draft("RGB", (size, size))      # a JPEG is never decoded larger
            with ALONE if image.width * image.height > LARGE else contextlib.nullcontext():
                factor = min(image.size) // (2 * size) if size else 1
                if factor > 1 and image.mode in ("L", "RGB", "RGBA"):
                    image = reduce(image, factor)     # first, as what follows takes several copies
                return to_rgb(ImageOps.exif_transpose(image))
    except Image.DecompressionBombError as error:
        raise UserError(f"{path} is too large ({error}): reduce it; of a data set, --max-pixels admits it") from error
    except Exception as error:                        # Pillow's readers raise nearly everything on broken files
        raise UserError(f"{path} is not a readable image ({type(error).__name__}: {error})") from error


def admit_pixels(most):
    """Lets read_image() read files of so many pixels, and of no more."""
    Image.MAX_IMAGE_PIXELS = most / 2                 # Pillow warns from here on, and refuses from twice as many


def random_crop(width, height, area, aspect, across, down):
    """RandomResizedCrop's box (left, top, right, bottom): 80 to 100% of the area, aspect 3/4 to 4/3.

    The last four arguments, in [0, 1), choose it. A long image is cropped, not squeezed."""
    area, aspect = (0.8 + 0.2 * area) * width * height, np.exp((2 * aspect - 1) * np.log(4 / 3))
    w, h = min(width, np.sqrt(area * aspect)), min(height, np.sqrt(area / aspect))
    w, h = min(w, h * 4 / 3), min(h, w * 4 / 3)
    left, top = across * (width - w), down * (height - h)
    return left, top, left + w, top + h


class Folder:
    """Images of a folder: where `batch` is given draws it crops and flips at random, else it takes the central square.

    images: {path: its pixels (H, W, 3) uint8 where they are kept in memory, else None}; names: {path: class}; classes:
    sorted; size: S."""

    def __init__(self, images, names, classes, size):
        self.files, self.classes, self.image_size = list(images), classes, size
        self.labels = np.searchsorted(classes, [names[path] for path in images])
        self.pixels = [pixels for pixels in images.values() if pixels is not None] or None
        self.workers = 0 if self.pixels else cores()

    def __len__(self):
        return len(self.files)

    def batch(self, indices, draws=None):
        uniform = [None] * len(indices) if draws is None else hashed_uniform(3, draws, 5).astype(float)
        images = np.stack([self.image(i, numbers) for i, numbers in zip(indices, uniform)])
        return torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(self.labels[indices]).long()

    def image(self, index, uniform):
        """(S, S, 3) uint8. uniform: five numbers in [0, 1) for the augmentation, or None for none."""
        image = Image.fromarray(self.pixels[index]) if self.pixels else read_image(self.files[index], self.image_size)
        size = (self.image_size, self.image_size)
        if uniform is None:
            return np.asarray(ImageOps.fit(image, size, Image.Resampling.BICUBIC))
        image = image.resize(size, Image.Resampling.BICUBIC, box=random_crop(*image.size, *uniform[:4]))
        return np.asarray(ImageOps.mirror(image) if uniform[4] < 0.5 else image)


def check_files(root, files, size):
    """Decodes every file once: -> {path: its reduced pixels where `size` is small, else None} of the readable ones.

    Unreadable files are named on stderr and left out. Raises ValueError where they are more than 1%."""
    keep = 2 * size if size <= 64 else None           # the shorter side of what is kept in memory, to be read but once
    names, images = hashlib.md5("\n".join(map(str, files)).encode()).hexdigest(), dict.fromkeys(files)

    def problem_of(path):
        try:
            image = read_image(path, keep)
        except ValueError as error:
            return str(error)
        if keep and min(image.size) > keep:
            reduced = [round(side * (keep / min(image.size))) for side in image.size]
            image = image.resize(reduced, Image.Resampling.BICUBIC, reducing_gap=3)
        images[path] = np.asarray(image) if keep else None

    def decode_all():
        bad, progress = {}, Progress(f"reading {root}", len(files), stream=sys.stderr)
        with ThreadPoolExecutor(cores()) as pool:                           # Pillow decodes outside Python's lock
            for done, (path, problem) in enumerate(zip(files, pool.map(problem_of, files)), 1):
                if problem:
                    bad[str(path)] = problem
                if sys.stderr.isatty():
                    progress.show(done)
        return {"files": names, "bad": bad}

    found = decode_all() if keep else remembered("bad", root, lambda kept: kept["files"] == names, decode_all)
    bad = found["bad"]
    for message in bad.values():
        print(f"left out: {message}", file=sys.stderr)
    if bad:
        print(f"left out {len(bad)} of {len(files)} files in {root}", file=sys.stderr)
    if len(bad) > 0.01 * len(files):
        raise UserError(f"{len(bad)} of {len(files)} files in {root} are not readable images, over 1%; "
                         f"remove them, the first is {next(iter(bad))}")
    return {path: pixels for path, pixels in images.items() if str(path) not in bad}


def remembered(kind, root, valid, make):
    """What make() returns, a JSON value, or what is in the cache folder, where that is valid(): to scan a million files
    takes minutes."""
    path = cache_folder() / f"{kind}-{hashlib.md5(str(root).encode()).hexdigest()}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):     # where nothing is there, or something else
        found = json.loads(path.read_text())
        if valid(found):
            return found
    made = make()
    try:
        write_atomically(path, lambda file: file.write(json.dumps(made).encode()))
    except OSError as error:
        print(f"the scan of {root} could not be kept ({error.__cause__}): the next start scans again", file=sys.stderr)
    return made


def list_files(root):
    """{path: class} of every file in the first-level subfolders of root, the classes (or in root, where it has none,
    which is then the only class), sorted; hidden ones are passed over. Raises ValueError where there are none."""
    def unchanged(scan):
        return all(os.stat(folder).st_mtime_ns == then for folder, then in scan["folders"].items())

    def scan():
        folders, names = {}, []
        for folder, inner, here in os.walk(root):
            inner[:] = [name for name in inner if not name.startswith(".")]
            folders[folder] = os.stat(folder).st_mtime_ns                   # changes whenever an entry comes or goes
            names += [os.path.join(folder, name) for name in here if not name.startswith(".")]
        return {"folders": folders, "files": sorted(names)}

    files = [Path(name) for name in remembered("scan", root, unchanged, scan)["files"]]
    nested = {path: path.relative_to(root).parts[0] for path in files if path.parent != root}
    if nested and len(nested) < len(files):
        print(f"passed over {len(files) - len(nested)} files in {root} that lie in no class folder", file=sys.stderr)
    if not files:
        raise UserError(f"{root} holds no images; it should hold a subfolder of images for each class")
    return nested or dict.fromkeys(files, root.name)


def open_folder(root, size, check=True):
    """-> (train, validation) Folder: of train/ and val/ where both are inside, else a fixed hash of each path holds out
    5%. check: decode every file once, and leave out what cannot be read.

    Raises ValueError where there are no images or too many bad ones, or val/ has other classes than train/."""
    if not os.path.isdir(root):
        raise UserError(f"'{root}' is no data set and no folder; --data takes shapes, cifar10, imagenet, places2 or "
                         f"a folder of images")
    root = Path(root).absolute()                      # the scans that are kept are found from any working folder
    bases = [root / "train", root / "val"]
    if not all(base.is_dir() for base in bases):
        bases = [root]
    listed = [list_files(base) for base in bases]
    classes = sorted(set(listed[0].values()))
    for name in sorted(set(classes) ^ set(listed[-1].values())):
        here, missing = bases if name in classes else reversed(bases)
        raise UserError(f"class '{name}' is in {here} but not in {missing}: both need the same class folders")
    parts = [check_files(base, files, size) if check else dict.fromkeys(files) for base, files in zip(bases, listed)]
    if len(parts) == 1:
        images = parts[0]
        digests = {path: hashlib.md5(str(path.relative_to(root)).encode()).hexdigest() for path in images}
        held_out = sorted(path for path in images if int(digests[path], 16) % 20 == 0) or list(images)[:1]
        val = {path: images[path] for path in held_out}
        parts = [{path: images[path] for path in images if path not in val} or images, val]
    names = listed[0] | listed[-1]
    return tuple(Folder(images, names, classes, size) for images in parts)


def open_data(name, size=None, folder="data"):
    """-> (train, validation). name: shapes, cifar10, imagenet, places2, or the path of a folder of images. size: S, for
    folders (32). folder: where the named data sets are.

    Raises ValueError for an unknown name or bad data, OSError where it cannot be read."""
    if name in ("shapes", "cifar10") and size not in (None, 32):
        raise UserError(f"{name} has images of 32 pixels, not {size}: leave --image-size out")
    if name == "shapes":
        return Shapes("train"), Shapes("val")
    if name == "cifar10":
        return Cifar10("train", folder), Cifar10("val", folder)
    if name not in ("imagenet", "places2"):
        return open_folder(name, size or 32)
    root = Path(folder, name)
    if not (root / "train").is_dir() or not (root / "val").is_dir():
        classes = "1,000 WNIDs, such as n01440764" if name == "imagenet" else "365 classes"
        raise UserError(f"{root} should hold train/CLASS/*.JPEG and val/CLASS/*.JPEG, with a folder for each of the "
                         f"{classes}; put it there or name its place with --data-dir")
    train, val = open_folder(root, size or 256, check=False)          # its million files are known to be whole
    if name == "imagenet" and len(train.classes) == 1000:             # the folders are WNIDs: show what they stand for
        train.classes = val.classes = IMAGENET_CLASSES
    return train, val


def spread(data, count):
    """Images and labels of up to `count` images, evenly spread over a data set, which may be sorted by class."""
    return data.batch(torch.linspace(0, len(data) - 1, min(count, len(data))).long().numpy())


def find_class(text, classes):
    """A class's id, or any unambiguous part of its name -> its index. Raises ValueError."""
    if text.isdigit():
        if int(text) < len(classes):
            return int(text)
        raise UserError(f"class {text} does not exist: this run has classes 0 to {len(classes) - 1}")
    exact = [i for i, name in enumerate(classes) if name.lower() == text.lower()]
    found = exact or [i for i, name in enumerate(classes) if text.lower() in name.lower()]
    if len(found) == 1:
        return found[0]
    shown = ", ".join(classes[i] for i in (found or range(len(classes)))[:12])
    raise UserError(f"class '{text}' fits several: {shown}" if found else
                     f"unknown class '{text}'; this run has {shown}{', ...' if len(classes) > 12 else ''}")


@functools.lru_cache(maxsize=1)
def shuffled(seed, epoch, length):
    """The indices of an epoch, in its order."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(length)


class Steps:
    """Batch number `step` of an endless stream of shuffled epochs: a pure function of (seed, step).

    rank, world: each rank gets its own share of every batch, whatever their number."""

    def __init__(self, data, size, seed, rank=0, world=1):
        self.data, self.size, self.seed, self.rank, self.share = data, size, seed, rank, size // world

    def __getitem__(self, step):
        first = step * self.size + self.rank * self.share                   # places in the stream of all epochs
        places, length = range(first, first + self.share), len(self.data)
        indices = np.array([shuffled(self.seed, place // length, length)[place % length] for place in places])
        return self.data.batch(indices, np.array(places) + (self.seed % (1 << 22) << 40))


def batches(data, size, seed, first, last, workers=None, machine=None):
    """Iterates over steps first .. last - 1 of the stream: (images (B, 3, S, S) uint8, labels (B,) int64).

    workers: processes that read ahead; by default none where images are drawn or in memory, else one per core.
    machine: whose rank and device the batches are for (runtime.Machine; None: one process on the CPU)."""
    rank, world, cuda = (machine.rank, machine.world, machine.device.type == "cuda") if machine else (0, 1, False)
    return iter(loader(Steps(data, size, seed, rank, world), range(first, last), data, workers, cuda))


def loader(dataset, sampler, data, workers=None, pin_memory=False):
    """A DataLoader of dataset[i] for every i of `sampler`. workers: as for batches(); None: as suits `data`."""
    workers = data.workers if workers is None else workers
    return torch.utils.data.DataLoader(dataset, batch_size=None, sampler=sampler, num_workers=workers,
                                       pin_memory=pin_memory, worker_init_fn=ignore_signals)


def ignore_signals(worker):
    """Ctrl-C goes to the whole process group: the training loop answers it, and its readers must outlive that."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
