"""Data: `shapes` (drawn on the fly, the default), `cifar10`, `imagenet`, `places2`, any folder of images.

`open_data(name, ...)` returns a (train, validation) pair of data sets with
    len(d), d.classes (names by index), d.batch(indices, draws) -> images (B, 3, S, S) uint8, labels (B,) int64
where `draws` (an integer per image, or None for none) seeds the augmentation: a batch is a pure function of its
arguments, so nothing has to be remembered to resume. `batches` makes the endless stream that training reads.
"""
import hashlib
import json
import os
import signal
import sys
import tarfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps

from downloads import cache_folder, download

SPLITS = ("train", "val")


def hashed_uniform(key, indices, count):
    """Uniform numbers in [0, 1), float32 (len(indices), count): a pure function of (key, index, column).

    A counter hashed by splitmix64 (Steele et al. 2014): no generator to seed, and vectorised over the images."""
    with np.errstate(over="ignore"):
        x = np.asarray(indices, np.uint64)[:, None] * np.uint64(count) + np.arange(count, dtype=np.uint64)
        x = (x + np.uint64(key) * np.uint64(0xD1342543DE82EF95)) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    return (x >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24)


# --------------------------------------------------------------------------------------------------------- shapes

SHAPES = "ball box cone fish ring cross heart moon house tree".split()


def outline(name, x, y):
    """Signed distance to an object's outline, negative inside, in units of its size, y up; and to its second part.

    The second part (a roof, a tail, a trunk) gets a colour of its own; None where there is none."""
    def box(x, y, w, h):
        return np.maximum(np.abs(x) - w, np.abs(y) - h)

    def wedge(x, y, top, bottom, w):                               # isosceles triangle of half width w
        slope = np.hypot(top - bottom, w)
        return np.maximum((np.abs(x) * (top - bottom) + (y - top) * w) / slope, bottom - y)

    if name == "ball":
        return np.hypot(x, y) - 0.85, None
    if name == "box":
        return box(x, y, 0.72, 0.72), None
    if name == "cone":
        return wedge(x, y, 0.95, -0.75, 0.9), None
    if name == "fish":
        tail = wedge(y, -x, -0.2, -0.95, 0.62)
        return np.minimum((np.hypot((x + 0.22) / 0.74, y / 0.52) - 1) * 0.55, tail), tail
    if name == "ring":
        return np.abs(np.hypot(x, y) - 0.68) - 0.24, None
    if name == "cross":
        return np.minimum(box(x, y, 0.3, 0.9), box(x, y, 0.9, 0.3)), None
    if name == "heart":                                            # a square on its corner with two half discs
        u, v = (x + y + 0.12) * 0.7071, (y - x + 0.12) * 0.7071
        discs = np.minimum(np.hypot(u - 0.55, v), np.hypot(u, v - 0.55)) - 0.55
        return np.minimum(box(u, v, 0.55, 0.55), discs), None
    if name == "moon":
        return np.maximum(np.hypot(x, y) - 0.9, 0.8 - np.hypot(x - 0.6, y)), None
    if name == "house":
        roof = wedge(x, y, 0.95, 0.15, 0.95)
        return np.minimum(box(x, y + 0.3, 0.68, 0.5), roof), roof
    crown = np.minimum(wedge(x, y, 1.0, 0.15, 0.6), wedge(x, y, 0.6, -0.35, 0.8))
    trunk = box(x, y + 0.65, 0.24, 0.33)
    return np.minimum(crown, trunk), np.maximum(trunk, -crown)


def hsv_to_rgb(h, s, v):
    """Each (n,) in [0, 1] -> (n, 3), each in [0, 1]."""
    k = (np.array([5, 3, 1], np.float32) + h[:, None] * 6) % 6
    return v[:, None] * (1 - s[:, None] * np.clip(np.minimum(k, 4 - k), 0, 1))


