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
        self.records = []                   # of all setups
        # A file of something else is replaced.
        with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):
            self.records = json.loads(path.read_text())["records"]
        if not again:
            for record in self.records:
                if record["setup"] == setup:
                    self.known[record["condition"]] = record["result"]

    def keep(self, condition: str, figures: dict) -> dict:
        """Writes figures to the file and returns them."""
        self.known[condition] = figures
        others = [record for record in self.records if not self._is_of(record, condition)]
        record = {"setup": self.setup, "condition": condition, "result": figures}
        self.records = [*others, record]
        self.write({})
        return figures

    def _is_of(self, record, condition):
        return record["setup"] == self.setup and record["condition"] == condition

    def write(self, latest: dict) -> None:
        """Writes the file: what was asked for last, {name: value}, then all results."""
        if not self.writes:
            return
        content = {**latest, "setup": self.setup, "records": self.records}
        text = json.dumps(content, indent=1)
        write_atomically(self.path, lambda file: file.write(text.encode()))
