"""Sets of images that are measured, and each rank's share of them.

A set is read in batches of a fixed size, numbered from 0. Rank r of R measures the batches r, r +
R, r + 2 R, ..., and gather_batches() puts the results of all ranks in order. So a set is measured
in the same way on any number of ranks."""
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from lib.loader import DataSet, read_ahead
from lib.terminal import Progress

T = TypeVar("T")


class Subset:
    """The images of a data set at `indices`, in this order and never augmented."""

    def __init__(self, data: DataSet, indices: np.ndarray):
        self.data = data
        self.indices = indices
        self.classes = data.classes
        self.workers = data.workers

    def __len__(self) -> int:
        return len(self.indices)

    def batch(self, indices: np.ndarray, seeds: Any = None) -> tuple[Tensor, Tensor]:
        """Returns images uint8 (n, 3, S, S) and labels (n,)."""
        return self.data.batch(self.indices[indices])

    def signatures(self) -> np.ndarray:
        """Returns a number (uint64) for each image, as DataSet.signatures()."""
        return self.data.signatures()[self.indices]


def random_subset(data: DataSet, count: int) -> Subset:
    """Returns the first `count` images of a data set in a fixed random order, since it may be
    sorted by class."""
    generator = np.random.Generator(np.random.Philox(key=[2020, 0]))
    return Subset(data, generator.permutation(len(data))[:count])


class InMemory:
    """The images of a data set, read once and kept: for one that is read several times."""
    workers = 0

    def __init__(self, data: DataSet):
        batches = list(read_batches(data, 100, all_batches(len(data), 100)))
        self.images = torch.cat([batch.images for batch in batches])
        self.labels = torch.cat([batch.labels for batch in batches])
        self.classes = data.classes

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: np.ndarray, seeds: Any = None) -> tuple[Tensor, Tensor]:
        """Returns images uint8 (n, 3, S, S) and labels (n,)."""
        return self.images[indices], self.labels[indices]


class Batch(NamedTuple):
    """A batch of a set."""
    number: int
    images: Tensor      # uint8 (n, 3, S, S)
    labels: Tensor      # (n,), the class that each image is of, or should be


class Batches:
    """The batches of a data set in its own order: [number] is a Batch."""

    def __init__(self, data: DataSet, size: int):
        self.data = data
        self.size = size

    def __getitem__(self, number: int) -> Batch:
        first = number * self.size
        end = min(first + self.size, len(self.data))
        images, labels = self.data.batch(np.arange(first, end))
        return Batch(number, images, labels)


def read_batches(data: DataSet, size: int, numbers: range) -> Iterator[Batch]:
    """Iterates over the batches of these numbers; reader processes read ahead, if the data has any.
    """
    return iter(read_ahead(Batches(data, size), numbers, data.workers))


def samples_in_turn(number: int, size: int, count: int, classes: int) -> tuple[Tensor, Tensor]:
    """Returns batch `number` of `count` samples in all, whose classes take turns: the labels (n,),
    and the number of each sample within its class (n,); n <= size."""
    first = number * size
    end = min(first + size, count)
    places = torch.arange(first, end)
    return places % classes, places // classes


# -------------------------------------------------------------------------------- the ranks' shares

def ranks() -> int:
    """Returns how many ranks share the batches.

    With torch-xla it is one: all chips of all hosts work on every batch together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_batches(count: int, size: int) -> range:
    """Returns the numbers of the batches of `count` images."""
    return range(math.ceil(count / size))


def batches_of_rank(count: int, size: int) -> range:
    """Returns the numbers of those batches that this rank measures."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    return all_batches(count, size)[rank::ranks()]


def read_batches_of_rank(data: DataSet, size: int, title: str) -> Iterator[Batch]:
    """Iterates over those batches that this rank measures. title: of the progress line."""
    batches = read_batches(data, size, batches_of_rank(len(data), size))
    return with_progress(batches, len(data), size, title)


def with_progress(batches: Iterable[T], count: int, size: int, title: str) -> Iterator[T]:
    """Yields this rank's batches, and shows on the first rank how many of `count` images are done.
    """
    leads = not dist.is_initialized() or dist.get_rank() == 0
    progress = Progress(title, count)
    done = 0
    for batch in batches:
        yield batch
        done = min(done + size * ranks(), count)
        if leads:
            progress.show(done)


def gather_batches(results: list) -> list:
    """Returns the results of all ranks in the order of the batches, on all ranks.

    results: this rank's, one for each of batches_of_rank()."""
    if ranks() == 1:
        return results
    by_rank = [None] * ranks()
    dist.all_gather_object(by_rank, results)
    total = sum(map(len, by_rank))
    return [by_rank[number % ranks()][number // ranks()] for number in range(total)]


def concatenate(batches: list[tuple]) -> tuple:
    """Joins the results of several batches: NamedTuples of tensors (n, ...) become one."""
    columns = zip(*batches, strict=True)
    return type(batches[0])(*(torch.cat(column) for column in columns))
