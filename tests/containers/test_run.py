"""The steps in their images: one alone, and the whole DAG by `mixtune run --runner docker`."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mixtune.components.config import Fingerprints, load, parts
from mixtune.pipelines.images import images
from tests.pipelines.project import Project

from .conftest import Built, outcomes, with_harness

pytestmark = pytest.mark.slow

TIMES = {
    "seconds",
    "evaluate_seconds",
    "evaluate_share",
    "training_share",
    "utilisation",
    "tokens_per_second",
    "peak_memory_bytes",
}
RUNS = {"mlflow_run", "mlflow_runs"}


def test_the_dag_in_containers_gives_what_it_gives_in_processes(ran: tuple[Project, str], tmp_path: Path) -> None:
    inside, printed = ran
    assert "gate passed" in printed
    outside = with_harness(Project(tmp_path), own_cache=True)
    status, _, told = outside.run()
    assert status == 0, told
    # To the last digit, times and run ids apart.
    assert _numbers(inside.report()) == _numbers(outside.report())
    assert inside.report()["lm_eval"]["columns"][0]["examples"] == 20
    weights = sorted(path.relative_to(inside.output) for path in inside.output.glob("models/*/model.safetensors"))
    assert len(weights) >= 4
    for path in weights:
        assert (inside.output / path).read_bytes() == (outside.output / path).read_bytes(), path


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _numbers(one) for key, one in value.items() if key not in TIMES | RUNS}
    return [_numbers(one) for one in value] if isinstance(value, list) else value


def test_the_registered_version_names_the_image(ran: tuple[Project, str], built: Built) -> None:
    version = ran[0].client().search_model_versions("name = 'tiny'")[0]
    identity = built.inspect(images().of("register"))["Id"]
    assert version.tags["mixtune.image"] == f"{images().of('register')}@{identity}"


def test_what_the_containers_made_is_not_roots_and_nothing_is_left_running(
    ran: tuple[Project, str], built: Built
) -> None:
    made = list(ran[0].output.glob("logs/*/pretrain.log"))
    assert [path.stat().st_uid for path in made] == [1001]
    assert built.docker("ps", "--all", "--quiet").stdout == ""


def test_a_second_run_takes_what_it_can_from_the_cache(ran: tuple[Project, str], built: Built) -> None:
    project = ran[0]
    with built.start(project) as process:
        printed = process.communicate(timeout=600)[0]
    assert process.returncode == 0, printed
    assert "nothing has changed since run" in printed
    with built.start(project, "--set", "gate.resamples=201") as process:  # which no cached step reads
        printed = process.communicate(timeout=600)[0]
    assert process.returncode == 0, printed
    assert {"plan", "compare", "register", "finish"} == set(outcomes(project.output))


def test_too_little_memory_is_said_with_the_limit(built: Built, tmp_path: Path) -> None:
    project = Project(tmp_path)
    with built.start(project, "--memory", "100m") as process:
        printed = process.communicate(timeout=300)[0]
    assert process.returncode == 1, printed
    plain = " ".join(printed.split())
    assert (
        "plan: its container was killed because it exceeded its memory limit of 100m (--memory); raise the limit"
        in plain
    )
    assert "Traceback" not in printed


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_containers_and_the_step_leaves_its_record(
    ran: tuple[Project, str], built: Built, number: signal.Signals
) -> None:
    project = ran[0]
    longer = {**project.config, "pretrain": {**project.config["pretrain"], "steps": 100_000 + number}}
    before = _last_run(project.output)
    with built.start(project, config=longer) as process:
        _until(lambda: _last_run(project.output) != before and '"steps"' in _progress(project.output), 240)
        process.send_signal(number)
        printed = process.communicate(timeout=60)[0]
    _until(lambda: built.docker("ps", "--all", "--quiet").stdout == "", 30)
    assert outcomes(project.output)["pretrain"].kind == "terminated", printed
    assert process.returncode == 128 + number


def _last_run(output: Path) -> str:
    return str(json.loads((output / ".mixtune" / "last_run.json").read_text())["id"])


def _progress(output: Path) -> str:
    return (output / ".mixtune" / "progress" / f"{_last_run(output)}.jsonl").read_text()


def _until(true: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.3)


def test_one_step_runs_as_any_user_of_group_0_without_network_or_rights(built: Built, tmp_path: Path) -> None:
    """As OpenShift runs it: a uid that no image knows, root's group, nothing writable but what is mounted."""
    project = Project(tmp_path)
    (tmp_path / "home").mkdir()
    (tmp_path / "out").mkdir()
    for folder in ("home", "out"):
        (tmp_path / folder).chmod(0o770)
    config = load(
        project.config | {"data": json.loads(json.dumps(project.config["data"]).replace("text.", "/in/text."))}
    )
    part = parts(config, Fingerprints("a", "b", "c")).prepare_pretrain
    done = _prepare(built, tmp_path, part if isinstance(part, str) else part.model_dump_json())
    assert done.returncode == 0, done.stderr
    manifest = tmp_path / "out" / "train" / "manifest.json"
    assert (manifest.stat().st_uid, manifest.stat().st_gid) == (1234567, 0)


def _prepare(built: Built, folder: Path, part: str) -> subprocess.CompletedProcess[str]:
    outputs = [f"--artifact={name}=/out/{name}" for name in ("train", "heldout", "tokenizer", "report")]
    return built.docker(
        "run", "--rm", "--user=1234567:0", "--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges",
        "--network=none", "--memory=1g", "--tmpfs=/tmp", f"--volume={folder}/home:/home/mixtune",
        f"--volume={folder}/out:/out", f"--volume={folder}/text.jsonl:/in/text.jsonl:ro",
        images().of("prepare"), f"--config={part}", *outputs, check=False,
    )  # fmt: skip


def test_docker_stop_reaches_python(ran: tuple[Project, str], built: Built, tmp_path: Path) -> None:
    """Of a step that a person starts by the image's own entry, without a shell between."""
    project = ran[0]
    config = load({**project.config, "pretrain": {**project.config["pretrain"], "steps": 1_000_000}})
    part = parts(config, Fingerprints("a", "b", "c")).pretrain
    made = {one.parent.name: one for one in project.output.glob(".mixtune/artifacts/*/prepare/train/manifest.json")}
    data = made["train"].parent
    name = built.docker(
        "run", "--detach", "--user=1001:0", "--read-only", "--cap-drop=ALL", "--network=none", "--tmpfs=/tmp",
        "--tmpfs=/home/mixtune:mode=1777", "--tmpfs=/out:mode=1777", f"--volume={project.output}:{project.output}:ro",
        images().of("pretrain"), f"--config={part if isinstance(part, str) else part.model_dump_json()}",
        f"--artifact=data={data}", f"--artifact=tokenizer={data.parent / 'tokenizer'}",
        "--artifact=model=/out/model", "--artifact=metrics=/out/metrics",
    ).stdout.strip()  # fmt: skip
    try:
        _until(lambda: re.search(r"steps, .*[\d,]+ tokens/s", built.docker("logs", name).stdout) is not None, 180)
        began = time.monotonic()
        built.docker("stop", "--time=30", name)
        took = time.monotonic() - began
        state = json.loads(built.docker("container", "inspect", name).stdout)[0]["State"]
        logs = built.docker("logs", name)
        assert state["ExitCode"] == 143, logs.stdout + logs.stderr
        assert took < 25
        assert "ended by SIGTERM" in logs.stderr
    finally:
        built.docker("rm", "--force", name)
