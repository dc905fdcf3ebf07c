"""Writes a software bill of materials (CycloneDX, JSON) for each image: its Python packages and those of Debian.

python docker/bill_of_materials.py FOLDER          of the images that pipelines/images.json names

The Python packages come from cyclonedx-py, which reads what an environment says of its packages; it is given the images' own.
It gets a virtual environment of its own: where rfc3987-syntax is installed, which it brings along, jsonschema loads it, and
with that every program that imports kfp starts seconds later.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import venv
from pathlib import Path
from typing import Any

from mixtune.components.shared.errors import MixtuneError
from mixtune.components.shared.task_name import STEPS
from mixtune.pipelines.images import images

_METADATA = "tar -c -f - /opt/venv/lib/python3*/site-packages/*-info"
_PINS = Path(__file__).with_name("sbom.txt")
_DEBIAN = "dpkg-query --show --showformat '${Package}\\t${Version}\\t${Architecture}\\n' 2>/dev/null || true"


def main(arguments: list[str] | None = None) -> None:
    """Writes one file for each image."""
    parser = argparse.ArgumentParser(description="Writes a software bill of materials for each image.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--docker", default=os.environ.get("DOCKER", "docker"), help="the docker command")
    given = parser.parse_args(arguments)
    given.folder.mkdir(parents=True, exist_ok=True)
    known: dict[str, dict[str, Any]] = {}
    for step in STEPS:
        name = images().of(step)
        layers = _layers(given.docker, name)
        if layers not in known:  # images of the same layers hold the same
            known[layers] = python_packages(given.docker, name)
            known[layers]["components"] += debian_packages(given.docker, name)
        bill = known[layers]
        bill.setdefault("metadata", {})["component"] = {"type": "container", "name": name, "bom-ref": name}
        file = given.folder / f"mixtune-{step}.cdx.json"
        file.write_text(json.dumps(bill, indent=2) + "\n", encoding="utf-8")
        print(f"{file}: {len(bill['components'])} packages")  # noqa: T201


def python_packages(docker: str, image: str) -> dict[str, Any]:
    """The bill of an image's Python packages."""
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(_inside(docker, image, _METADATA))) as archive:
            archive.extractall(folder, filter="data")
        places = [str(place) for place in Path(folder).glob("opt/venv/lib/python3*/site-packages")]
        # cyclonedx-py asks a Python where its packages are; this one answers with the copies.
        answers = Path(folder, "python")
        answers.write_text(f"#!/bin/sh\necho '{json.dumps(places)}'\n", encoding="utf-8")
        answers.chmod(0o755)
        tool = [
            str(cyclonedx()),
            "environment",
            str(answers),
            "--no-validate",
            "--output-reproducible",
        ]
        done = subprocess.run(tool, capture_output=True, check=True)
    return dict(json.loads(done.stdout))


def cyclonedx() -> Path:
    """The program cyclonedx-py, installed where it is not there."""
    folder = Path(sys.prefix) / "tools" / "cyclonedx"
    program = folder / "bin" / "cyclonedx-py"
    if not program.is_file():
        venv.create(folder, with_pip=True, clear=True)
        install = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
        install += ["--disable-pip-version-check", "--requirement", str(_PINS)]
        subprocess.run(install, check=True)
    return program


def debian_packages(docker: str, image: str) -> list[dict[str, str]]:
    """Components for what the base image has installed; none where it is not Debian's."""
    components = []
    for line in _inside(docker, image, _DEBIAN).decode().splitlines():
        package, version, architecture = line.split("\t")
        url = f"pkg:deb/debian/{package}@{version.replace('+', '%2B').replace(':', '%3A')}?arch={architecture}"
        components.append({"type": "library", "name": package, "version": version, "purl": url, "bom-ref": url})
    return components


def _layers(docker: str, image: str) -> str:
    command = [docker, "image", "inspect", "--format", "{{json .RootFS.Layers}}", image]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"there is no image {image} on this machine; build it with `make images`")
    return done.stdout


def _inside(docker: str, image: str, script: str) -> bytes:
    command = [docker, "run", "--rm", "--network=none", "--entrypoint=/bin/sh", image, "-c", script]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode:
        raise SystemExit(f"{image} cannot be looked into: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout


if __name__ == "__main__":
    try:
        main()
    except MixtuneError as refused:
        sys.exit("; ".join(refused.problems))
