"""The results of an evaluation, kept in a file as they come."""
import contextlib
import json
from pathlib import Path

from lib.files import write_atomically


class Results:
    """Figures by condition, a line of text that says what was measured, in a JSON file.

    path: the file. setup: plain values that every result depends on; results of another setup stay
    in the file, but are not used. again: use none that the file holds; new ones replace them.
    writes: whether this rank writes. Attributes: known, {condition: figures} of this setup."""

    def __init__(self, path: Path, setup: dict, writes: bool, again: bool = False):
        self.path = path
        self.setup = setup
        self.writes = writes
        self.known = {}
        self.measured = {}                  # by this process: {condition: figures}
        if not again:
            for record in self._read():
                if record["setup"] == setup:
                    self.known[record["condition"]] = record["result"]

    def find(self, condition: str) -> dict | None:
        """Returns the figures of a condition, and says if they are from the file; None if it must
        be measured."""
        is_reused = condition in self.known and condition not in self.measured
        if self.writes and is_reused:
            print(f"from {self.path.name}: {condition} (--again measures it anew)", flush=True)
        return self.known.get(condition)

    def keep(self, condition: str, figures: dict) -> dict:
        """Writes figures to the file and returns them."""
        self.known[condition] = figures
        self.measured[condition] = figures
        self.write({})
        return figures

    def _read(self):
        # A file of something else is replaced.
        with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):
            return json.loads(self.path.read_text())["records"]
        return []

    def _is_measured(self, record):
        return record["setup"] == self.setup and record["condition"] in self.measured

    def write(self, latest: dict) -> None:
        """Writes the file: what was asked for last, {name: value}, then all results."""
        if not self.writes:
            return
        # Another process may have written to the file since.
        records = [record for record in self._read() if not self._is_measured(record)]
        for condition, figures in self.measured.items():
            records.append({"setup": self.setup, "condition": condition, "result": figures})
        content = {**latest, "setup": self.setup, "records": records}
        text = json.dumps(content, indent=1)
        write_atomically(self.path, lambda file: file.write(text.encode()))
