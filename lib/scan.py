"""Finds the images of a folder by class, and decodes each of them once to find broken files."""
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO

import numpy as np
from PIL import Image

from lib.errors import UserError
from lib.files import cache_folder, write_atomically
from lib.image_files import IMAGE_ENDINGS, read_image
from lib.loader import interruptible
from lib.runtime import cores
from lib.terminal import Progress

MOST_BROKEN = 0.01                # of a data set's files: if more are broken, it is refused


# ---- the files of a folder

def list_images(root: str) -> dict[str, list[str]]:
    """Returns {class: paths of its images, sorted}. Each subfolder of `root` is a class.

    If no subfolder holds an image, `root` itself is the only class. Hidden files are ignored; other
    files that are not used are counted on stderr. Raises UserError if there are no images."""
    by_class = {}
    outside = []                                # images in no class folder
    num_files = 0
    above = frozenset([os.path.realpath(root)])
    for entry in sorted(list_folder(root), key=lambda entry: entry.name):
        if is_folder(entry):
            files = list(walk(entry.path, above))
            images = by_class.setdefault(printable(entry.name), [])
        else:
            files = [entry.path]
            images = outside
        num_files += len(files)
        images += sorted(path for path in files if path.lower().endswith(IMAGE_ENDINGS))
    num_images = len(outside) + sum(map(len, by_class.values()))
    if num_images < num_files:
        print(f"passed over {num_files - num_images} files in {root} that are not images",
              file=sys.stderr)
    if num_images == 0:
        endings = ", ".join(IMAGE_ENDINGS)
        raise UserError(f"{root} holds no images: it should hold a subfolder for each class, with "
                        f"files that end in {endings}")
    if num_images == len(outside):
        return {printable(os.path.basename(root)): outside}
    if outside:
        print(f"passed over {len(outside)} images in {root} that are in no class folder",
              file=sys.stderr)
    note_nested(root, [images for images in by_class.values() if images])
    return by_class


def note_nested(root: str, classes: list[list[str]]) -> None:
    """Says so on stderr if all images are of one class whose subfolders may be the real classes.

    classes: the paths of the images of each."""
    if len(classes) > 1:
        return
    folders = {os.path.dirname(path) for path in classes[0]}
    above = os.path.commonpath(folders)
    if above not in folders:
        print(f"note: all images in {root} are one class: if the subfolders of {above} are "
              f"classes, name that folder", file=sys.stderr)


def walk(folder: str, above: frozenset[str] = frozenset()) -> Iterator[str]:
    """Yields the paths of the files below a folder. Follows links, but not in circles.

    above: the real paths of the folders on the way down, not of all visited: a folder to which two
    links lead is listed twice."""
    real = os.path.realpath(folder)
    if real in above:
        return
    for entry in list_folder(folder):
        if is_folder(entry):
            yield from walk(entry.path, above | {real})
        else:
            yield entry.path


def holds_images(folder: str) -> bool:
    """Returns whether any file below a folder is an image."""
    return any(path.lower().endswith(IMAGE_ENDINGS) for path in walk(folder))


def list_folder(folder: str) -> list[os.DirEntry]:
    """Returns what a folder holds, without hidden files. Raises UserError if it cannot be read."""
    try:
        return [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror}): change its permissions or "
                        f"remove it") from error


def is_folder(entry: os.DirEntry) -> bool:
    """Returns whether an entry is a folder or a link to one."""
    try:
        return entry.is_dir()
    except OSError:                             # a link to itself
        return False


def natural_order(name: str) -> tuple:
    """Returns a key that sorts names with their numbers by value: 2 before 10."""
    pieces = re.split(r"(\d+)", name)
    pieces[1::2] = [int(digits) for digits in pieces[1::2]]
    return pieces, name


