"""Sums over many batches that survive an interruption, and the results that follow from them.

    if condition not in ledger.results:
        sums = ledger.add_up(condition, count, read_batches, what_a_batch_adds)
        ledger.keep(condition, figures_that_follow_from(sums))

A condition is a line of text that says what is measured. Nothing here knows what a batch holds.
"""
import contextlib
import json
import math
import time

import torch

from lib.files import load_checkpoint, save_checkpoint, write_atomically
from lib.runtime import mean_over_ranks
from lib.terminal import Progress


def name_of(what, options, seed):
    """A condition: what is measured, with which settings."""
    return " ".join([what, *(f"{name}={value}" for name, value in options.items()), f"seed={seed}"])


class Ledger:
    """What an evaluation has found: results in eval.json, sums of what is under way in eval.resume.pt.

    folder: of both files (None: keep nothing on disk). setup: the plain values that every result depends on; results
    under another setup stay in the file. batch: images in a batch. again: use none of what is there; what is found anew
    replaces it. Ranks share the batches and all know the sums; only rank 0 writes and shows progress.
    Attributes: results, {condition: figures} under this setup."""
    SAVE_SECONDS = 30

    def __init__(self, folder, setup, machine, batch, again=False):
        self.folder, self.setup, self.machine, self.batch = folder, setup, machine, batch
        self.records, self.results, self.under_way = [], {}, {}             # records: of all setups, as in the file
        if folder:
            with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):  # another's file is replaced
                self.records = json.loads((folder / "eval.json").read_text())["records"]
        if folder and not again:
            own = [record for record in self.records if record["setup"] == setup]
            self.results = {record["condition"]: record["result"] for record in own}
            with contextlib.suppress(FileNotFoundError, ValueError):      # damaged: what it held is done again
                kept = load_checkpoint(folder / "eval.resume.pt", "sums of an evaluation")
                self.under_way = kept["under way"] if kept["setup"] == setup else {}

    def batches_left(self, condition, count):
        """The numbers of the batches that this rank has yet to add up, of those of `count` images: one in each round.

        In the last round a rank may have no batch left: it repeats the last one, of which add_up() takes nothing."""
        done, _ = self.under_way.get(condition, (0, {}))
        total = math.ceil(count / self.batch)
        return [min(first + self.machine.rank, total - 1) for first in range(done, total, self.machine.world)]

    def add_up(self, condition, count, read, measure, keep=None):
        """Adds up what is left of the batches of `count` images -> {name: sum}, tensors on the CPU, on all ranks.

        read(numbers): an iterator over the batches of these numbers. measure(batch) -> sums, rows: {name: tensor} to
        add, and {name: (n, ...)} with a row for every image. keep: {name: m}, of which rows those of the first m images
        are kept, as (m, ...) beside the sums."""
        machine, batches = self.machine, read(self.batches_left(condition, count))
        done, total = self.under_way.get(condition, (0, {}))
        progress, saved = Progress(condition, count, done=done * self.batch), time.time()
        # The total, of all ranks, counts once: the first rank goes on from it, the others from nothing.
        own = dict(total) if machine.leads else {}
        for sums, rows in map(measure, batches):
            machine.sync()
            self._add(own, sums, rows, keep or {}, (done + machine.rank) * self.batch, count)
            done += machine.world
            finished = done * self.batch >= count
            if finished or machine.any(machine.leads and time.time() - saved > self.SAVE_SECONDS):
                total, saved = self._over_ranks(own), time.time()
                own = dict(total) if machine.leads else {}
                self.under_way[condition] = [done, total]
                self._save_sums()
            if machine.leads:
                progress.show(min(done * self.batch, count))
        return total

    def _add(self, own, sums, rows, keep, place, count):
        """Adds a batch to a rank's own sums. place: that of its first image; beyond `count`, nothing is added."""
        for name, value in sums.items():
            own[name] = own.get(name, 0) + value.cpu() * (place < count)
        for name, length in keep.items():
            own.setdefault(name, torch.zeros(min(length, count), *rows[name].shape[1:], dtype=rows[name].dtype))
            # These may be tensors of the total: a batch that is repeated after an interruption writes the same again.
            kept = own[name][place:place + len(rows[name])]               # fewer than in the batch, where `length` ends
            kept[:] = rows[name][:len(kept)].cpu()

    def _over_ranks(self, sums):
        """{name: the sum over the ranks}, on all of them."""
        total = {}
        for name, value in sorted(sums.items()):                          # in the same order on all ranks
            whole = mean_over_ranks(value.to(self.machine.device).double()).cpu() * self.machine.world
            total[name] = whole.to(value.dtype) if value.is_floating_point() else whole.round().to(value.dtype)
        return total

    def _save_sums(self):
        if self.machine.leads and self.folder:
            save_checkpoint(self.folder / "eval.resume.pt", {
                "kind": "sums of an evaluation", "setup": self.setup, "under way": self.under_way})

    def keep(self, condition, figures):
        """Writes down the figures, {name: plain value}; the sums that they came from are no longer needed."""
        self.results[condition] = figures
        others = [each for each in self.records if (each["setup"], each["condition"]) != (self.setup, condition)]
        self.records = others + [{"setup": self.setup, "condition": condition, "result": figures}]
        self.write()
        self.under_way.pop(condition, None)
        self._save_sums()

    def write(self, **latest):
        """Writes eval.json: what was asked for last (a dict), then every result with the setup it was found under."""
        if self.machine.leads and self.folder:
            text = json.dumps({**latest, "setup": self.setup, "records": self.records}, indent=1)
            write_atomically(self.folder / "eval.json", lambda file: file.write(text.encode()))
