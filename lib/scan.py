"""Finds the images of a folder and their classes, and decodes each once to find broken ones.

What takes minutes, to walk through a million files or to decode them, is kept in the cache folder
(lib.files) and done again only for what has changed.
"""
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from lib.files import cache_folder, write_atomically
from lib.flags import UserError
from lib.image_files import IMAGE_ENDINGS, read_image
from lib.loader import interruptible
from lib.runtime import cores
from lib.terminal import Progress

MOST_BROKEN = 0.01                # of a data set's files: if more are broken, it is refused


class Listing(NamedTuple):
    """The images of a folder, sorted by path."""
    files: list[str]
    names: list[str]              # the class of each file
    classes: list[str]            # all classes, also those without an image


# ---- the files of a folder

def list_images(root: str) -> Listing:
    """Returns the images in the first-level subfolders of `root`, which are the classes.

    If there are none, returns those in `root` itself, which is then the only class. Passes over
    hidden files, and counts files that are no images on stderr. Raises UserError without images."""
    scan = load_scan(root)
    if scan["others"]:
        print(f"passed over {scan['others']} files in {root} that are not images", file=sys.stderr)
    if not scan["files"]:
        endings = ", ".join(IMAGE_ENDINGS)
        raise UserError(f"{root} holds no images: it should hold a subfolder for each class, with "
                        f"files that end in {endings}")
    files = []
    names = []
    prefix = os.path.join(root, "")
    for path in scan["files"]:
        name, separator, _ = path.removeprefix(prefix).partition(os.sep)
        if separator:
            files.append(path)
            names.append(printable(name))
    if not files:
        name = printable(os.path.basename(root))
        return Listing(scan["files"], [name] * len(scan["files"]), [name])
    if len(files) < len(scan["files"]):
        outside = len(scan["files"]) - len(files)
        print(f"passed over {outside} images in {root} that are in no class folder",
              file=sys.stderr)
    folders = [folder for folder in scan["folders"] if os.path.dirname(folder) == root]
    classes = [printable(os.path.basename(folder)) for folder in folders]
    return Listing(files, names, sorted(classes, key=as_people_count))


def load_scan(root: str) -> dict:
    """Returns scan_folder(root), or what is kept of it if no folder has changed since."""
    path = kept_file("images", root)
    scan = load_kept(path)
    if not is_current(scan):
        scan = scan_folder(root)
        keep(path, scan, root)
    return scan


def is_current(scan: dict) -> bool:
    """Returns whether every folder of a scan is as it was; its time changes with its entries."""
    try:
        return bool(scan) and all(
            os.stat(folder).st_mtime_ns == time for folder, time in scan["folders"].items())
    except OSError:
        return False


def scan_folder(root: str) -> dict:
    """Returns {"folders": {path: time of change}, "files": images, "others": how many other files}.

    Follows links, but not to a folder that they lie in. Raises UserError if one cannot be read."""
    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}): change its "
                        f"permissions or remove it") from error

    folders = {}
    files = []
    others = 0
    lines = {}                    # each folder and all above it, by device and inode
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=refuse):
        status = os.stat(folder)
        identity = (status.st_dev, status.st_ino)
        above = lines.get(os.path.dirname(folder), frozenset())
        if identity in above:
            subfolders.clear()
            continue
        lines[folder] = above | {identity}
        folders[folder] = status.st_mtime_ns
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        visible = [name for name in names if not name.startswith(".")]
        images = [name for name in visible if name.lower().endswith(IMAGE_ENDINGS)]
        files += [os.path.join(folder, name) for name in images]
        others += len(visible) - len(images)
    return {"folders": folders, "files": sorted(files), "others": others}


def as_people_count(name: str) -> tuple:
    """Returns a key that sorts names with their numbers by value: 2 before 10."""
    pieces = re.split(r"(\d+)", name)
    pieces[1::2] = [int(digits) for digits in pieces[1::2]]
    return pieces, name


def printable(name: str) -> str:
    """Returns a file's name as printable text: a byte that is not UTF-8 becomes "\\xe9"."""
    return as_bytes(name).decode("utf-8", "backslashreplace")


# ---- broken files

