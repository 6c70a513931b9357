"""The results of an evaluation, kept in a file as they come."""
import json
from pathlib import Path
from typing import NamedTuple

from lib.errors import UserError
from lib.files import write_atomically


class Record(NamedTuple):
    """One result in the file."""
    setup: dict
    condition: str
    result: dict


class Results:
    """Figures by condition, a line of text that says what was measured, in a JSON file.

    path: the file. setup: plain values that every result depends on; results of another setup stay
    in the file, but are not used. again: use none that the file holds; new ones replace them.
    writes: whether this rank writes. Attributes: known, {condition: figures} of this setup. Raises
    UserError if the file cannot be read or written; one that is damaged is kept beside it."""

    def __init__(self, path: Path, setup: dict, writes: bool, again: bool = False):
        self.path = path
        self.setup = setup
        self.writes = writes
        self.known = {}
        self.measured = {}                  # by this process: {condition: figures}
        for record in self._read():
            if record.setup == setup and not again:
                self.known[record.condition] = record.result

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

    def _read(self) -> list[Record]:
        try:
            records = json.loads(self.path.read_text())["records"]
            return [Record(**record) for record in records]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror}: make it readable, or "
                            f"delete it") from error
        except (ValueError, KeyError, TypeError):       # not JSON, or something else in JSON
            self._put_aside()
            return []

    def _put_aside(self):
        if self.writes:
            damaged = self.path.with_suffix(f".damaged{self.path.suffix}")
            try:
                self.path.replace(damaged)
            except OSError as error:
                raise UserError(f"{self.path} is damaged, and cannot be renamed "
                                f"({error.strerror}): delete it") from error
            print(f"note: {self.path} is damaged, or not a file of results: it was renamed "
                  f"{damaged.name}, and results begin anew", flush=True)

    def _is_measured(self, record: Record) -> bool:
        return record.setup == self.setup and record.condition in self.measured

    def write(self, latest: dict) -> None:
        """Writes the file: what was asked for last, {name: value}, then all results."""
        if not self.writes:
            return
        # Another process may have written to the file since.
        records = [record for record in self._read() if not self._is_measured(record)]
        for condition, figures in self.measured.items():
            records.append(Record(self.setup, condition, figures))
        content = {
            **latest,
            "setup": self.setup,
            "records": [record._asdict() for record in records],
        }
        text = json.dumps(content, indent=1)
        write_atomically(self.path, lambda file: file.write(text.encode()))
