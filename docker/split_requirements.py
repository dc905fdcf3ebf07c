"""Splits the pinned requirements into what the steps without a model need and what the others need on top.

python docker/split_requirements.py          writes docker/requirements-light.txt and docker/requirements-torch.txt

The closures are those of pyproject.toml's dependencies, as the installed packages tell them; the versions are the pins of
requirements.txt and requirements-dev.txt. A test holds both files to it.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]


def split(root: Path = ROOT) -> dict[str, list[str]]:
    """Names of the two files and the pins that belong in them."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    pins = _pins(root / "requirements.txt") | _pins(root / "requirements-dev.txt")
    light = closure([*project["dependencies"], *extras["s3"]])
    torch = closure([*extras["torch"], *extras["lm-eval"]]) - light
    return {
        "requirements-light.txt": [f"{name}=={pins[name]}" for name in sorted(light)],
        "requirements-torch.txt": [f"{name}=={pins[name]}" for name in sorted(torch)],
    }


def closure(requirements: Iterable[str]) -> set[str]:
    """Names of the installed packages that these requirements come to."""
    found: set[tuple[str, frozenset[str]]] = set()
    left = [Requirement(one) for one in requirements]
    while left:
        wanted = left.pop()
        key = (_normal(wanted.name), frozenset(wanted.extras))
        if key in found:
            continue
        found.add(key)
        for text in metadata.requires(wanted.name) or []:
            one = Requirement(text)
            extras = wanted.extras or {""}
            if one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in extras):
                left.append(one)
    return {name for name, _ in found}


def _pins(file: Path) -> dict[str, str]:
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if "==" in line and line[0] != "#"]
    return {_normal(name): version for name, _, version in (line.partition("==") for line in lines)}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def main() -> None:
    """Writes both files."""
    for name, lines in split().items():
        text = "\n".join(["# Made by docker/split_requirements.py. Do not edit.", *lines, ""])
        (ROOT / "docker" / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
