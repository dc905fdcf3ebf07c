"""Splits the pinned requirements into what the steps without a model need and what the others need on top.

python docker/split_requirements.py          writes docker/requirements-{light,torch,cpu,cuda}.txt

The closures are those of pyproject.toml's dependencies, as the installed packages tell them; the versions are the pins of
requirements.txt and requirements-dev.txt. torch itself stands in the files of its two builds. What the CUDA build requires
on top is resolved by pip on the package index, extras included, since the build that is installed here may be another. Tests
hold all four files to it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]


def split(root: Path = ROOT) -> dict[str, list[str]]:
    """Names of the files whose pins are part of the whole, and the pins that belong in them."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    pins = _pins(root / "requirements.txt") | _pins(root / "requirements-dev.txt")
    light = closure([*project["dependencies"], *extras["s3"]])
    torch = closure([*extras["torch"], *extras["lm-eval"]]) - light - {"torch"}
    return {
        "requirements-light.txt": [f"{name}=={pins[name]}" for name in sorted(light)],
        "requirements-torch.txt": [f"{name}=={pins[name]}" for name in sorted(torch)],
        # Without `+cpu` pip would rather take a CUDA build of several gigabytes.
        "requirements-cpu.txt": [f"torch=={pins['torch']}+cpu"],
    }


def cuda(constraints: Iterable[str], root: Path = ROOT) -> list[str]:
    """Pins of torch's CUDA build and of all that it requires and the other files do not hold, as pip resolves it.

    Args:
        constraints: names of files in docker/ whose pins must be met.

    Raises:
        subprocess.CalledProcessError: where pip cannot reach the package index, or a pin does not meet a requirement.
    """
    torch = f"torch==={_pins(root / 'requirements.txt')['torch']}"  # three: no build of another name, such as +cpu
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
        command += ["--only-binary=:all:", f"--report={report}", torch]
        command += [f"--constraint={root / 'docker' / name}" for name in constraints]
        subprocess.run(command, check=True, capture_output=True, text=True)
        resolved = [one["metadata"] for one in json.loads(report.read_text(encoding="utf-8"))["install"]]
    others = {name for pins in split(root).values() for name in (pin.partition("==")[0] for pin in pins)}
    found = {_normal(one["name"]): one["version"] for one in resolved}
    return [torch, *sorted(f"{name}=={version}" for name, version in found.items() if name not in others)]


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
    return {_normal(name): version.removeprefix("=") for name, _, version in (line.partition("==") for line in lines)}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def main() -> None:
    """Writes all files."""
    files = split()
    for name, lines in files.items():
        _write(name, lines)
    _write("requirements-cuda.txt", cuda([name for name in files if name != "requirements-cpu.txt"]))


def _write(name: str, pins: list[str]) -> None:
    text = "\n".join(["# Made by docker/split_requirements.py. Do not edit.", *pins, ""])
    (ROOT / "docker" / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
