"""Problems with the data, collected so that all of them are reported at once."""

from __future__ import annotations

from ..errors import RefusedError

SHOWN_PROBLEMS = 20


class UnreadableError(Exception):
    """Ends the reading of one file."""


class Problems:
    """Collects what is wrong, so that all of it is reported at once."""

    def __init__(self) -> None:
        self._general: list[str] = []
        self._detailed: list[str] = []
        self._more = 0

    def __len__(self) -> int:
        return len(self._general) + len(self._detailed) + self._more

    def add(self, problem: str) -> None:
        """Adds a problem of a whole source, which is always shown."""
        if problem not in self._general:
            self._general.append(problem)

    def add_detail(self, problem: str) -> None:
        """Adds a problem of a record, of which the first `SHOWN_PROBLEMS` are shown."""
        if len(self._detailed) < SHOWN_PROBLEMS:
            self._detailed.append(problem)
        else:
            self._more += 1

    def sentences(self) -> list[str]:
        """Returns the problems, general ones first; the last sentence says how many more there are."""
        more = [f"and {self._more} more problems of records"] if self._more else []
        return self._general + self._detailed + more

    def raise_if_any(self) -> None:
        """Raises all problems together.

        Raises:
            RefusedError: where there are any.
        """
        if self:
            raise RefusedError(*self.sentences())
