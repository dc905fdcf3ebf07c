"""A Docker engine of the tests' own, a stand-in for the base image, and the images of all steps.

No registry of images can be reached where these tests run, so that the base image is made of Debian's packages. Wanted at all
events where CI=true; elsewhere used if it is at hand.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).parents[2]
BASE = "python:3.11-slim"
TOOLS = ("dockerd", "mmdebstrap")
WANTED = os.environ.get("CI") == "true" or os.environ.get("TEST_CONTAINERS") == "1"
CANARY = "canary-5f0c2b7e-no-layer-may-hold-this"


def docker() -> str:
    """Debian's client, which has BuildKit; another one on the path may lack it."""
    return "/usr/bin/docker" if Path("/usr/bin/docker").exists() else "docker"


def why_not() -> str | None:
    """Why no engine can be started here; None where one can."""
    if os.environ.get("TEST_DOCKER_HOST"):
        return None
    if os.geteuid() != 0:
        return "only root can start a Docker engine"
    if WANTED and not all(map(shutil.which, TOOLS)):
        for command in ("apt-get update -qq", f"apt-get install -qq -y --no-install-recommends docker.io {TOOLS[1]}"):
            subprocess.run(command.split(), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    missing = [tool for tool in TOOLS if not shutil.which(tool)]
    return f"{' and '.join(missing)} not installed (TEST_CONTAINERS=1 installs them)" if missing else None


@contextmanager
def engine() -> Iterator[str]:
    """Address of an engine that runs until the block ends. TEST_DOCKER_HOST names one that is there already."""
    given = os.environ.get("TEST_DOCKER_HOST")
    if given:
        yield given
        return
    folder = Path(tempfile.mkdtemp(prefix="mt-", dir="/tmp"))
    host = f"unix://{folder}/docker.sock"
    with (folder / "log").open("wb") as log:
        daemon = subprocess.Popen(
            [
                "dockerd", "-H", host, "--data-root", str(folder / "data"), "--exec-root", str(folder / "exec"),
                "-p", str(folder / "pid"), "--iptables=false", "--ip6tables=false", "--ip-forward=false",
                "--bridge=none", "--storage-driver", "overlay2",
            ],
            stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while subprocess.run([docker(), "-H", host, "version"], capture_output=True, check=False).returncode:
            if daemon.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the Docker engine did not start: {(folder / 'log').read_text()[-2000:]}")
            time.sleep(0.2)
        yield host
    finally:
        daemon.terminate()
        with suppress(subprocess.TimeoutExpired):
            daemon.wait(30)
        daemon.kill()
        shutil.rmtree(folder, ignore_errors=True)


def make_base(host: str) -> None:
    """The stand-in for the base image: Debian with Python and the machine's own certificates."""
    if (
        subprocess.run([docker(), "-H", host, "image", "inspect", BASE], capture_output=True, check=False).returncode
        == 0
    ):
        return
    sources = Path("/etc/apt/sources.list.d/debian.sources")
    make = [
        "mmdebstrap", "--quiet", "--variant=minbase",
        "--include=python3,python3-venv,python3-pip,ca-certificates",
        '--customize-hook=cp /etc/ssl/certs/ca-certificates.crt "$1/etc/ssl/certs/ca-certificates.crt"',
        '--customize-hook=rm -f "$1"/usr/lib/python3*/EXTERNALLY-MANAGED',
        '--customize-hook=ln -sf python3 "$1/usr/bin/python"',
        "bookworm", "-", *([str(sources)] if sources.exists() else []),
    ]  # fmt: skip
    with subprocess.Popen(make, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as made:
        subprocess.run([docker(), "-H", host, "import", "-", BASE], stdin=made.stdout, check=True, capture_output=True)
        told = made.communicate()[1]
    assert made.returncode == 0, told.decode()[-2000:]


def build(host: str, folder: Path) -> None:
    """All images, by what `make images` calls, with settings for pip that no layer may hold."""
    settings = folder / "pip.conf"
    settings.write_text(f"# {CANARY}\n[global]\nretries = 6\n", encoding="utf-8")
    command = [
        sys.executable,
        "docker/build_images.py",
        "--docker",
        docker(),
        "--network",
        "host",
        "--pip-conf",
        str(settings),
    ]
    certificates = os.environ.get("PIP_CERT")
    if certificates:
        command += ["--ca", certificates]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "DOCKER_HOST": host}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
