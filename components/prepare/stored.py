"""Byte strings in files, read back by number."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Stored:
    """N byte strings, one behind the other in one or several files.

    Attributes:
        files: the files, in order.
        ends: (N,) end of each string, counted in bytes from the beginning of the first file.
        bases: beginning of each file in the same count.
    """

    files: tuple[Path, ...]
    ends: np.ndarray
    bases: tuple[int, ...] = (0,)

    @classmethod
    def joined(cls, parts: Sequence[Stored]) -> Stored:
        """Returns the strings of all parts, in order."""
        starts = np.cumsum([0, *(int(part.ends[-1]) if len(part.ends) else 0 for part in parts)]).tolist()
        return cls(
            tuple(file for part in parts for file in part.files),
            np.concatenate([part.ends + start for part, start in zip(parts, starts, strict=False)]),
            tuple(base + start for part, start in zip(parts, starts, strict=False) for base in part.bases),
        )

    def sizes(self, numbers: np.ndarray) -> np.ndarray:
        """Returns the sizes of some of the strings, in bytes."""
        return self.ends[numbers] - np.where(numbers > 0, self.ends[numbers - 1], 0)

    def part(self, numbers: np.ndarray) -> StoredPart:
        """Returns some of the strings, in the given order, as a small object that can be sent to another process."""
        ends = self.ends[numbers]
        return StoredPart(self.files, self.bases, ends - self.sizes(numbers), ends)


@dataclass(frozen=True)
class StoredPart:
    """N of the byte strings in files.

    Attributes:
        files: the files.
        bases: see `Stored`.
        starts: (N,) start of each string.
        ends: (N,) end of each string.
    """

    files: tuple[Path, ...]
    bases: tuple[int, ...]
    starts: np.ndarray
    ends: np.ndarray

    def __iter__(self) -> Iterator[bytes]:
        """Reads the strings."""
        opened: dict[int, int] = {}
        with ExitStack() as stack:
            for start, end in zip(self.starts.tolist(), self.ends.tolist(), strict=True):
                number = bisect_right(self.bases, start) - 1
                if number not in opened:
                    opened[number] = os.open(self.files[number], os.O_RDONLY)
                    stack.callback(os.close, opened[number])
                yield os.pread(opened[number], end - start, start - self.bases[number])
