"""Images as tokens: encoded as they come, or once for all (--cache-tokens), each in several augmented views."""
import functools
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch

from lib.data import loader
from lib.files import fingerprint, rebuild, write_atomically
from lib.flags import UserError
from lib.runtime import hashed_uniform
from lib.terminal import Progress


class FrozenTokenizer:
    """A trained tokenizer as stage 2 uses it. path, model_class: as for rebuild(). image_size: of the images to come;
    None: of those it was trained on. at_once: how many of them it sees. Raises as rebuild() does, and ValueError where
    its stride does not divide the size. Attributes: model, image_size, num_tokens, codebook_size, fingerprint."""

    def __init__(self, path, model_class, image_size, at_once, machine):
        model, checkpoint = rebuild(path, "vqgan", model_class)
        self.fingerprint, self.image_size = fingerprint(model), image_size or checkpoint["image_size"]
        stride, self.codebook_size = model.config.stride, model.config.codebook_size
        if self.image_size % stride:
            raise UserError(f"--image-size {self.image_size} is not divisible by the tokenizer's stride {stride}")
        self.num_tokens, self.at_once, self.machine = (self.image_size // stride) ** 2, at_once, machine
        self.model = machine.freeze(model.to(machine.device, memory_format=machine.layout))
        self.compiled = machine.compile(self.model.encode)

    @torch.no_grad()
    def encode(self, images, own_share=False):
        """(n, 3, S, S) uint8 -> tokens (n, N), on the device. own_share: as for Machine.put."""
        with self.machine.autocast():
            parts = self.machine.to_floats(images, own_share).split(self.at_once)
            return torch.cat([self.compiled(part).flatten(1) for part in parts])


class CachedTokens:
    """Every training image as tokens, encoded once in several augmented views; `batch` gives (tokens (B, N), labels).

    folder: holds index.json and chunks NNNNN.npy of uint16; a row is the N tokens and the label of one view of one
    image. A chunk has CHUNK rows, or more where there would be over FILES chunks, as each stays open. BATCH rows are
    encoded together. data: the images. Raises ValueError where the folder holds other data or number of views."""
    CHUNK, FILES, BATCH, workers = 4096, 256, 256, 0

    def __init__(self, folder, data, views, num_tokens):
        self.folder, self.data, self.views, self.rows = Path(folder), data, views, len(data) * views
        self.chunk = max(self.CHUNK, math.ceil(self.rows / self.FILES))
        self.paths = [self.folder / f"{i:05}.npy" for i in range(math.ceil(self.rows / self.chunk))]
        index = {"images": len(data), "views": views, "tokens": num_tokens, "classes": list(data.classes),
                 "chunk": self.chunk}
        path = self.folder / "index.json"
        if not path.exists():
            write_atomically(path, lambda file: file.write(json.dumps(index).encode()))
        found = json.loads(path.read_text())
        for key, value in index.items():
            if found.get(key) != value:
                raise UserError(f"the tokens in {folder} are stale, with another value of {key}: rm -r '{folder}', "
                                 f"then run this again to encode anew")

    def __len__(self):
        return len(self.data)

    def __getitem__(self, rows):
        """Images and labels of a range of rows, for `encode`."""
        rows = np.arange(rows.start, rows.stop)
        return self.data.batch(rows % len(self.data), rows + (1 << 50))

    def encode(self, tokenize, rank=0, world=1):
        """Writes the chunks that are missing, each rank its share, and each whole or not at all, so an interrupted
        encoding goes on where it stopped. tokenize: images (n, 3, S, S) uint8 -> tokens (n, N)."""
        missing = {path: range(self.rows)[i * self.chunk:(i + 1) * self.chunk]
                   for i, path in enumerate(self.paths) if i % world == rank and not path.exists()}
        parts = [rows[i:i + self.BATCH] for rows in missing.values() for i in range(0, len(rows), self.BATCH)]
        stream, done = iter(loader(self, parts, self.data)), 0
        progress = Progress(f"encoding {self.rows} views into {self.folder}", sum(map(len, parts)), stream=sys.stderr)
        for path, rows in missing.items():
            batches = []
            for _ in rows[::self.BATCH]:
                images, labels = next(stream)
                batches.append(torch.cat([tokenize(images).cpu(), labels[:, None]], 1))
                done += len(labels)
                if rank == 0:
                    progress.show(done)
            write_atomically(path, functools.partial(np.save, arr=torch.cat(batches).numpy().astype(np.uint16)))

    @functools.cached_property
    def chunks(self):
        return [np.load(path, mmap_mode="r") for path in self.paths]

    def batch(self, indices, draws):
        """A view of each image, chosen by its draw: tokens (B, N) int32, labels (B,) int64."""
        view = (hashed_uniform(5, draws, 1)[:, 0] * self.views).astype(np.int64)
        rows = np.stack([self.chunks[row // self.chunk][row % self.chunk] for row in view * len(self.data) + indices])
        return torch.from_numpy(rows[:, :-1].astype(np.int32)), torch.from_numpy(rows[:, -1].astype(np.int64))
