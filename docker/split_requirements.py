"""Splits the pinned requirements into what the steps without a model need and what the others need on top.

python docker/split_requirements.py          writes docker/requirements-{light,torch,cpu,cuda}.txt, and the comments of
                                             requirements.txt, which name the packages that need each one

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
    light = closure([*project["dependencies"], *extras["s3"]]).keys()
    torch = closure([*extras["torch"], *extras["lm-eval"]]).keys() - light - {"torch"}
    return {
        "requirements-light.txt": [f"{name}=={pins[name]}" for name in sorted(light)],
        "requirements-torch.txt": [f"{name}=={pins[name]}" for name in sorted(torch)],
        # Without `+cpu` pip would rather take a CUDA build of several gigabytes.
        "requirements-cpu.txt": [f"torch=={pins['torch']}+cpu"],
    }


def cuda(constraints: Iterable[str], root: Path = ROOT) -> list[str]:
    """Pins of torch's CUDA build, of the extra `gpu`, and of all that they require and the other files do not hold.

    pip resolves them.

    Args:
        constraints: names of files in docker/ whose pins must be met.

    Raises:
        subprocess.CalledProcessError: where pip cannot reach the package index, or a pin does not meet a requirement.
    """
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    torch = f"torch==={_pins(root / 'requirements.txt')['torch']}"  # three: no build of another name, such as +cpu
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
        command += ["--only-binary=:all:", f"--report={report}", torch, *project["optional-dependencies"]["gpu"]]
        command += [f"--constraint={root / 'docker' / name}" for name in constraints]
        subprocess.run(command, check=True, capture_output=True, text=True)
        resolved = [one["metadata"] for one in json.loads(report.read_text(encoding="utf-8"))["install"]]
    others = {name for pins in split(root).values() for name in (pin.partition("==")[0] for pin in pins)}
    found = {_normal(one["name"]): one["version"] for one in resolved}
    return [torch, *sorted(f"{name}=={version}" for name, version in found.items() if name not in others)]


def with_reasons(root: Path = ROOT) -> list[str]:
    """Returns the pins of requirements.txt, each with a comment that names the packages that require it."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = closure([*project["dependencies"], *project["optional-dependencies"]["torch"]])
    pins = _pins(root / "requirements.txt")
    return [f"{name}=={pins[name]}  # {', '.join(sorted(needed.get(name, ())))}" for name in sorted(pins)]


def closure(requirements: Iterable[str]) -> dict[str, set[str]]:
    """Returns the installed packages that these requirements come to, each with the packages that require it."""
    found: dict[str, set[str]] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    left = [("mixtune", Requirement(one)) for one in requirements]
    while left:
        parent, wanted = left.pop()
        name = _normal(wanted.name)
        found.setdefault(name, set()).add(parent)
        key = (name, frozenset(wanted.extras))
        if key in seen:
            continue
        seen.add(key)
        for text in metadata.requires(wanted.name) or []:
            one = Requirement(text)
            extras = wanted.extras or {""}
            if one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in extras):
                left.append((name, one))
    return found


def _pins(file: Path) -> dict[str, str]:
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if "==" in line and line[0] != "#"]
    pins = (line.partition("#")[0].strip().partition("==") for line in lines)
    return {_normal(name): version.removeprefix("=") for name, _, version in pins}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def main() -> None:
    """Writes all files."""
    whole = ROOT / "requirements.txt"
    first = whole.read_text(encoding="utf-8").splitlines()[0]
    whole.write_text("\n".join([first, *with_reasons(), ""]), encoding="utf-8")
    files = split()
    for name, lines in files.items():
        _write(name, lines)
    _write("requirements-cuda.txt", cuda([name for name in files if name != "requirements-cpu.txt"]))


def _write(name: str, pins: list[str]) -> None:
    text = "\n".join(["# Made by docker/split_requirements.py. Do not edit.", *pins, ""])
    (ROOT / "docker" / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
