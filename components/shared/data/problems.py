"""Collects problems in the data, so that all of them are reported at once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import RefusedError

SHOWN_PROBLEMS = 20


class UnreadableError(Exception):
    """Stops reading a file."""


class Skipped:
    """Records that are left out instead of being refused.

    Args:
        file: file for the records, each a line of JSON with its reason; created with the first one. None only counts them.
    """

    def __init__(self, file: Path | None = None) -> None:
        self._file, self._opened = file, False
        self.count = 0

    def add(self, problem: str, record: Any) -> None:
        """Adds a record with the sentence that says what is wrong with it."""
        self.count += 1
        if self._file is not None:
            with self._file.open("a" if self._opened else "w", encoding="utf-8", errors="backslashreplace") as file:
                file.write(json.dumps({"problem": problem, "record": record}, ensure_ascii=False, default=str) + "\n")
            self._opened = True

    def take(self, file: Path, count: int) -> None:
        """Adds the records that another process left out.

        Args:
            file: its file.
            count: number of the records.
        """
        self.count += count
        if self._file is not None and count:
            with self._file.open("ab" if self._opened else "wb") as mine, file.open("rb") as theirs:
                shutil.copyfileobj(theirs, mine)
            self._opened = True


class Problems:
    """Collects problems, so that all of them are reported at once.

    Args:
        skipped: where invalid records go instead; None makes them problems.
    """

    def __init__(self, skipped: Skipped | None = None) -> None:
        self.skipped = skipped
        self._general: list[str] = []
        self._detailed: list[str] = []
        self._more = 0

    def __len__(self) -> int:
        return len(self._general) + len(self._detailed) + self._more

    def add(self, problem: str) -> None:
        """Adds a problem of a whole source. It is always shown."""
        if problem not in self._general:
            self._general.append(problem)

    def add_detail(self, problem: str, record: Any, skippable: bool = True) -> None:
        """Adds a problem of one record. Only the first `SHOWN_PROBLEMS` of these are shown.

        Args:
            problem: a sentence, which names file and line.
            record: the record, as far as it could be read.
            skippable: whether the records behind it can be read.
        """
        if self.skipped is not None and skippable:
            self.skipped.add(problem, record)
        elif len(self._detailed) < SHOWN_PROBLEMS:
            self._detailed.append(problem)
        else:
            self._more += 1

    def take(self, other: Problems) -> None:
        """Adds the problems of data that follows, as if it had been read with this object."""
        for problem in other._general:
            self.add(problem)
        room = SHOWN_PROBLEMS - len(self._detailed)
        self._detailed += other._detailed[:room]
        self._more += len(other._detailed[room:]) + other._more

    def to_json(self) -> list[Any]:
        """Returns all problems as a value for JSON."""
        return [self._general, self._detailed, self._more]

    @classmethod
    def from_json(cls, value: Sequence[Any]) -> Problems:
        """Returns the problems that `to_json` described."""
        problems = cls()
        problems._general, problems._detailed, problems._more = value
        return problems

    def sentences(self) -> list[str]:
        """Returns the problems, general ones first. The last sentence gives the number of omitted problems."""
        more = [f"and {self._more} more problems of records"] if self._more else []
        return self._general + self._detailed + more

    def raise_if_any(self) -> None:
        """Raises an error that contains all problems.

        Raises:
            RefusedError: if there are any.
        """
        if self:
            raise RefusedError(*self.sentences())
