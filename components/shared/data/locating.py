"""Finds the files of a source."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import EMBEDDED
from ..errors import first_line
from .claims import CLAIM, NOT_MOUNTED
from .data_sets import is_hub, saved_folder
from .files import File, format_of, known_formats
from .problems import Problems

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem


@dataclass(frozen=True)
class FileRange:
    """Some of the files of a source, in their order.

    Attributes:
        first: number of the first file, from 0.
        end: number of the file behind the last one.
        of: number of files of the source.
    """

    first: int
    end: int
    of: int


def file_sizes(source: str, option: str) -> list[int] | None:
    """Returns the sizes of the files of a source, in bytes, in the order in which `read` reads them; 0 of unknown ones.

    Returns:
        The sizes; None if it does not consist of files that can be read one by one, or if they cannot be listed.
    """
    problems = Problems()
    if source == EMBEDDED or is_hub(source) or saved_folder(source):
        return None
    files = find_files(source, option, problems)
    return None if problems else [_size(file) for file in files]


def _size(file: File) -> int:
    try:
        return int(file.filesystem.size(file.path) or 0)
    except Exception:  # a link to nowhere, or what remote file systems raise; who reads the file says so
        return 0


def seen_from_here(source: str) -> str:
    """Returns the path below the working directory, if it is there: shorter, and the same where a project was copied."""
    return source.removeprefix(f"{Path.cwd()}/")


def protocol_of(filesystem: AbstractFileSystem) -> str:
    """Returns the protocol of a file system, such as `file`."""
    protocol = filesystem.protocol
    return str(protocol if isinstance(protocol, str) else protocol[0])


def is_local(source: str, option: str, problems: Problems) -> bool:
    """Tells whether a source is on this machine."""
    located = _filesystem(source, option, problems)
    return located is not None and protocol_of(located[0]) == "file"


def _filesystem(source: str, option: str, problems: Problems) -> tuple[AbstractFileSystem, str] | None:
    from fsspec.core import url_to_fs

    try:
        filesystem, path = url_to_fs(source)
    except ImportError as error:
        problems.add(f"{option}: {source} needs a package that is not installed ({error})")
    except (ValueError, OSError) as error:
        problems.add(f"{option}: {source} cannot be opened ({error})")
    else:
        return filesystem, path
    return None


def find_files(source: str, option: str, problems: Problems) -> list[File]:
    """Returns the files of a source, sorted by name. Collects what is wrong with it as problems."""
    if source.startswith(CLAIM):
        problems.add(f"{option}: {source} {NOT_MOUNTED}")
        return []
    located = _filesystem(source, option, problems)
    if located is None:
        return []
    filesystem, path = located
    try:
        if filesystem.isfile(path):
            paths, shown = [path], {path: seen_from_here(source)}
        elif filesystem.isdir(path):
            hidden = re.compile(r"(^|/)[._]")
            inside = {name: name[len(path.rstrip("/")) + 1 :] for name in filesystem.find(path)}
            paths = [name for name, rest in inside.items() if format_of(name) and not hidden.search(rest)]
            shown = {name: f"{seen_from_here(source).rstrip('/')}/{inside[name]}" for name in paths}
            if not paths:
                problems.add(f"{option}: the folder {source} holds no file that ends in {known_formats()}")
        elif any(character in source for character in "*?["):
            paths = [name for name in filesystem.glob(path) if filesystem.isfile(name)]
            shown = {name: seen_from_here(name) for name in paths}
            if not paths:
                problems.add(f"{option}: no file matches {source}")
        else:
            paths, shown = [], {}
            problems.add(f"{option}: {source} does not exist; correct the path")
    except Exception as error:  # remote file systems raise various errors
        problems.add(f"{option}: {source} cannot be reached ({first_line(error)})")
        return []
    files = [File(filesystem, name, shown[name]) for name in sorted(paths)]
    for file in files:
        if not file.format:
            problems.add(f"{option}: {file.shown} ends in none of {known_formats()}, so its format is not known")
    return [file for file in files if file.format]