class Shapes:
    """Ten classes of drawn objects, 32 x 32: image i is a pure function of (split, i), of class i % 10.

    One light falls from a random side: it grades the background, shades the object and casts its shadow the other
    way, so tokens far apart have to agree. Colour, size, position and rotation vary. 50,000 train, 5,000 validation."""
    classes, image_size, workers = SHAPES, 32, 0

    def __init__(self, split):
        self.key, self.length = SPLITS.index(split), {"train": 50_000, "val": 5_000}[split]

    def __len__(self):
        return self.length

    def batch(self, indices, draws=None):
        """indices: (B,) ints. Nothing is augmented, so `draws` changes nothing."""
        indices = np.asarray(indices)
        u = hashed_uniform(self.key, indices, 13)
        labels = indices % len(SHAPES)
        col = lambda i, low, high: (low + (high - low) * u[:, i]).astype(np.float32)[:, None, None]
        size, turn, light = col(0, 0.7, 0.9), col(1, -0.3, 0.3), col(2, 0, 2 * np.pi)
        center_x, center_y = col(3, -1, 1) * (1 - size), col(4, -1, 1) * (1 - size)
        light_x, light_y = np.cos(light), np.sin(light)

        # Pixel centres in [-1, 1], y up; object coordinates of every pixel, and of what would shade it.
        line = (np.arange(32, dtype=np.float32) + 0.5) / 16 - 1
        px, py = line[None, None, :], -line[None, :, None]
        reach = size * col(5, 0.25, 0.45)
        dx = np.stack([px - center_x + 0 * py, px - center_x + light_x * reach + 0 * py]) / size
        dy = np.stack([py - center_y + 0 * px, py - center_y + light_y * reach + 0 * px]) / size
        x, y = np.cos(turn) * dx + np.sin(turn) * dy, np.cos(turn) * dy - np.sin(turn) * dx   # (2, B, 32, 32)
        distance, second = np.empty_like(x), np.full(x.shape[1:], 9, np.float32)
        for label in np.unique(labels):
            at = labels == label
            whole, part = outline(SHAPES[label], x[:, at], y[:, at])
            distance[:, at] = whole
            if part is not None:
                second[at] = part[0]

        # The distance beyond a sharp corner is too small, which would draw the soft shadow out into spikes.
        distance[1] = np.maximum(distance[1], np.hypot(x[1], y[1]) - 1)

        # Anti-aliasing: a pixel is covered in proportion to its distance from the outline, within half a pixel.
        cover = np.clip(0.5 - distance[0] * size * 16, 0, 1)[..., None]
        cover_second = np.clip(0.5 - second * size * 16, 0, 1)[..., None]
        shadow = np.clip(0.5 - distance[1] * size * 4, 0, 1)[..., None] * 0.5               # soft: 4 pixels wide

        ground_hue = u[:, 6]
        ground = hsv_to_rgb(ground_hue, 0.05 + 0.15 * u[:, 7], 0.6 + 0.2 * u[:, 8])[:, None, None]
        hue = ground_hue + 0.25 + 0.5 * u[:, 9]                                              # never the ground's hue
        color = hsv_to_rgb(hue, 0.75 + 0.2 * u[:, 10], 0.85 + 0.15 * u[:, 11])[:, None, None]
        color2 = hsv_to_rgb(hue + 0.33 + 0.33 * u[:, 12], 0.7 + 0 * hue, 0.6 + 0 * hue)[:, None, None]
        image = ground * (1 + 0.35 * (px * light_x + py * light_y))[..., None] * (1 - shadow)
        shade = (0.85 + 0.4 * (dx[0] * light_x + dy[0] * light_y))[..., None]
        body = (color + cover_second * (color2 - color)) * shade
        image = image + cover * (body - image)
        images = (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)                         # (B, 32, 32, 3)
        return torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels).long()


# -------------------------------------------------------------------------------------------------------- CIFAR-10

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
            raise ValueError(f"{path} has a wrong checksum (MD5 {CIFAR_MD5} expected): delete it and run again to fetch it anew")
        self.classes, self.images, self.labels = read_cifar(path, split)

    def __len__(self):
        return len(self.images)

    def batch(self, indices, draws=None):
        images = self.images[indices]
        if draws is not None:
            flip = hashed_uniform(3, draws, 1)[:, 0, None, None, None] < 0.5
            images = np.where(flip, images[..., ::-1], images)
        return torch.from_numpy(images), torch.from_numpy(self.labels[indices]).long()


