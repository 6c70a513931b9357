"""Stage 2 from cached tokens (--cache-tokens): each training image is encoded once, in several augmented views.

A folder holds index.json and chunks NNNNN.npy; a chunk is written whole or not at all, so an interrupted encoding goes
on where it stopped, and ranks share the chunks among them.
"""
import functools
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch

from lib.checkpoints import write_atomically
from lib.data import loader
from lib.pictures import Progress
from lib.shapes import hashed_uniform


class CachedTokens:
    """Every training image as tokens, encoded once in several augmented views; `batch` gives (tokens (B, N), labels).

    folder: where the chunks are; one has CHUNK rows, uint16, a row being the N tokens and the label of one view of one
    image. BATCH rows are encoded together. data: the images. Raises ValueError where the folder holds other data, or
    another number of views."""
    CHUNK, BATCH, workers = 4096, 256, 0

    def __init__(self, folder, data, views, num_tokens):
        self.folder, self.data, self.views, self.classes = Path(folder), data, views, data.classes
        self.rows = len(data) * views
        self.paths = [self.folder / f"{i:05}.npy" for i in range(math.ceil(self.rows / self.CHUNK))]
        index = {"images": len(data), "views": views, "tokens": num_tokens,
                 "classes": list(data.classes)}
        try:
            found = json.loads((self.folder / "index.json").read_text())
        except FileNotFoundError:
            write_atomically(self.folder / "index.json", lambda file: file.write(json.dumps(index).encode()))
            return
        for key, value in index.items():
            if found.get(key) != value:
                raise ValueError(f"the tokens in {folder} are stale, with another value of {key}: rm -r '{folder}', "
                                 f"then run this again to encode anew")

    def __len__(self):
        return len(self.data)

    def __getitem__(self, first):
        """Images and labels of up to BATCH rows from `first`, for `encode`; none of the next chunk."""
        rows = np.arange(first, min(first + self.BATCH, self.rows, (first // self.CHUNK + 1) * self.CHUNK))
        return self.data.batch(rows % len(self.data), rows + (1 << 50))

    def encode(self, tokenize, rank=0, world=1, workers=None):
        """Writes the chunks that are missing, each rank its share.

        tokenize: images (n, 3, S, S) uint8 -> tokens (n, N). workers: as for data.batches."""
        missing = {path: range(i * self.CHUNK, min((i + 1) * self.CHUNK, self.rows))
                   for i, path in enumerate(self.paths) if i % world == rank and not path.exists()}
        firsts = [first for rows in missing.values() for first in rows[::self.BATCH]]
        total, done = sum(map(len, missing.values())), 0
        progress = Progress(f"encoding {self.rows} views into {self.folder}", total, stream=sys.stderr)
        stream = iter(loader(self, firsts, self.data, workers))
        for path, rows in missing.items():
            batches = []
            for _ in rows[::self.BATCH]:
                images, labels = next(stream)
                batches.append(np.concatenate([tokenize(images).cpu().numpy(), labels.numpy()[:, None]], 1))
                done += len(labels)
                if rank == 0:
                    progress.show(done)
            write_atomically(path, functools.partial(np.save, arr=np.concatenate(batches).astype(np.uint16)))

    @functools.cached_property
    def chunks(self):
        return [np.load(path, mmap_mode="r") for path in self.paths]

    def batch(self, indices, draws):
        """A view of each image, chosen by its draw: tokens (B, N) int32, labels (B,) int64."""
        view = (hashed_uniform(5, draws, 1)[:, 0] * self.views).astype(np.int64)
        rows = np.stack([self.chunks[row // self.CHUNK][row % self.CHUNK] for row in view * len(self.data) + indices])
        return torch.from_numpy(rows[:, :-1].astype(np.int32)), torch.from_numpy(rows[:, -1].astype(np.int64))
