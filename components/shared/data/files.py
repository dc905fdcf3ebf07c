"""Opens the files of a source, local or remote, compressed or not, and determines their formats from their names."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO, TYPE_CHECKING, Any

from .problems import Problems, UnreadableError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

_FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt")
_COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")


_OTHER_CONTENTS = {
    b"\x1f\x8b": "is compressed with gzip; its name must end in .gz",
    b"BZh91AY&SY": "is compressed with bzip2; its name must end in .bz2",
    b"\xfd7zXZ": "is compressed with xz; its name must end in .xz",
    b"\x28\xb5\x2f\xfd": "is compressed with Zstandard; its name must end in .zst",
    b"PAR1": "is a Parquet file; its name must end in .parquet",
    b"ARROW1": "is an Arrow file; its name must end in .arrow",
    b"PK\x03\x04": "is a ZIP archive or an Excel file; unpack it, or save it as CSV",
}
"""First bytes of files that are no text, and what to do."""


@dataclass(frozen=True)
class File:
    """A file of a source, local or remote."""

    filesystem: AbstractFileSystem
    path: str
    shown: str
    """Name for messages."""

    @property
    def format(self) -> str:
        """Returns the format, such as `.csv`."""
        return format_of(self.path)

    def open(self) -> IO[bytes]:
        """Opens the file and decompresses it."""
        name = self.path.lower().split("?")[0]
        if name.endswith(".zst"):
            import pyarrow as pa

            # Reads all frames of a file, and raises if the last one is not complete; fsspec's reader does neither.
            whole = self.filesystem.open(self.path, "rb")
            reader: Any = pa.CompressedInputStream(whole, "zstd")
            return io.BufferedReader(reader)
        compressed = name.endswith(_COMPRESSIONS)
        return self.filesystem.open(self.path, "rb", compression="infer" if compressed else None)


def known_formats() -> str:
    """Lists the supported file name endings, for messages."""
    return f"{', '.join(_FORMATS)} (or these with .gz, .bz2, .xz or .zst)"


def format_of(path: str) -> str:
    """Returns the format that a file's name indicates, such as `.csv`; empty if it is unknown."""
    name = PurePosixPath(path.split("?")[0]).name.lower()
    suffix = PurePosixPath(name).suffix
    if suffix in _COMPRESSIONS:
        suffix = PurePosixPath(name.removesuffix(suffix)).suffix
        return suffix if suffix in _FORMATS and suffix not in (".parquet", ".arrow") else ""
    return suffix if suffix in _FORMATS else ""


def numbered_lines(file: File, problems: Problems) -> Iterator[tuple[int, str]]:
    """Yields numbered lines, including line ends. Skips a byte order mark and reports text that is not UTF-8."""
    with file.open() as opened:
        for number, line in enumerate(opened, start=1):
            if number == 1:
                if line.startswith((b"\xff\xfe", b"\xfe\xff")):
                    raise UnreadableError(f"{file.shown} is UTF-16; save it as UTF-8")
                for magic, problem in _OTHER_CONTENTS.items():
                    if line.startswith(magic):
                        raise UnreadableError(f"{file.shown} {problem}")
                line = line.removeprefix(b"\xef\xbb\xbf")
            try:
                yield number, line.decode("utf-8")
            except UnicodeDecodeError as error:
                problems.add_detail(
                    f"{file.shown}, line {number}: is not UTF-8 (byte 0x{line[error.start]:02x} at position "
                    f"{error.start + 1}); save the file as UTF-8",
                    line.decode("utf-8", errors="replace"),
                )
                if problems.skipped is None:
                    yield number, line.decode("utf-8", errors="replace")