def read_cifar(path, split):
    """The records of the binary archive: a label byte, then 3 x 32 x 32 bytes. -> classes, images, labels."""
    with tarfile.open(path) as archive:
        read = lambda name: archive.extractfile(f"cifar-10-batches-bin/{name}").read()
        names = [f"data_batch_{i}.bin" for i in range(1, 6)] if split == "train" else ["test_batch.bin"]
        records = np.frombuffer(b"".join(read(name) for name in names), np.uint8).reshape(-1, 3073)
        return read("batches.meta.txt").decode().split(), records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0]


# ------------------------------------------------------------------------------------------------ a folder of images

def to_rgb(image):
    """A PIL image of any mode -> RGB; transparency is composited on white, 16-bit greys are scaled to 8 bits."""
    if image.mode.startswith("I") or image.mode == "F":
        pixels = np.asarray(image, np.float64)
        top = 65535 if image.mode.startswith("I;16") or pixels.max() > 255 else 1 if pixels.max() <= 1 else 255
        image = Image.fromarray((pixels / top * 255).clip(0, 255).astype(np.uint8))
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def read_image(path, size=None):
    """Reads a file as an upright RGB image. size: a JPEG may be decoded at a reduced scale, not below this side.

    Raises ValueError, naming the file, where it cannot be read as an image."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")           # large images are fine; far too large ones are an error anyway
            with Image.open(path) as image:
                if size:
                    image.draft("RGB", (size, size))
                return to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:                        # Pillow's readers raise nearly everything on broken files
        raise ValueError(f"{path} is not a readable image ({type(error).__name__}: {error})") from error


class Folder:
    """Images of a folder, its first-level subfolders being the classes; files in deeper folders belong to them.

    files: paths; labels: (len,) int array; size: S. RandomResizedCrop (80 to 100% of the area, aspect 3/4 to 4/3) and
    flip where `batch` is given draws, else resize and centre crop."""
    workers = None   # as many as there are cores

    def __init__(self, files, labels, classes, size, pixels=None):
        self.files, self.labels, self.classes, self.image_size, self.pixels = files, labels, classes, size, pixels

    def __len__(self):
        return len(self.files)

    def batch(self, indices, draws=None):
        size, images = self.image_size, []
        u = np.full((len(indices), 5), 0.5) if draws is None else hashed_uniform(3, draws, 5).astype(float)
        for i, (area, ratio, across, down, flip) in zip(indices, u):
            image = Image.fromarray(self.pixels[i]) if self.pixels else read_image(self.files[i], size)
            width, height = w, h = image.size
            if draws is None:
                w = h = min(width, height)
            else:
                area, ratio = (0.8 + 0.2 * area) * width * height, np.exp((2 * ratio - 1) * np.log(4 / 3))
                w, h = min(width, np.sqrt(area * ratio)), min(height, np.sqrt(area / ratio))
                w, h = min(w, h * 4 / 3), min(h, w * 4 / 3)                 # a long image is cropped, not squeezed
            left, top = across * (width - w), down * (height - h)
            image = image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + w, top + h))
            images.append(np.asarray(image)[:, ::-1] if flip < 0.5 else np.asarray(image))
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), torch.from_numpy(self.labels[indices]).long()


KEEP_BELOW = 64   # images of up to this size are read once and kept in memory, at this many times the size:
KEEP_SCALE = 2


def check_files(root, files, size):
    """Decodes every file once: -> the readable ones, and their reduced pixels where `size` is small, else None.

    Unreadable files are named on stderr and left out. Raises ValueError where they are more than 1%."""
    keep = KEEP_SCALE * size if size <= KEEP_BELOW else None

    def read(path):
        try:
            image = read_image(path, keep)
        except ValueError as error:
            return error
        if keep and min(image.size) > keep:
            scale = keep / min(image.size)
            image = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.BICUBIC, reducing_gap=3)
        return np.asarray(image) if keep else True

    def decode_all():
        pixels, bad = {}, {}
        with ThreadPoolExecutor(os.cpu_count()) as pool:                    # Pillow decodes outside Python's lock
            for done, (path, result) in enumerate(zip(files, pool.map(read, files)), 1):
                if isinstance(result, ValueError):
                    bad[str(path)] = str(result)
                else:
                    pixels[path] = result
                if sys.stderr.isatty() and (done % 100 == 0 or done == len(files)):
                    print(f"\rreading {root}: {done} of {len(files)} images", end="", file=sys.stderr, flush=True)
        if sys.stderr.isatty():
            print(file=sys.stderr)
        return pixels, bad

    if keep:
        pixels, bad = decode_all()
    else:
        digest = hashlib.md5("\n".join(map(str, files)).encode()).hexdigest()
        pixels, bad = None, remembered("bad", root, lambda found: found["files"] == digest,
                                       lambda: {"files": digest, "bad": decode_all()[1]})["bad"]
    for message in bad.values():
        print(f"left out: {message}", file=sys.stderr)
    if bad:
        print(f"left out {len(bad)} of {len(files)} files in {root}", file=sys.stderr)
    if len(bad) > 0.01 * len(files):
        raise ValueError(f"{len(bad)} of {len(files)} files in {root} are not readable images, over 1%; "
                         f"remove them, the first is {next(iter(bad))}")
    good = [path for path in files if str(path) not in bad]
    return good, [pixels[path] for path in good] if keep else None


def remembered(kind, root, valid, make):
    """What make() returns, a JSON value, from the cache folder where what lies there is valid(): to scan a million files
    takes minutes. The cache folder is MASKGIT_CACHE, by default ~/.cache/maskgit."""
    name = f"{kind}-{hashlib.md5(str(root.resolve()).encode()).hexdigest()}.json"
    path = cache_folder() / name
    try:
        found = json.loads(path.read_text())
        if valid(found):
            return found
    except (OSError, ValueError, KeyError, TypeError):
        pass                                                                # not there, or no longer right: made anew
    made = make()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{name}.{os.getpid()}")
        temporary.write_text(json.dumps(made))
        os.replace(temporary, path)
    except OSError as error:
        print(f"the scan of {root} could not be kept in {path.parent} ({error.strerror}): the next start scans again",
              file=sys.stderr)
    return made


def list_files(root):
    """Every file in the first-level subfolders of root (or in root, where it has none), sorted; hidden ones are passed over."""
    def walk():
        folders, files = {}, []
        for folder, inner, names in os.walk(root):
            inner[:] = [name for name in inner if not name.startswith(".")]
            folders[folder] = os.stat(folder).st_mtime_ns                   # changes whenever an entry comes or goes
            files += [os.path.join(folder, name) for name in names if not name.startswith(".")]
        return {"folders": folders, "files": sorted(files)}

    unchanged = lambda found: all(os.stat(folder).st_mtime_ns == then for folder, then in found["folders"].items())
    files = [Path(name) for name in remembered("files", root, unchanged, walk)["files"]]
    nested = [p for p in files if p.parent != root]
    if nested and len(nested) < len(files):
        print(f"passed over {len(files) - len(nested)} files in {root} that lie in no class folder", file=sys.stderr)
    if not files:
        raise ValueError(f"{root} holds no images; it should hold a subfolder of images for each class")
    return nested or files


def open_folder(root, size, check=True):
    """-> (train, validation) Folder. With train/ and val/ inside, those; else a fixed hash of each path holds out 5%.

    check: decode every file once, and leave out what cannot be read.

    Raises ValueError where there are no images, val/ has other classes than train/, or over 1% of the files are bad."""
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"'{root}' is no data set and no folder; --data takes shapes, cifar10, imagenet, places2 or a folder of images")
    class_of = lambda path, base: path.relative_to(base).parts[0] if path.parent != base else base.name
    hash_of = lambda path: int(hashlib.md5(str(path.relative_to(root)).encode()).hexdigest(), 16) % 20
    if (root / "train").is_dir() and (root / "val").is_dir():
        bases = {split: root / split for split in SPLITS}
        files = {split: list_files(bases[split]) for split in SPLITS}
        names = {split: {class_of(p, bases[split]) for p in files[split]} for split in SPLITS}
        if names["train"] != names["val"]:
            name = sorted(names["train"] ^ names["val"])[0]
            here, missing = ("train", "val") if name in names["train"] else ("val", "train")
            raise ValueError(f"class '{name}' is in {root}/{here} but not in {root}/{missing}: both need the same class folders")
    else:
        bases, every = {split: root for split in SPLITS}, list_files(root)
        held_out = {p for p in every if hash_of(p) == 0} or set(every[:1])
        files = {"train": [p for p in every if p not in held_out] or every, "val": sorted(held_out)}
    classes = sorted({class_of(p, bases[split]) for split in SPLITS for p in files[split]})
    result = []
    for split in SPLITS:
        good, pixels = check_files(bases[split], files[split], size) if check else (files[split], None)
        labels = np.array([classes.index(class_of(p, bases[split])) for p in good])
        result.append(Folder(good, labels, classes, size, pixels))
    return tuple(result)


# --------------------------------------------------------------------------------------------------- opening, batching

def open_data(name, size=None, folder="data"):
    """-> (train, validation). name: shapes, cifar10, imagenet, places2, or the path of a folder of images. size: S, for
    folders (32). folder: where the named data sets are.

    Raises ValueError for an unknown name or bad data, OSError where it cannot be read."""
    if name in ("shapes", "cifar10") and size not in (None, 32):
        raise ValueError(f"{name} has images of 32 pixels, not {size}: leave --image-size out")
    if name == "shapes":
        return Shapes("train"), Shapes("val")
    if name == "cifar10":
        return Cifar10("train", folder), Cifar10("val", folder)
    if name not in ("imagenet", "places2"):
        return open_folder(name, size or 32)
    root = Path(folder, name)
    if not (root / "train").is_dir() or not (root / "val").is_dir():
        classes = "1,000 WNIDs, such as n01440764" if name == "imagenet" else "365 classes"
        raise ValueError(f"{root} should hold train/CLASS/*.JPEG and val/CLASS/*.JPEG, with a folder for each of the {classes}; "
                         f"put it there or name its place with --data-dir")
    pair = open_folder(root, size or 256, check=False)               # its million files are known to be whole
    if name == "imagenet" and len(pair[0].classes) == 1000:          # the folders are WNIDs: show what they stand for
        names = Path(__file__).with_name("imagenet_classes.txt").read_text().splitlines()
        for data in pair:
            data.classes = names
    return pair


class Steps(torch.utils.data.Dataset):
    """Batch number `step` of an endless stream of shuffled epochs: a pure function of (seed, step).

    rank, world: each rank gets its own share of every batch, whatever their number."""

    def __init__(self, data, size, seed, rank=0, world=1):
        self.data, self.size, self.seed, self.rank, self.share = data, size, seed, rank, size // world
        self.epoch, self.order = None, None

    def __getitem__(self, step):
        first = step * self.size + self.rank * self.share                   # places in the stream of all epochs
        places = np.arange(first, first + self.share)
        indices = np.empty(self.share, np.int64)
        for epoch in np.unique(places // len(self.data)):
            if epoch != self.epoch:
                self.epoch, self.order = epoch, np.random.Generator(np.random.Philox(key=[self.seed, epoch])).permutation(len(self.data))
            here = places // len(self.data) == epoch
            indices[here] = self.order[places[here] % len(self.data)]
        return self.data.batch(indices, places + (self.seed % (1 << 22) << 40))


def batches(data, size, seed, first, last, workers=None, machine=None):
    """Iterates over steps first .. last - 1 of the stream: (images (B, 3, S, S) uint8, labels (B,) int64).

    workers: processes that read ahead; by default none where images are drawn or in memory, else one per core.
    machine: whose rank and device the batches are for (devices.Machine; None: one process on the CPU)."""
    rank, world, cuda = (machine.rank, machine.world, machine.device.type == "cuda") if machine else (0, 1, False)
    return iter(loader(Steps(data, size, seed, rank, world), range(first, last), data, workers, cuda))


def loader(dataset, sampler, data, workers=None, pin_memory=False):
    if workers is None:
        workers = 0 if data.workers == 0 or getattr(data, "pixels", None) else os.cpu_count()
    return torch.utils.data.DataLoader(dataset, batch_size=None, sampler=sampler, num_workers=workers,
                                       pin_memory=pin_memory, worker_init_fn=ignore_signals)


def ignore_signals(worker):
    """Ctrl-C goes to the whole process group: the training loop answers it, and its readers must outlive that."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
