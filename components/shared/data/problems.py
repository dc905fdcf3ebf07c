"""Collects problems in the data, so that all of them are reported at once."""

from __future__ import annotations

from ..errors import RefusedError

SHOWN_PROBLEMS = 20


class UnreadableError(Exception):
    """Stops reading a file."""


class Problems:
    """Collects problems, so that all of them are reported at once."""

    def __init__(self) -> None:
        self._general: list[str] = []
        self._detailed: list[str] = []
        self._more = 0

    def __len__(self) -> int:
        return len(self._general) + len(self._detailed) + self._more

    def add(self, problem: str) -> None:
        """Adds a problem of a whole source. It is always shown."""
        if problem not in self._general:
            self._general.append(problem)

    def add_detail(self, problem: str) -> None:
        """Adds a problem of one record. Only the first `SHOWN_PROBLEMS` of these are shown."""
        if len(self._detailed) < SHOWN_PROBLEMS:
            self._detailed.append(problem)
        else:
            self._more += 1

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
