"""Stage 2 from cached tokens (--cache-tokens): each training image is encoded once, in several augmented views.

A folder holds index.json and chunks NNNNN.npy; a chunk is written whole or not at all, so an interrupted encoding goes
on where it stopped, and ranks share the chunks among them.
"""
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

from data import hashed_uniform, loader
from runtime import write_atomically


class CachedTokens:
    """Every training image as tokens, encoded once in several augmented views; `batch` gives (tokens (B, N), labels).

    folder: where the chunks are; one has CHUNK rows, uint16, a row being the N tokens and the label of one view of one
    image. data: the images. fingerprint: of the tokenizer.
    Raises ValueError where the folder was made with another tokenizer, other data or another number of views."""
    CHUNK, workers = 4096, 0

    def __init__(self, folder, data, views, fingerprint, num_tokens):
        self.folder, self.data, self.views, self.classes = Path(folder), data, views, data.classes
        self.rows = len(data) * views
        index = {"tokenizer": fingerprint, "images": len(data), "views": views, "tokens": num_tokens,
                 "classes": list(data.classes)}
        try:
            found = json.loads((self.folder / "index.json").read_text())
        except FileNotFoundError:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self.folder / "index.json", lambda file: file.write(json.dumps(index).encode()))
        else:
            if found != index:
                what = next(key for key in index if found.get(key) != index[key])
                raise ValueError(f"the tokens in {folder} are stale, with another value of {what}: rm -r '{folder}', then run this "
                                 f"again to encode anew")
        self.paths = [self.folder / f"{i:05}.npy" for i in range(-(-self.rows // self.CHUNK))]

    def __len__(self):
        return len(self.data)

    def __getitem__(self, first):
        """Images and labels of up to 256 rows from `first`, for `encode`."""
        rows = np.arange(first, min(first + 256, self.rows, (first // self.CHUNK + 1) * self.CHUNK))
        return self.data.batch(rows % len(self.data), rows + (1 << 50))

    def encode(self, tokenize, rank=0, world=1, workers=None):
        """Writes the chunks that are missing, each rank its share. tokenize: images (n, 3, S, S) uint8 -> tokens (n, N)."""
        missing = [i for i, path in enumerate(self.paths) if i % world == rank and not path.exists()]
        firsts = [first for i in missing for first in range(i * self.CHUNK, min((i + 1) * self.CHUNK, self.rows), 256)]
        stream, started, done = iter(loader(self, firsts, self.data, workers)), time.time(), 0
        for i in missing:
            rows = []
            while len(rows) * 256 < min(self.CHUNK, self.rows - i * self.CHUNK):
                images, labels = next(stream)
                rows.append(np.concatenate([tokenize(images).cpu().numpy(), labels.numpy()[:, None]], 1).astype(np.uint16))
                done += len(labels)
            write_atomically(self.paths[i], lambda file: np.save(file, np.concatenate(rows)))
            if rank == 0:
                left = (time.time() - started) / done * (256 * len(firsts) - done)
                print(f"encoding {self.rows} views into {self.folder}: {done / (time.time() - started):.0f} images/s, "
                      f"{max(0, left) / 60:.1f} min left", file=sys.stderr, flush=True)

    def batch(self, indices, draws):
        if not hasattr(self, "chunks"):
            self.chunks = [np.load(path, mmap_mode="r") for path in self.paths]
        view = (hashed_uniform(5, draws, 1)[:, 0] * self.views).astype(np.int64)
        rows = np.stack([self.chunks[row // self.CHUNK][row % self.CHUNK] for row in view * len(self.data) + indices])
        return torch.from_numpy(rows[:, :-1].astype(np.int32)), torch.from_numpy(rows[:, -1].astype(np.int64))
