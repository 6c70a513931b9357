"""The log of a training: a CSV file of means, whose rows are also shown as lines of progress."""
import csv
import io
import math
import time

import torch
from torch import Tensor

from lib.errors import UserError
from lib.files import write_atomically
from lib.run import Run
from lib.runtime import mean_over_ranks
from lib.terminal import show_line, time_left


class Log:
    """A CSV file of means over the latest steps; each row is also shown as a line of progress.

    flops: of a training step, for one image. When a run resumes, rows beyond its step are dropped,
    since those steps are done again."""

    def __init__(self, run: Run, flops: float):
        self.run = run
        self.columns = ["step", "images/s", "TFLOP/s"]
        self.flops = flops
        self.pending = {}                                   # scalar tensors by name, on the device
        self.times = []                                     # (step, seconds) of the latest lines
        self.started = False                                # True once the file has a header

    def add(self, **values: Tensor) -> None:
        """Collects scalar tensors on the device until write(), so that no step waits for them."""
        for name, value in values.items():
            self.pending.setdefault(name, []).append(value.detach().float())
        if not self.times:      # the clock starts after the first micro-batch, which compiles
            self.times = [(self.run.step + 1, time.time())]

    def check_finite(self, step: int) -> dict[str, float]:
        """Returns the means since the last row, over all ranks, by name.

        Raises UserError if one is not finite: then the weights must not be saved."""
        means = [torch.stack(values).mean() for values in self.pending.values()]
        values = self.run.machine.fetch(mean_over_ranks(torch.stack(means)))
        row = dict(zip(self.pending, values, strict=True))
        for name, value in row.items():
            if not math.isfinite(value):
                raise UserError(
                    f"{name} became {value} at or before step {step}: the last good checkpoint, if "
                    f"any, is {self.run.resume_file}; go on from it with --resume and a lower --lr "
                    f"(or --muon-lr, or --disc-lr)")
        return row

    def write(self, step: int, **figures: float) -> None:
        """Writes and shows the means since the last row, over all ranks, and this step's figures.

        Raises UserError as check_finite() does, or if the disk is full."""
        row = self.check_finite(step)
        self.pending = {}
        if not self.run.machine.leads:
            return
        row |= figures
        shown = [f"{name} {value:.4g}" for name, value in row.items()]
        self.times = [*self.times[-10:], (step, time.time())]
        speed = self.images_per_second()
        row |= {"step": step, "images/s": speed, "TFLOP/s": speed * self.flops / 1e12}
        self._write_row(row)
        args = self.run.args
        left = time_left((args.steps - step) * args.batch, speed)
        rate = f"{speed:.0f} images/s ({row['TFLOP/s']:.3g} TFLOP/s)"
        # On a terminal the end of the line is cut off.
        show_line("  ".join([f"step {step}/{args.steps}", left, rate, *shown]), step == args.steps)

    def images_per_second(self) -> float:
        """Returns the speed since ten lines ago; 0 if it is not known yet."""
        first_step, first_time = self.times[0]
        last_step, last_time = self.times[-1]
        return (last_step - first_step) * self.run.args.batch / max(last_time - first_time, 1e-9)

    def _write_row(self, row: dict) -> None:
        """Writes a row, below a header with all names so far."""
        new_names = [name for name in row if name not in self.columns]
        if not self.started or new_names:
            self._add_columns(new_names)
        cells = {}
        for name, value in row.items():
            cells[name] = f"{value:.6g}" if isinstance(value, float) else value
        path = self.run.log_file
        try:
            with path.open("a", newline="") as file:
                csv.DictWriter(file, self.columns).writerow(cells)
        except OSError as error:
            raise UserError(f"cannot write {path} ({error.strerror}): free some space, and go on "
                            f"from the last checkpoint with --resume") from error

    def _add_columns(self, new_names: list[str]) -> None:
        """Adds columns, and keeps the file's rows; of a resumed run, those up to its step.

        The file is replaced as a whole, so that no row is lost if this process is killed."""
        path = self.run.log_file
        rows = []
        old_columns = []
        if path.exists() and (self.started or self.run.step):
            reader = csv.DictReader(path.read_text().splitlines())
            old_columns = reader.fieldnames or []
            for row in reader:
                cut_off = row[old_columns[-1]] is None              # by a full disk
                kept = row["step"].isdigit() and int(row["step"]) <= self.run.step and not cut_off
                if self.started or kept:
                    rows.append(row)
        self.columns = list(dict.fromkeys([*self.columns, *new_names, *old_columns]))
        text = io.StringIO(newline="")
        table = csv.DictWriter(text, self.columns)
        table.writeheader()
        table.writerows(rows)
        content = text.getvalue().encode()
        write_atomically(path, lambda file: file.write(content))
        self.started = True
