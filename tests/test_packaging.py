"""The wheel: everything in it, usable outside the repository, and useful without torch."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # From a copy: building in place would leave a build folder whose leftovers end up in the next wheel.
    source = folder / "source"
    names = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        check=True, capture_output=True,
    ).stdout.decode().split("\0")  # fmt: skip
    for name in filter(None, names):
        target = source / name
        if (ROOT / name).is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source)],
        check=True, capture_output=True,
    )  # fmt: skip
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), str(wheel)]
    subprocess.run(command, check=True, capture_output=True)
    return folder


def outside(installed: Path, folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Runs Python on the installed wheel, in a folder that is not the repository."""
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_every_file_of_the_packages_is_in_the_wheel(wheel: Path) -> None:
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("mixtune/")}
    kinds = {".py", ".j2", ".jinja", ".json", ".yaml", ".typed"}
    wanted = {
        f"mixtune/{path.relative_to(ROOT).as_posix()}"
        for package in ("components", "pipelines")
        for path in (ROOT / package).rglob("*")
        if path.suffix in kinds and "__pycache__" not in path.parts
    }
    assert inside == wanted


def test_the_installed_command_works_outside_the_repository(installed: Path, tmp_path: Path) -> None:
    where = outside(installed, tmp_path, "-c", "import mixtune.components.config as c; print(c.__file__)")
    assert where.stdout.startswith(str(installed)), where.stderr
    compiled = outside(installed, tmp_path, "-m", "mixtune.pipelines.cli", "compile", "--output", "p.yaml")
    assert compiled.returncode == 0, compiled.stderr
    assert next(yaml.safe_load_all((tmp_path / "p.yaml").read_text()))["pipelineInfo"]["name"] == "mixtune"
    checked = outside(installed, tmp_path, "-m", "mixtune.pipelines.cli", "check")
    assert checked.returncode == 0, checked.stderr


def test_plan_and_prepare_run_where_there_is_no_torch(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text("".join(f'{{"text": "sentence number {i} of many"}}\n' for i in range(60)))
    code = """
import sys
for name in ("torch", "accelerate", "safetensors"):
    sys.modules[name] = None  # as if it were not installed
from mixtune.components.config import Fingerprints, load, parts
from mixtune.components.prepare.step import run
from mixtune.components.shared.artifacts import Artifact
from mixtune.components.shared.running.context import Context
import mixtune.components.plan.step, mixtune.components.compare.step, mixtune.components.finish.step
config = load({"model": {"base": "scratch"}, "pretrain": {"steps": 1},
               "data": {"pretrain": {"source": "text.jsonl"}, "finetune": {"source": "text.jsonl"}}})
part = parts(config, Fingerprints("a", "b", "c")).prepare_pretrain
outputs = {name: Artifact(name) for name in ("train", "heldout", "tokenizer", "report")}
run(part, context=Context.for_tests(), tokenizer_in=None, pretraining_data=None, **outputs)
"""
    done = outside(installed, tmp_path, "-c", code)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "train" / "manifest.json").is_file()
    assert (tmp_path / "tokenizer" / "tokenizer.json").is_file()


def test_wheels_that_are_carried_to_a_gpu_have_a_pinned_version() -> None:
    pinned = {line.partition("==")[0] for line in (ROOT / "requirements.txt").read_text().splitlines() if "==" in line}
    project = (ROOT / "pyproject.toml").read_text()
    carried = [line for line in (ROOT / "tests/gpu/wheels.txt").read_text().splitlines() if not line.startswith("#")]
    assert carried
    for name in carried:
        assert name in pinned or ("==" in name and f'"{name}"' in project), name


def test_versions_are_pinned_and_no_registry_is_named() -> None:
    for name in ("requirements.txt", "requirements-dev.txt", "docker/sbom.txt"):
        for line in (ROOT / name).read_text().splitlines():
            assert line.startswith("#") or "==" in line, line
            assert "://" not in line
