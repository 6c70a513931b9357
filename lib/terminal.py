"""Prints what a person reads on the terminal: progress lines and tables."""
import os
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import TextIO


def time_left(amount: float, speed: float | None) -> str:
    """Returns how long the rest of a task takes, such as "1:02:05 left".

    amount: what is left to do. speed: how much is done in a second; 0 or None if not known yet."""
    if not speed:
        return "? left"
    return f"{timedelta(seconds=int(amount / speed))} left"


unfinished = None               # the terminal whose progress line waits for the next one


def show_line(text: str, last: bool = False, stream: TextIO | None = None) -> None:
    """Prints a line of progress. On a terminal the next one will replace it, unless it is the last.

    stream: None is stdout."""
    global unfinished
    stream = stream or sys.stdout
    if not stream.isatty():
        print(text, file=stream, flush=True)
        return
    width = (os.get_terminal_size(stream.fileno()).columns or 80) - 1   # some terminals say 0
    end = "\n" if last else ""
    print("\r" + text[:width].ljust(width), end=end, file=stream, flush=True)
    unfinished = None if last else stream


def end_line() -> None:
    """Ends a progress line, so that what follows, such as an error, has a line of its own."""
    global unfinished
    if unfinished is not None:
        print(file=unfinished, flush=True)
    unfinished = None


class Progress:
    """Shows how far a long task is and how much time is left.

    task: its name. total: how many units there are to do. stream: None is stdout."""

    def __init__(self, task: str, total: int, unit: str = "images", stream: TextIO | None = None):
        self.task = task
        self.total = total
        self.unit = unit
        self.stream = stream or sys.stdout
        self.started = time.time()
        self.shown = self.started                           # when the latest line was printed

    def show(self, done: int) -> None:
        """Prints a line if the latest one is old enough, or if `done` reaches the total."""
        now = time.time()
        last = done >= self.total
        seconds_between_lines = 0.2 if self.stream.isatty() else 10
        if not last and now - self.shown < seconds_between_lines:
            return
        self.shown = now
        speed = done / max(now - self.started, 1e-9)
        left = time_left(self.total - done, speed)
        show_line(f"{self.task}: {done} of {self.total} {self.unit}, {speed:.4g}/s, {left}", last,
                  self.stream)


def format_cell(value: float | str) -> str:
    """Returns a number with four digits, and text as it is."""
    return value if isinstance(value, str) else f"{value:.4g}"


def print_table(title: str, rows: dict[str, dict], columns: Sequence[str] | None = None) -> None:
    """Prints a table with a row for each entry of `rows`, and '-' where a row lacks a column.

    rows: {name of the row: {column: number or text}}. columns: those to show, in this order;
    None: all that hold numbers or text."""
    if columns is None:
        columns = []
        for row in rows.values():
            for column, value in row.items():
                if column not in columns and not isinstance(value, (dict, list)):
                    columns.append(column)
    lines = [["", *columns]]
    for name, row in rows.items():
        cells = [format_cell(row.get(column, "-")) for column in columns]
        lines.append([name, *cells])
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    print(f"\n{title}")
    for line in lines:
        cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        cells[0] = line[0].ljust(widths[0])
        print("  ".join(cells), flush=True)
