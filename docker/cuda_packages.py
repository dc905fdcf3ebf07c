"""Prints what the CUDA build of torch in a folder asks for on top of the pinned packages, as pip requirements."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement


def cuda_packages(folder: str) -> list[str]:
    """Requirements of torch, and of what it requires, that no file of pins names."""
    pinned = {
        line.partition("==")[0]
        for file in Path(__file__).parent.glob("requirements-*.txt")
        for line in file.read_text(encoding="utf-8").splitlines()
    }
    found = next(iter(metadata.distributions(name="torch", path=[folder])))
    wanted = [Requirement(one) for one in found.requires or []]
    return [
        f"{one.name}{_extras(one)}{one.specifier}"
        for one in wanted
        if one.name not in pinned and (one.marker is None or one.marker.evaluate({"extra": ""}))
    ]


def _extras(one: Requirement) -> str:
    return f"[{','.join(sorted(one.extras))}]" if one.extras else ""


if __name__ == "__main__":
    print("\n".join(cuda_packages(sys.argv[1])))  # noqa: T201
