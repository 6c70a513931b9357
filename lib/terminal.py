"""What a person reads on the terminal: progress lines and tables."""
import os
import sys
import time
from datetime import timedelta


def time_left(amount, speed):
    """What is to be done, and how much of it in a second (0 or None: not known yet) -> "1:02:05 left"."""
    return f"{timedelta(seconds=int(amount / speed)) if speed else '?'} left"


def show_line(text, last=False, stream=None):
    """Prints a line of progress: on a terminal over the one before it, unless that was the `last` of its task."""
    stream = stream or sys.stdout
    if stream.isatty():
        width = os.get_terminal_size(stream.fileno()).columns - 1
        print("\r" + text[:width].ljust(width), end="\n" if last else "", file=stream, flush=True)
    else:
        print(text, file=stream, flush=True)


class Progress:
    """A line that says how far a long task is and how much time is left.

    what: the task. total, unit: how much there is to do. done: how much was done before. stream: None is stdout."""

    def __init__(self, what, total, unit="images", done=0, stream=None):
        self.what, self.total, self.unit, self.first, self.stream = what, total, unit, done, stream or sys.stdout
        self.started = self.shown = time.time()

    def show(self, done):
        """done: of `total`. The last line, where done reaches it, is always shown."""
        now, last = time.time(), done >= self.total
        if not last and now - self.shown < (0.2 if self.stream.isatty() else 10):
            return
        self.shown = now
        speed = (done - self.first) / max(now - self.started, 1e-9)
        amounts = f"{done:.4g} of {self.total:.4g}" if isinstance(done, float) else f"{done} of {self.total}"
        left = time_left(self.total - done, speed)
        show_line(f"{self.what}: {amounts} {self.unit}, {speed:.4g}/s, {left}", last, self.stream)


def print_table(title, rows, columns=None):
    """Prints {name of the row: {column: number or text}}. columns: those to show (None: all with a number or text)."""
    if columns is None:
        columns = dict.fromkeys(column for row in rows.values() for column, value in row.items()
                                if not isinstance(value, (dict, list)))
    cells = [["", *columns]]
    for name, row in rows.items():
        values = [row.get(column, "-") for column in columns]
        cells.append([name, *(value if isinstance(value, str) else f"{value:.4g}" for value in values)])
    widths = [max(map(len, column)) for column in zip(*cells)]
    print(f"\n{title}")
    for first, *others in cells:
        print("  ".join([first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]), flush=True)
