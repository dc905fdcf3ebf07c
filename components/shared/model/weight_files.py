"""Headers of safetensors files, read without torch: names and shapes of the tensors, and whether the files are whole.

A safetensors file is the length of its header (8 bytes, little-endian), the header (JSON) and the data of the tensors without
gaps (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
LARGEST_HEADER = 100_000_000
"""Bytes; the limit of the safetensors library."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file."""

    file: Path
    shape: tuple[int, ...]
    dtype: str = "F32"
    """As the file's header names it."""


class BrokenFileError(Exception):
    """A weight file cannot be read; the message says what is wrong with it and what to do."""


def shown(shape: Sequence[int]) -> str:
    """Returns a shape as text."""
    return " x ".join(map(str, shape))


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Returns the tensors that a safetensors file holds.

    Raises:
        BrokenFileError: if the file is not whole or is something else.
    """
    size = file.stat().st_size
    with file.open("rb") as content:
        start = content.read(8)
        if start == b"version ":
            raise BrokenFileError("is a git-lfs pointer, not the weights; run `git lfs pull` in its folder")
        length = int.from_bytes(start, "little")
        if size >= 8 and length > LARGEST_HEADER:
            raise BrokenFileError("is no safetensors file; convert the weights, or download them again")
        if size < 8 + length:
            raise BrokenFileError(f"is cut off within its header, after {size:,} bytes; download it again")
        try:
            header = json.loads(content.read(length))
            tensors: dict[str, Any] = {name: entry for name, entry in header.items() if name != "__metadata__"}
            found = {
                name: StoredTensor(file, tuple(map(int, entry["shape"])), str(entry["dtype"]))
                for name, entry in tensors.items()
            }
            wanted = 8 + length + max((int(entry["data_offsets"][1]) for entry in tensors.values()), default=0)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            raise BrokenFileError("has a header that cannot be read; download it again") from None
    if size != wanted:
        raise BrokenFileError(f"has {size:,} bytes, but its header lists {wanted:,}; download it again")
    return found


def stored_tensors(folder: Path) -> tuple[dict[str, StoredTensor], list[str]]:
    """Returns the tensors that transformers loads from a model folder, by name, and a sentence for each problem of a file."""
    if (folder / WEIGHTS).is_file():
        return _of_files({WEIGHTS: None}, folder)
    if not (folder / INDEX).is_file():
        return {}, [f"{folder} has neither {WEIGHTS} nor {INDEX}; rename its weights, or save the model again"]
    try:
        weight_map = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        files: dict[str, set[str] | None] = {}
        for name, file in weight_map.items():
            of_file = files.setdefault(str(file), set())
            assert of_file is not None
            of_file.add(str(name))
    except (ValueError, TypeError, KeyError, AttributeError):
        return {}, [f"{folder / INDEX} cannot be read as an index of weight files; download it again"]
    return _of_files(files, folder)


def _of_files(files: dict[str, set[str] | None], folder: Path) -> tuple[dict[str, StoredTensor], list[str]]:
    """Reads files; for each, the tensors that it must hold, or None if the folder does not say."""
    found: dict[str, StoredTensor] = {}
    problems = []
    for name, wanted in sorted(files.items()):
        file = folder / name
        try:
            tensors = read_header(file)
        except FileNotFoundError:
            problems.append(f"{file} is missing, but {INDEX} names it; download it again")
            continue
        except BrokenFileError as error:
            problems.append(f"{file} {error}")
            continue
        missing = sorted(wanted - tensors.keys()) if wanted is not None else []
        if missing:
            problems.append(f"{file} lacks the tensor {missing[0]}, which {INDEX} says it has; download both again")
        found |= tensors
    return found, problems
