"""The endless stream of shuffled batches for training, and the processes that read ahead for it."""
import atexit
import contextlib
import copy
import functools
import multiprocessing
import signal
import threading
from collections.abc import Iterable, Iterator
from typing import Protocol

import numpy as np
import torch

from lib.errors import UserError, end_readers
from lib.runtime import Machine

atexit.register(end_readers)        # also of a script that does not use errors.command_line()

ImagesAndLabels = tuple[torch.Tensor, torch.Tensor]     # (B, 3, S, S) uint8, (B,) int64


class DataSet(Protocol):
    """A training or validation set."""

    classes: list[str]        # names by label
    image_size: int           # S
    workers: int              # processes that read ahead; 0 if images are in memory or drawn

    def __len__(self) -> int: ...

    def batch(self, indices: np.ndarray, seeds: np.ndarray | None = None) -> ImagesAndLabels:
        """Returns a batch as a pure function of the arguments.

        seeds: an integer for each image, which chooses its augmentation; None: no augmentation."""

    def signatures(self) -> np.ndarray:
        """Returns a number (uint64) for each image that changes if the image or its label does.

        This default is for images that never change."""
        return np.arange(len(self), dtype=np.uint64)


@functools.lru_cache(maxsize=1)
def shuffled(seed: int, epoch: int, length: int) -> np.ndarray:
    """Returns the indices of an epoch in its random order."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(length)


def augmentation_seeds(seed: int, places: np.ndarray) -> np.ndarray:
    """Returns a seed for each place in the stream, for the augmentation of its image.

    The lower 40 bits are the place; the 22 bits above come from the seed."""
    return places + (seed % (1 << 22) << 40)


# Where the seeds of the views that are encoded in advance start: above the bits of
# augmentation_seeds(). They do not depend on --seed, so that runs can share a cache.
VIEW_SEEDS = 1 << 62


class ShuffledBatches:
    """Batch number `step` of an endless stream of shuffled epochs: a pure function of (seed, step).

    size: B. Each of `world` ranks gets B / world images of every batch; together they get the batch
    that one process would get."""

    def __init__(self, data: DataSet, size: int, seed: int, rank: int = 0, world: int = 1):
        self.data = data
        self.size = size
        self.seed = seed
        self.rank = rank
        self.size_of_rank = size // world

    def __getitem__(self, step: int) -> ImagesAndLabels:
        first = step * self.size + self.rank * self.size_of_rank
        places = range(first, first + self.size_of_rank)             # in the stream of all epochs
        length = len(self.data)
        indices = [shuffled(self.seed, place // length, length)[place % length] for place in places]
        return self.data.batch(np.array(indices), augmentation_seeds(self.seed, np.array(places)))


def training_batches(
    data: DataSet, size: int, seed: int, first: int, last: int, workers: int | None = None,
    machine: Machine | None = None,
) -> Iterator[ImagesAndLabels]:
    """Iterates over the batches of steps first .. last - 1 of the stream.

    size: B, over all ranks. workers: processes that read ahead; None: data.workers. machine: whose
    rank and device the batches are for; None: one process on the CPU. Raises UserError as
    data.batch() does."""
    if workers is None:
        workers = data.workers
    if machine is None:
        return read_ahead(ShuffledBatches(data, size, seed), range(first, last), workers)
    shuffled_batches = ShuffledBatches(data, size, seed, machine.rank, machine.world)
    on_cuda = machine.device.type == "cuda"
    return read_ahead(shuffled_batches, range(first, last), workers, pin_memory=on_cuda)


def read_ahead(dataset: object, keys: Iterable, workers: int, pin_memory: bool = False) -> Iterator:
    """Iterates over dataset[key] for every key. If workers > 0, so many processes read ahead.

    Raises UserError if dataset[key] does, or if one of these processes dies."""
    readers = torch.utils.data.DataLoader(
        ErrorsAsValues(dataset), batch_size=None, sampler=keys, num_workers=workers,
        multiprocessing_context=context_of_readers() if workers > 0 else None,
        pin_memory=pin_memory, worker_init_fn=ignore_signals)
    try:
        readers = iter(readers)
        in_main_thread = threading.current_thread() is threading.main_thread()
        if workers > 0 and in_main_thread and hasattr(signal, "SIGCHLD"):       # not on Windows
            # If a reader died, torch's handler would raise an error anywhere in a training step.
            # Without it the error comes with the next batch, within five seconds.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for item in readers:
            if isinstance(item, UserError):
                raise item
            yield item
    except (RuntimeError, OSError, EOFError) as error:
        if workers == 0 or str(error).startswith("Caught "):       # an error of dataset[key] itself
            raise
        raise UserError(f"a process that reads images died ({type(error).__name__} {error}): lower "
                        f"--workers, or provide more (shared) memory, in Docker with --ipc=host"
                        ) from error


def context_of_readers() -> multiprocessing.context.BaseContext:
    """Returns this system's way to start processes, with LocklessEvent in place of Event."""
    context = copy.copy(multiprocessing.get_context())
    context.Event = LocklessEvent
    return context


class LocklessEvent:
    """An event for several processes, without a lock.

    A process that is killed while it looks at a multiprocessing.Event keeps its lock: torch would
    then wait for the lock for ever, where it should say that a reader has died."""

    def __init__(self):
        self.state = multiprocessing.RawValue("b", 0)

    def set(self):
        self.state.value = 1

    def is_set(self) -> bool:
        return self.state.value == 1


class ErrorsAsValues:
    """A data set that returns a UserError where `dataset` raises it.

    If a reader process raised it, torch would put the traceback into its message."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, key):
        try:
            return self.dataset[key]
        except UserError as error:
            return error


def ignore_signals(worker: int) -> None:
    """Makes a reader process ignore Ctrl-C and SIGTERM, which torchrun sends to the whole group.

    The training loop finishes its step first, and may need the readers for it. Then it ends them
    (errors.end_readers); if it is killed, torch's watchdog ends them within five seconds."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@contextlib.contextmanager
def interruptible(message: str) -> Iterator[None]:
    """Lets Ctrl-C and SIGTERM end a long task at once, with a KeyboardInterrupt of this message.

    Otherwise a training run reacts to them only after its next step (lib.run)."""
    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt(message)

    if threading.current_thread() is not threading.main_thread():   # only this one may set handlers
        yield
        return
    on_interrupt = signal.signal(signal.SIGINT, stop)
    on_terminate = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, on_interrupt)
        signal.signal(signal.SIGTERM, on_terminate)
