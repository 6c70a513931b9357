"""Measures the samples of a transformer while it is trained (--evaluate-every)."""
import argparse
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor

from lib.errors import UserError
from lib.features import FEATURE_FLAGS, Reference, open_networks
from lib.flags import number, whole
from lib.loader import DataSet
from lib.runtime import Machine
from lib.sets import (
    Batch,
    batches_of_rank,
    random_subset,
    read_batches_of_rank,
    samples_in_turn,
    with_progress,
)

JUDGE_FLAGS = {
    "evaluate_every": (whole, 0, "steps between measurements of FCD or FID, after which the best "
                                 "model so far is kept; 0: never"),
    "evaluate_num": (number(int, 2), 2000, "samples in each of these measurements"),
    **FEATURE_FLAGS,
}


class Judge:
    """Measures the samples of a model while it is trained: their distance to real images.

    args: those of JUDGE_FLAGS. train, val: the run's data sets. folder: the run's. Attributes:
    name, FCD or FID; measure, all that the distance depends on but for the samples. Raises
    UserError as open_networks() does."""
    BATCH = 100

    def __init__(self, args: argparse.Namespace, machine: Machine, train: DataSet, val: DataSet,
                 folder: Path):
        self.machine = machine
        self.num_samples = args.evaluate_num
        self.num_classes = len(train.classes)
        self.networks = open_networks(args, machine, train, folder)
        self.name = self.networks.distance
        real = random_subset(val, args.evaluate_num)
        signature = zlib.crc32(real.signatures().tobytes())
        self.measure = (f"{self.name} of {args.evaluate_num} samples to {len(real)} real images "
                        f"({signature:08x}), {self.networks.name}")
        if len(real) < 2:
            raise UserError("--evaluate-every needs at least 2 validation images, and there is "
                            f"{len(real)}: add images, or leave it out")
        measured = self.networks.measure(read_batches_of_rank(real, self.BATCH, "real images"))
        self.reference = Reference(self.networks, measured)

    def distance(self, draw: Callable[[Tensor, Tensor], Tensor]) -> float:
        """Draws samples, the classes in turn, and returns their distance to real images.

        draw(labels, numbers) returns images uint8 (n, 3, S, S) of these classes and numbers within
        the class, both (n,) on the CPU. All ranks call this and get the distance."""
        samples = self.networks.measure(self._samples(draw))
        return self.reference.distance(samples)

    def _samples(self, draw: Callable[[Tensor, Tensor], Tensor]) -> Iterator[Batch]:
        """Yields the drawn images of this rank, batch by batch."""
        batches = batches_of_rank(self.num_samples, self.BATCH)
        for i in with_progress(batches, self.num_samples, self.BATCH, "samples"):
            labels, numbers = samples_in_turn(i, self.BATCH, self.num_samples, self.num_classes)
            yield Batch(i, draw(labels, numbers), labels)