def printable(name: str) -> str:
    """Returns a file's name as printable text: a byte that is not UTF-8 becomes "\\xe9"."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


# ---- broken files

def decode_readable(root: str, files: list[str], side: int) -> dict[str, np.ndarray]:
    """Returns {path: pixels (H, W, 3) uint8} of every file that can be decoded.

    side: larger images are reduced to this shorter side. Raises UserError as report() does."""
    def decode(path: str) -> np.ndarray:
        image = read_image(path, side)
        shorter = min(image.size)
        if shorter > side:
            size = [round(length * (side / shorter)) for length in image.size]
            image = image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3)
        return np.asarray(image)

    pixels, problems = for_each_file(root, files, decode)
    report(root, problems, len(files))
    return pixels


def find_readable(root: str, files: list[str], size: int) -> list[str]:
    """Returns the files that can be decoded to size S. Raises UserError as report() does.

    They are noted in the cache folder, so that only files that are new or have changed are decoded
    the next time."""
    def check(path: str) -> None:
        read_image(path, size)

    scanned = f"{root} {Image.MAX_IMAGE_PIXELS}"              # a larger file is not readable
    kept_path = cache_folder() / f"readable-{hash_of(scanned):032x}.json"
    try:
        kept = json.loads(kept_path.read_text())          # {path: [size, time]}
    except (OSError, ValueError):                         # not there, or damaged
        kept = {}
    status = {path: size_and_time(path) for path in files}
    unknown = [path for path in files if kept.get(path) != status[path]]
    _, problems = for_each_file(root, unknown, check)
    readable = {path: status[path] for path in files if path not in problems}

    def write(file: BinaryIO) -> None:
        file.write(json.dumps(readable).encode())

    if readable != kept:
        try:
            write_atomically(kept_path, write)
        except UserError as error:
            print(f"what is readable in {root} could not be kept, so the next start decodes all of "
                  f"it again ({error})", file=sys.stderr)
    report(root, problems, len(files))
    return list(readable)


def for_each_file(root: str, files: list[str],
                  function: Callable[[str], object]) -> tuple[dict, dict[str, UserError]]:
    """Calls function(path) for every file, on all cores, with a line of progress.

    Returns {path: result} and, where the function raised a UserError, {path: error}. Ctrl-C ends it
    at once, with a KeyboardInterrupt."""
    def attempt(path: str) -> object:
        try:
            return function(path)
        except UserError as error:
            return error

    results = {}
    problems = {}
    progress = Progress(f"reading {root}", len(files), stream=sys.stderr)
    pool = ThreadPoolExecutor(cores())        # Pillow decodes outside of Python's lock
    with interruptible(f"stopped while reading {root}"):
        try:
            for path, result in zip(files, pool.map(attempt, files), strict=True):
                if isinstance(result, UserError):
                    problems[path] = result
                else:
                    results[path] = result
                done = len(results) + len(problems)
                if sys.stderr.isatty() or done < len(files):    # a log shows only what takes long
                    progress.show(done)
        finally:
            pool.shutdown(cancel_futures=True)
    return results, problems


def report(root: str, problems: dict[str, UserError], total: int) -> None:
    """Names the broken files on stderr. Raises UserError if they are more than 1% of all."""
    for problem in problems.values():
        print(f"left out: {problem}", file=sys.stderr)
    if problems:
        print(f"left out {len(problems)} of {total} images in {root}", file=sys.stderr)
    if len(problems) > MOST_BROKEN * total:
        raise UserError(f"{len(problems)} of {total} images in {root} are not readable, over 1%: "
                        f"repair or remove them; the first is {next(iter(problems))}")


def size_and_time(path: str | bytes) -> list[int]:
    """Returns what changes with a file's content: its size and its time of change (ns)."""
    try:
        status = os.stat(path)
    except OSError:                           # a link to nowhere, say
        return [0, 0]
    return [status.st_size, status.st_mtime_ns]


def hash_of(text: str) -> int:
    """Returns the 128 bits of the MD5 hash of a text, which may be a path that is not UTF-8."""
    return int(hashlib.md5(os.fsencode(text)).hexdigest(), 16)