def decode_all(root: str, files: list[str], side: int) -> dict[str, np.ndarray]:
    """Decodes every file -> {path: pixels (H, W, 3) uint8} of the readable ones.

    side: longer images are reduced to this shorter side. Raises UserError as report() does."""
    def decode(path: str) -> np.ndarray | str:
        try:
            image = read_image(path, side)
        except UserError as error:
            return str(error)
        if min(image.size) > side:
            size = [round(length * (side / min(image.size))) for length in image.size]
            image = image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3)
        return np.asarray(image)

    results = dict(zip(files, for_each_file(root, files, decode), strict=True))
    problems = {path: result for path, result in results.items() if isinstance(result, str)}
    report(root, problems, len(files))
    return {path: pixels for path, pixels in results.items() if path not in problems}


def check_all(root: str, files: list[str], size: int) -> list[str]:
    """Decodes every file that is not known to be readable -> the readable files.

    size: S, to which they are decoded. Raises UserError as report() does."""
    def problem_of(path: str) -> str | None:
        try:
            read_image(path, size)
        except UserError as error:
            return str(error)
        return None

    kept_path = kept_file("readable", root)
    kept = load_kept(kept_path)                   # {path: [size, time]} of the readable files
    status = {path: size_and_time(path) for path in files}
    unknown = [path for path in files if kept.get(path) != status[path]]
    problems = zip(unknown, for_each_file(root, unknown, problem_of), strict=True)
    broken = {path: problem for path, problem in problems if problem}
    readable = {path: status[path] for path in files if path not in broken}
    if readable != kept:
        keep(kept_path, readable, root)
    report(root, broken, len(files))
    return list(readable)


def for_each_file(root: str, files: list[str], function: Callable[[str], object]) -> list:
    """Returns [function(path) for path in files], computed on all cores, with a line of progress.

    Ctrl-C ends it at once, with a KeyboardInterrupt."""
    results = []
    progress = Progress(f"reading {root}", len(files), stream=sys.stderr)
    pool = ThreadPoolExecutor(cores())        # Pillow decodes outside of Python's lock
    with interruptible(f"stopped while reading {root}"):
        try:
            for result in pool.map(function, files):
                results.append(result)
                if sys.stderr.isatty():
                    progress.show(len(results))
        finally:
            pool.shutdown(cancel_futures=True)
    return results


def report(root: str, problems: dict[str, str], total: int) -> None:
    """Names the broken files on stderr. Raises UserError if they are more than 1% of all."""
    for problem in problems.values():
        print(f"left out: {problem}", file=sys.stderr)
    if problems:
        print(f"left out {len(problems)} of {total} images in {root}", file=sys.stderr)
    if len(problems) > MOST_BROKEN * total:
        raise UserError(f"{len(problems)} of {total} images in {root} are not readable, over 1%: "
                        f"repair or remove them; the first is {next(iter(problems))}")


# ---- what is kept in the cache folder

def kept_file(kind: str, root: str) -> Path:
    """Returns the path of the JSON file that keeps something about a folder."""
    return cache_folder() / f"{kind}-{hashlib.md5(as_bytes(root)).hexdigest()}.json"


def load_kept(path: Path) -> dict:
    """Returns what keep() wrote, or {} if there is nothing or the file is damaged."""
    try:
        kept = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}


def keep(path: Path, value: dict, root: str) -> None:
    """Writes a JSON file for the next start; says so if that is not possible."""
    content = json.dumps(value).encode()

    def write(file: BinaryIO) -> None:
        file.write(content)

    try:
        write_atomically(path, write)
    except UserError as error:
        print(f"the scan of {root} could not be kept, so the next start scans again ({error})",
              file=sys.stderr)


def as_bytes(path: str) -> bytes:
    """Returns a path's bytes as they are on the disk, UTF-8 or not."""
    return path.encode("utf-8", "surrogateescape")


def size_and_time(path: str) -> list[int]:
    """Returns what changes with a file's content: its size and its time of change (ns)."""
    try:
        status = os.stat(path)
    except OSError:               # a link to nowhere, say
        return [0, 0]
    return [status.st_size, status.st_mtime_ns]
