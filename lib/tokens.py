"""Images as tokens: encoded as they come, or once in several augmented views (--cache-tokens)."""
import contextlib
import functools
import hashlib
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from lib.errors import UserError
from lib.files import fingerprint, rebuild, save_checkpoint, write_atomically
from lib.flags import check_image_size
from lib.loader import VIEW_SEEDS, DataSet, ImagesAndLabels, interruptible, read_ahead
from lib.runtime import Machine, hashed_uniform
from lib.terminal import Progress


class FrozenTokenizer:
    """A trained tokenizer as stage 2 uses it: it turns images into tokens.

    path, model_class: see rebuild(). image_size: None for the size that it was trained on.
    at_once: how many images it encodes at a time; fewer are encoded without torch.compile.
    Raises UserError as rebuild() does, and if the tokenizer's stride does not divide the size."""

    def __init__(self, path: str | Path, model_class: type, image_size: int | None, at_once: int,
                 machine: Machine):
        self.path = Path(path)
        model, checkpoint = rebuild(path, "vqgan", model_class)
        self.checkpoint = checkpoint
        stride = model.config.stride
        self.image_size = image_size or checkpoint["image_size"]
        check_image_size(self.image_size, stride)
        self.num_tokens = (self.image_size // stride) ** 2
        steps = checkpoint["settings"].get("steps", 0)
        if checkpoint["step"] < steps and machine.leads:
            print(f"{path} is unfinished: it was trained for {checkpoint['step']} of {steps} steps",
                  file=sys.stderr)
        self.codebook_size = model.config.codebook_size
        self.fingerprint = fingerprint(model)
        self.at_once = at_once
        self.machine = machine
        self.model = machine.freeze(machine.place(model))
        self.compiled_encode = machine.compile(self.model.encode)

    def check_same_as(self, path: Path) -> None:
        """Raises UserError if another tokenizer is at `path`, in the run's folder."""
        if path.exists():
            other, _ = rebuild(path, "vqgan", type(self.model))
            if fingerprint(other) != self.fingerprint:
                raise UserError(f"{path} is another tokenizer than --vqgan {self.path}: choose "
                                f"another --run, or add --overwrite")

    def copy_to(self, path: Path) -> None:
        """Writes the tokenizer into a run, which then holds all that sampling needs.

        It is written as it was read: its file may have been trained on since then."""
        save_checkpoint(path, self.checkpoint)

    @torch.no_grad()
    def encode(self, images: torch.Tensor, of_this_rank: bool = False) -> torch.Tensor:
        """Returns the tokens (n, N) of images (n, 3, S, S) uint8, on the device.

        of_this_rank: see Machine.put()."""
        tokens = []
        with self.machine.autocast():
            for part in self.machine.to_floats(images, of_this_rank).split(self.at_once):
                # Another number of images would be compiled anew.
                whole = len(part) == self.at_once
                encode = self.compiled_encode if whole else self.model.encode
                tokens.append(encode(part).flatten(1))
        return torch.cat(tokens)


class Views:
    """The images and labels of rows of CachedTokens: [rows], for its encode()."""

    def __init__(self, data: DataSet):
        self.data = data

    def __getitem__(self, rows: range) -> ImagesAndLabels:
        numbers = np.array(rows)
        return self.data.batch(numbers % len(self.data), numbers + VIEW_SEEDS)


class CachedTokens:
    """All training images as tokens, encoded once in several augmented views: a data set of tokens.

    A row is the N tokens and the label of one view of one image; the first views of all images come
    first. The rows are stored in chunks, files IMAGES-FIRST-LAST-HASH.npy of uint16 in `folder`.
    The hash is of the classes and DataSet.signatures(), so chunks of images that have changed, or
    of another data set, are encoded anew.
    Both decoders of a run share the folder, also with other numbers of views.
    data: the images. num_tokens: N. Raises UserError if tokens or labels do not fit."""

    FILES = 256              # most chunks; each stays open (file descriptors)
    ROWS = 4096              # of a chunk; more if there would be too many files
    # Rows that a reader process reads at once. With 8 ranks of 16 readers, and two batches of each
    # waiting, this takes 3 GB of shared memory at 256 pixels.
    BATCH = 64

    workers = 0

    def __init__(self, folder: str | Path, data: DataSet, views: int, num_tokens: int,
                 codebook_size: int):
        if max(codebook_size, len(data.classes)) > 1 << 16:
            raise UserError("the cache has 16 bits for each token and label, too few for this "
                            "codebook or these classes: add --cache-tokens 0")
        self.folder = Path(folder)
        self.data = data
        self.views = views
        rows = range(len(data) * views)
        self.chunk_rows = max(self.ROWS, math.ceil(len(rows) / self.FILES))
        self.chunks = split(rows, self.chunk_rows)
        signatures = data.signatures()
        self.paths = []
        for chunk in self.chunks:
            name = f"{len(data)}-{chunk[0]}-{chunk[-1]}"
            digest = hashlib.md5(f"{num_tokens} {chunk} {len(data)} {data.classes}".encode())
            digest.update(signatures[np.array(chunk) % len(data)].tobytes())
            self.paths.append(self.folder / f"{name}-{digest.hexdigest()[:16]}.npy")

    def __len__(self) -> int:
        return len(self.data)

    def encode(self, tokenize: Callable[[torch.Tensor], torch.Tensor], machine: Machine,
               workers: int | None = None) -> None:
        """Writes the chunks that are missing, and removes those of images that have changed.

        tokenize: images (n, 3, S, S) uint8 -> tokens (n, N). workers: processes that read ahead;
        None: data.workers. Each rank writes its share of the chunks, each of them whole or not at
        all, so an interrupted encoding can go on. Raises UserError as data.batch() does,
        KeyboardInterrupt on Ctrl-C."""
        if machine.leads:
            self.remove_outdated()
        missing = self.missing_chunks(machine)
        batches = []
        for number in missing:
            batches += split(self.chunks[number], self.BATCH)
        if workers is None:
            workers = self.data.workers
        on_cuda = machine.device.type == "cuda"
        stream = read_ahead(Views(self.data), batches, workers, pin_memory=on_cuda)
        total = sum(map(len, batches))
        progress = Progress(f"encoding views into {self.folder}", total, stream=sys.stderr)
        done = 0
        with interruptible("stopped while encoding images: the same command goes on"):
            for number in missing:
                # The tokens stay on the device until the chunk is complete: to copy those of each
                # batch would be to wait for them.
                tokens = []
                labels = []
                for _ in split(self.chunks[number], self.BATCH):
                    images, classes = next(stream)
                    tokens.append(tokenize(images).int())
                    labels.append(classes)
                    machine.sync()
                    done += len(classes)
                    if machine.leads:
                        progress.show(done)
                rows = torch.cat([torch.cat(tokens).cpu(), torch.cat(labels)[:, None]], 1)
                rows = rows.numpy().astype(np.uint16)
                if machine.mesh is None or machine.leads:
                    write_atomically(self.paths[number], functools.partial(np.save, arr=rows))

    def missing_chunks(self, machine: Machine) -> list[int]:
        """Returns the numbers of the missing chunks that this rank encodes.

        With torch-xla that is all of them: the chips of all hosts work on every batch together."""
        numbers = range(machine.rank, len(self.paths), machine.world)
        if machine.mesh is not None:
            numbers = range(len(self.paths))
        missing = [number for number in numbers if not self.paths[number].exists()]
        machine.wait_for_ranks()            # nothing is written before all hosts have looked
        return missing

    def remove_outdated(self) -> None:
        """Deletes the chunks of images as they were before, and what killed encodings left.

        Chunks of other rows of as many images stay: the run's other decoder may use them."""
        our_rows = {path.name.rsplit("-", 1)[0] for path in self.paths}
        outdated = set()
        for path in set(self.folder.glob("*.npy")) - set(self.paths):
            rows, _ = path.name.rsplit("-", 1)
            if rows in our_rows or not rows.startswith(f"{len(self.data)}-"):
                outdated.add(path)
        if outdated:
            print(f"{len(outdated)} files in {self.folder} hold tokens of other images or classes, "
                  f"or of an older version: they are removed, and what is missing is encoded anew",
                  file=sys.stderr)
        a_day_ago = time.time() - 24 * 3600
        for leftover in self.folder.glob(".*.tmp"):
            with contextlib.suppress(FileNotFoundError):    # another process has just finished it
                if leftover.stat().st_mtime < a_day_ago:    # a younger one may be in the making
                    outdated.add(leftover)
        for path in outdated:
            path.unlink(missing_ok=True)                    # another process may do the same

    @functools.cached_property
    def arrays(self) -> list[np.ndarray]:
        """The chunks, which the system reads from the disk as they are needed."""
        return [np.load(path, mmap_mode="r") for path in self.paths]

    def batch(self, indices: np.ndarray, seeds: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns tokens (B, N) int32 and labels (B,) int64, in the views that the seeds choose."""
        views = (hashed_uniform(5, seeds, 1)[:, 0] * self.views).astype(np.int64)
        chunks, places = np.divmod(views * len(self.data) + indices, self.chunk_rows)
        pairs = zip(chunks, places, strict=True)
        rows = np.stack([self.arrays[chunk][place] for chunk, place in pairs])
        labels = torch.from_numpy(rows[:, -1].astype(np.int64))
        return torch.from_numpy(rows[:, :-1].astype(np.int32)), labels


def split(rows: range, size: int) -> list[range]:
    """Returns consecutive ranges of up to `size` rows."""
    return [rows[first:first + size] for first in range(0, len(rows), size)]
