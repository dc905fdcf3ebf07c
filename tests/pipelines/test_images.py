"""Names of images, the requirements that they are built from, and what is said where no container can be run."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from mixtune.components.config import load
from mixtune.components.shared.errors import RefusedError
from mixtune.components.shared.task_name import STEPS
from mixtune.pipelines.cli.commands import compile_pipeline
from mixtune.pipelines.images import Images, images
from mixtune.pipelines.local.containers import Containers, _environment, _read

ROOT = Path(__file__).parents[2]
DIGEST = "sha256:" + "0" * 64


def test_names_come_from_the_file_or_from_what_is_given() -> None:
    assert images().of("plan") == "mixtune-plan:0.1.0"
    assert images("registry.example:5000/team", "1.2").of("plan") == "registry.example:5000/team/mixtune-plan:1.2"
    assert Images(tag="1", digests={"plan": DIGEST}).of("plan") == f"mixtune-plan@{DIGEST}"
    assert Images(tag="1", digests={"plan": DIGEST}).of("mixed") == "mixtune-mixed:1"


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"tag": "latest"}, "latest"),
        ({"tag": "a b"}, "--tag"),
        ({"tag": "1", "prefix": "https://x/"}, "--image-prefix"),
        ({"tag": "1", "digests": {"plan": "sha256:0"}}, "digest"),
    ],
)
def test_names_that_move_or_are_none_are_refused(values: dict[str, object], word: str) -> None:
    with pytest.raises(RefusedError, match=word):
        Images.model_validate(values)


def test_a_compiled_package_carries_the_images_that_were_asked_for(tmp_path: Path) -> None:
    compile_pipeline(None, (), tmp_path / "p.yaml", None, "ir", image_prefix="registry.example/team", tag="7")
    package = next(yaml.safe_load_all((tmp_path / "p.yaml").read_text()))
    found = {one["container"]["image"] for one in package["deploymentSpec"]["executors"].values() if "container" in one}
    assert found == {f"registry.example/team/mixtune-{step}:7" for step in STEPS}


def _split_requirements(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "docker"))
    return importlib.import_module("split_requirements")


def test_the_files_of_requirements_are_the_whole_one_split(monkeypatch: pytest.MonkeyPatch) -> None:
    tool = _split_requirements(monkeypatch)
    _pins, split = tool._pins, tool.split
    for name, pins in split().items():
        lines = (ROOT / "docker" / name).read_text().splitlines()
        assert lines[1:] == pins, f"run docker/split_requirements.py; {name} differs"
    parts = [_pins(ROOT / "docker" / name) for name in split()]
    together = {name: version.removesuffix("+cpu") for part in parts for name, version in part.items()}
    assert len(together) == sum(map(len, parts))
    whole = _pins(ROOT / "requirements.txt")
    assert whole.items() <= together.items()
    # What only s3:// needs stands among the requirements of the tests.
    assert together.keys() - whole.keys() <= _pins(ROOT / "requirements-dev.txt").keys()


def test_every_pinned_package_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    tool = _split_requirements(monkeypatch)
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()[1:]
    assert lines == tool.with_reasons(), "run docker/split_requirements.py"
    assert not [line for line in lines if line.endswith("# ")], "nothing needs these packages"


@pytest.mark.slow
def test_the_cuda_build_gets_all_that_torch_requires(monkeypatch: pytest.MonkeyPatch) -> None:
    """Extras included: the libraries of `cuda-toolkit[cublas,...]` come by those alone, and the images' pip follows none."""
    tool = _split_requirements(monkeypatch)
    files = ("requirements-light.txt", "requirements-torch.txt", "requirements-cuda.txt")
    lines = (ROOT / "docker" / files[-1]).read_text().splitlines()
    assert lines[1:] == tool.cuda(files), "run docker/split_requirements.py"
    names = {line.partition("==")[0] for line in lines[1:]}
    assert {"nvidia-cublas", "nvidia-cuda-runtime", "nvidia-cudnn-cu13", "triton"} <= names
    assert not any("://" in line for line in lines)


def test_hadolint_has_nothing_to_say() -> None:
    tool = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([str(tool), str(ROOT / "docker" / "Dockerfile")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_every_step_has_a_target_in_both_files() -> None:
    dockerfile = (ROOT / "docker" / "Dockerfile").read_text()
    bake = (ROOT / "docker" / "bake.hcl").read_text()
    for step in STEPS:
        assert f" AS {step}\n" in dockerfile
        assert f'"{step}"' in bake


def test_a_missing_engine_is_one_plain_sentence(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mixtune.pipelines.cli", "run", "--runner", "docker", "--output", str(tmp_path / "out")],
        env={**os.environ, "DOCKER_HOST": f"unix://{tmp_path}/none.sock"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 4
    assert "no Docker engine answers at unix://" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_options_of_containers_are_checked() -> None:
    with pytest.raises(RefusedError, match="--memory"):
        Containers(memory="plenty")
    assert Containers(memory="512m").memory == "512m"


def test_containers_see_the_local_paths_that_the_configuration_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.jsonl").write_text("{}")
    (tmp_path / "labels").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "tasks").mkdir()
    config = load(
        {
            "model": {"base": "model"},
            "evaluate": {"lm_eval": {"tasks": ["mine"], "tasks_folder": "tasks"}},
            "data": {
                "pretrain": {"source": "text.jsonl", "test_source": "hub:owner/name"},
                "finetune": {"source": "labels/*/part-?.csv", "dev_source": "s3://bucket/dev.csv"},
            },
        }
    )
    assert _read(config) == [str(tmp_path / name) for name in ("labels", "model", "tasks", "text.jsonl")]


def test_containers_get_the_variables_that_mean_something_in_them() -> None:
    outside = {
        "MIXTUNE_LOG_DIR": "/out/logs", "MLFLOW_TRACKING_URI": "sqlite:////out/m.db", "HF_TOKEN": "t", "HF_HOME": "/root/hf",
        "AWS_CA_BUNDLE": "/etc/ca", "PATH": "/bin", "HOME": "/root", "MIXTUNE_IMAGE": "x", "HTTPS_PROXY": "http://p",
    }  # fmt: skip
    assert set(_environment(outside)) == {"MIXTUNE_LOG_DIR", "MLFLOW_TRACKING_URI", "HF_TOKEN", "HTTPS_PROXY"}


def test_the_list_of_images_is_what_the_build_writes(tmp_path: Path) -> None:
    images().save(tmp_path / "images.json")
    assert json.loads((tmp_path / "images.json").read_text()) == json.loads(
        (ROOT / "pipelines" / "images.json").read_text()
    )
