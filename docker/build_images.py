"""Builds the images of all steps by plain `docker build`, and notes their names in pipelines/images.json.

    make images                                              for `mixtune run --runner docker` on this machine
    make images IMAGES="--prefix registry.example/team --push"    for a cluster; images.json then holds digests

What tells pip where packages are comes from outside and stays there: --pip-conf and --ca are mounted for the build alone, so
are wheels that lie at hand (--wheels; by default the folder in PIP_FIND_LINKS), such as a CPU build of torch.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from mixtune.components.shared.errors import MixtuneError
from mixtune.components.shared.task_name import STEPS
from mixtune.pipelines.images import Images, images, source_digest

ROOT = Path(__file__).resolve().parents[1]
WHEELS = ROOT / "docker" / "wheels"


def main(arguments: list[str] | None = None) -> None:
    """Builds, and pushes where asked."""
    given = _parse(arguments)
    found = images(given.prefix, given.tag)
    chosen = Images(prefix=found.prefix, tag=found.tag)  # without digests: those are of what was built before
    wheels = _lay_out_wheels(given.wheels)
    try:
        for step in STEPS:
            print(f"building {chosen.of(step)}", flush=True)  # noqa: T201
            _docker(given, *_build(given, chosen, step))
    finally:
        if wheels:
            shutil.rmtree(WHEELS)
    if given.push:
        chosen = chosen.model_copy(update={"digests": {step: _push(given, chosen.of(step)) for step in STEPS}})
    if chosen != found or given.push:
        chosen.save(ROOT / "pipelines" / "images.json")
        print("wrote pipelines/images.json; `make compiled` writes the compiled packages anew")  # noqa: T201


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Builds the images of all steps.")
    parser.add_argument("--docker", default=os.environ.get("DOCKER", "docker"), help="the docker command")
    parser.add_argument("--prefix", help="registry and folder of the images")
    parser.add_argument("--tag", help="their tag; never latest")
    parser.add_argument("--base-image", default="python:3.11-slim")
    parser.add_argument("--torch", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--pip-conf", type=Path, help="a pip.conf for the build alone")
    parser.add_argument("--ca", type=Path, help="certificates for pip to trust, for the build alone")
    parser.add_argument("--wheels", type=Path, default=os.environ.get("PIP_FIND_LINKS"), help="folder of wheels")
    parser.add_argument("--network", default="default", help="Docker network of the build")
    parser.add_argument("--push", action="store_true", help="push the images and note their digests")
    return parser.parse_args(arguments)


def _lay_out_wheels(folder: Path | None) -> bool:
    """Links the wheels of torch into the build's context; True where there are any."""
    shutil.rmtree(WHEELS, ignore_errors=True)
    found = list(Path(folder).glob("torch-*.whl")) if folder else []
    for wheel in found:
        WHEELS.mkdir(exist_ok=True)
        try:
            os.link(wheel, WHEELS / wheel.name)
        except OSError:
            shutil.copy2(wheel, WHEELS)
    return bool(found)


def _build(given: argparse.Namespace, chosen: Images, step: str) -> list[str]:
    secrets = {"pip_conf": given.pip_conf, "ca": given.ca}
    values = {
        "BASE_IMAGE": given.base_image,
        "TORCH_VARIANT": given.torch,
        "VERSION": version("mixtune"),
        "REVISION": _commit(),
        "CODE_DIGEST": source_digest(),
    }
    return [
        "build", "--progress=plain", "--file", str(ROOT / "docker" / "Dockerfile"), "--target", step,
        "--tag", chosen.of(step), "--network", given.network,
        *(part for name, file in secrets.items() if file for part in ("--secret", f"id={name},src={file}")),
        *(part for name, value in values.items() for part in ("--build-arg", f"{name}={value}")),
        str(ROOT),
    ]  # fmt: skip


def _commit() -> str:
    """The commit, with a mark where the work tree has changes on top."""
    done = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.stdout.strip() or "unknown"


def _push(given: argparse.Namespace, name: str) -> str:
    _docker(given, "push", name)
    shown = subprocess.run(
        [given.docker, "image", "inspect", "--format", "{{range .RepoDigests}}{{println .}}{{end}}", name],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    digests = [
        line.partition("@")[2] for line in shown.stdout.split() if line.startswith(name.rpartition(":")[0] + "@")
    ]
    return digests[0]


def _docker(given: argparse.Namespace, *arguments: str) -> None:
    try:
        done = subprocess.run([given.docker, *arguments], env={**os.environ, "DOCKER_BUILDKIT": "1"}, check=False)
    except OSError as error:
        raise SystemExit(
            f"{given.docker} cannot be started ({error.strerror}); install Docker, or set DOCKER"
        ) from None
    if done.returncode:
        raise SystemExit(f"`{given.docker} {arguments[0]}` failed; what it said stands above")


if __name__ == "__main__":
    try:
        main()
    except MixtuneError as refused:
        sys.exit("; ".join(refused.problems))
