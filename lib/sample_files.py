"""Writes samples as files, FOLDER/CLASS/00000.png: a folder that is itself a data set."""
import json
import os
import re
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from lib.editing import to_square
from lib.errors import UserError
from lib.files import write_atomically
from lib.folders import SPLITS
from lib.image_files import read_image
from lib.pictures import save_image, to_pil
from lib.runtime import Machine
from lib.sampling import Sampler
from lib.scan import list_folder, natural_order
from lib.terminal import Progress

BATCH = 64                      # images decoded at once


def class_folders(folder: Path, classes: list[str]) -> list[Path]:
    """Returns the folder of each class, by label.

    It has the name of the class, if --data would read all these folders back as the same classes in
    the same order, which is natural_order()'s; otherwise the label stands before the name."""
    names = [re.sub(r'[\x00-\x1f/\\:*?"<>|]', "_", name)[:100] for name in classes]
    hidden = any(name == "" or name.startswith(".") for name in names)
    cut = any(name.endswith((".", " ")) for name in names)                  # by Windows
    lowered = {name.casefold() for name in names}       # Windows and macOS take Cat and cat for one
    special = hidden or cut or len(lowered) < len(names) or not lowered.isdisjoint(SPLITS)
    if special or sorted(names, key=natural_order) != list(classes):
        digits = len(str(len(names) - 1))
        names = [f"{label:0{digits}} {name}".strip() for label, name in enumerate(names)]
    return [folder / name for name in names]


def image_path(folder: Path, k: int | Tensor) -> Path:
    """Returns the file of image k of a class. folder: of the class."""
    return folder / f"{int(k):05}.png"


def claim_folder(folder: Path, machine: Machine, settings: dict) -> None:
    """Notes in the folder what its images are drawn with.

    Raises UserError if it holds files, apart from hidden ones, that were drawn with others."""
    note = folder / ".drawn-with"
    text = json.dumps(settings)
    if os.path.exists(note):
        try:
            usable = note.read_bytes() == text.encode()
        except OSError as error:
            raise UserError(f"cannot read {note} ({error.strerror}): make it readable, or name "
                            f"another folder with --files") from error
    else:
        usable = not os.path.isdir(folder) or not list_folder(str(folder))
    if not usable:
        raise UserError(f"{folder} is not empty, and no {note} says that its images are of these "
                        f"models, seed, sampler and kind of device: name another folder with "
                        f"--files")
    machine.wait_for_ranks()                                       # until all ranks have looked

    def write(file: BinaryIO) -> None:
        file.write(text.encode())

    if machine.leads:
        write_atomically(note, write)


def write_missing(
    sampler: Sampler, labels: Tensor, numbers: Tensor, folders: list[Path],
) -> int:
    """Draws the images whose files are missing, each rank its share. Returns how many it drew.

    labels, numbers: of all images, (n,) on the CPU; see Sampler. folders: see class_folders().
    Raises UserError if a file cannot be written."""
    machine = sampler.machine
    missing = []
    for i in range(machine.rank, len(labels), machine.world):
        if not image_path(folders[labels[i]], numbers[i]).exists():
            missing.append(i)
    progress = Progress("drawing", len(missing) * machine.world)
    for first in range(0, len(missing), BATCH):
        batch = missing[first:first + BATCH]
        images = sampler.images(sampler.draw(labels[batch], numbers[batch])).cpu()
        for i, image in zip(batch, images, strict=True):
            path = image_path(folders[labels[i]], numbers[i])
            save_image(path, to_pil(image), compress_level=1)       # fast, and hardly larger
        if machine.leads:
            progress.show((first + len(batch)) * machine.world)
    machine.wait_for_ranks()                                       # until all files are there
    return len(missing)


def read_row(folder: Path, num: int, size: int) -> Tensor:
    """Returns the first images of a class's folder, floats (num, 3, size, size) in [0, 1]."""
    images = []
    for k in range(num):
        images.append(to_square(read_image(image_path(folder, k)), size, "crop"))
    return torch.stack(images)
