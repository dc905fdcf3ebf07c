"""How a step ends: its outcome record, its exit status, its own log; no traceback for a user's mistake."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mixtune.components.finetune.config import Finetune, FinetuneStep
from mixtune.components.shared import runtime
from mixtune.components.shared.artifacts import Artifact
from mixtune.components.shared.outcome import Outcome, load_outcomes
from mixtune.components.shared.runtime import OUTPUTS, _given, launch
from mixtune.components.shared.task_name import STEPS
from mixtune.components.shared.tracking.connection import connect
from tests.conftest import small_disk
from tests.stores import new_store

from .tiny import write_data

CONFIG = FinetuneStep(seed=0, max_length=32, finetune=Finetune(steps=2)).to_json()


@pytest.fixture
def outcomes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MIXTUNE_OUTCOME_DIR", str(tmp_path / "outcomes"))
    monkeypatch.setenv("MIXTUNE_LOG_DIR", str(tmp_path / "logs"))
    return tmp_path / "outcomes"


def finetune(tmp_path: Path, config: str = CONFIG, **artifacts: Path) -> Any:
    names = {"start": tmp_path / "start", "data": tmp_path / "data", "model": tmp_path / "model"} | artifacts
    given = {name: Artifact(str(path)) for name, path in names.items()}
    return launch("finetune", config, {**given, "metrics": Artifact(str(tmp_path / "metrics"))})


def test_a_users_mistake_ends_in_a_sentence_and_status_2(tmp_path: Path, outcomes: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        finetune(tmp_path)
    assert ended.value.code == 2
    (outcome,) = load_outcomes(outcomes)
    assert outcome.kind == "refused"
    assert "has no manifest.json" in outcome.sentences[0]
    log = Path(outcome.log or "").read_text()
    assert outcome.sentences[0] in log
    assert "Traceback" not in log


@pytest.mark.parametrize("in_pod", [True, False])
def test_in_a_pod_the_sentence_is_the_termination_message(
    in_pod: bool, tmp_path: Path, outcomes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = tmp_path / "termination-log"
    message.touch()
    monkeypatch.setattr(runtime, "TERMINATION_LOG", message)
    if in_pod:
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    else:
        monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(SystemExit):
        finetune(tmp_path)
    (outcome,) = load_outcomes(outcomes)
    assert message.read_text() == (outcome.sentences[0] if in_pod else "")


def test_a_termination_message_is_as_long_as_kubernetes_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message = tmp_path / "termination-log"
    message.touch()
    monkeypatch.setattr(runtime, "TERMINATION_LOG", message)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    runtime._tell_kubernetes(Outcome(title="plan", kind="refused", sentences=["a" + "λ" * 4000]))
    assert message.stat().st_size == 4095  # and no half a letter
    monkeypatch.setattr(runtime, "TERMINATION_LOG", tmp_path / "none")
    runtime._tell_kubernetes(Outcome(title="plan", kind="refused", sentences=["lost"]))
    assert not (tmp_path / "none").exists()


def test_every_wrong_field_of_a_steps_configuration_is_named(tmp_path: Path, outcomes: Path) -> None:
    with pytest.raises(SystemExit):
        finetune(tmp_path, config='{"seed": "x", "finetune": {"stepz": 1}}')
    (outcome,) = load_outcomes(outcomes)
    assert len(outcome.sentences) == 3


def test_an_unforeseen_error_keeps_its_traceback_in_the_log_alone(tmp_path: Path, outcomes: Path) -> None:
    write_data(tmp_path / "data", "finetune", "generation")
    (tmp_path / "start").mkdir()
    (tmp_path / "start" / "mixtune.json").write_text('{"id": "pretrained", "kind": "pretrained"}')
    with pytest.raises(SystemExit) as ended:
        finetune(tmp_path)
    assert ended.value.code in (1, 2)
    (outcome,) = load_outcomes(outcomes)
    assert outcome.sentences
    assert "\n" not in outcome.sentences[0]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_takes_nothing_is_said_in_a_sentence(
    tmp_path: Path, outcomes: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    import mixtune.components.finetune.step as step

    def full(*arguments: object, **others: object) -> None:
        raise OSError(number, os.strerror(number), str(tmp_path / "model"))

    monkeypatch.setattr(step, "run", full)
    with pytest.raises(SystemExit) as ended:
        finetune(tmp_path)
    assert ended.value.code == 1
    (outcome,) = load_outcomes(outcomes)
    assert outcome.sentences[0].startswith(
        f"{tmp_path / 'model'}: cannot be written ({os.strerror(number).lower()}); free space"
    )
    assert "Traceback" not in Path(outcome.log or "").read_text()


def test_on_a_full_disk_what_is_half_written_makes_room_for_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mixtune.components.finetune.step as step

    def fill(*arguments: object, model: Artifact, **others: object) -> None:
        Path(model.path).mkdir(parents=True)
        with (Path(model.path) / "model.safetensors").open("wb") as file:
            while True:
                file.write(bytes(4096))
                file.flush()

    monkeypatch.setattr(step, "run", fill)
    with small_disk(tmp_path, "2m"):
        monkeypatch.setenv("MIXTUNE_OUTCOME_DIR", str(tmp_path / "outcomes"))
        with pytest.raises(SystemExit) as ended:
            finetune(tmp_path)
        assert ended.value.code == 1
        (outcome,) = load_outcomes(tmp_path / "outcomes")
        assert "cannot be written (no space left on device)" in outcome.sentences[0]
        assert not list(tmp_path.rglob("*.part"))


def test_sigterm_ends_a_step_with_143_and_a_record(tmp_path: Path) -> None:
    script = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parents[3])!r})
from mixtune.components.shared import runtime
from mixtune.components.shared.artifacts import Artifact
import mixtune.components.finetune.step as step
def slow(*args, **kwargs):
    print("started", flush=True)
    import time
    time.sleep(60)
step.run = slow
runtime.launch("finetune", {CONFIG!r}, {{"metrics": Artifact("m")}})
"""
    environment = {**os.environ, "MIXTUNE_OUTCOME_DIR": str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143
    (outcome,) = load_outcomes(tmp_path)
    assert outcome.kind == "terminated"


def test_sigterm_that_gets_lost_in_an_import_comes_again(tmp_path: Path) -> None:
    (tmp_path / "swallows.py").write_text(
        "import time\nprint('started', flush=True)\ntry:\n    time.sleep(60)\nexcept BaseException:\n    pass\n"
    )
    script = f"""
import sys
sys.path[:0] = [{str(Path(__file__).parents[3])!r}, {str(tmp_path)!r}]
from mixtune.components.shared import runtime
from mixtune.components.shared.artifacts import Artifact
import mixtune.components.finetune.step as step
def slow(*args, **kwargs):
    import swallows, time
    time.sleep(60)
step.run = slow
runtime.AGAIN_SECONDS = 1.0
runtime.launch("finetune", {CONFIG!r}, {{"metrics": Artifact("m")}})
"""
    environment = {**os.environ, "MIXTUNE_OUTCOME_DIR": str(tmp_path / "outcomes")}
    process = subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    (outcome,) = load_outcomes(tmp_path / "outcomes")
    assert outcome.kind == "terminated"


OUTPUT = re.compile(r"(\w+): dsl\.Output\[")


@pytest.mark.parametrize("step", STEPS)
def test_all_outputs_of_a_step_are_written_aside(step: str) -> None:
    component = Path(__file__).parents[3] / "components" / step / "component.py"
    in_code = {"comparison_report": "report", "data_report": "report"}
    found = [in_code.get(name, name) for name in OUTPUT.findall(component.read_text())]
    assert sorted(found) == sorted(OUTPUTS.get(step, ()))


def test_a_step_that_fails_leaves_nothing_and_takes_nothing_away(
    tmp_path: Path, outcomes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mixtune.components.finetune.step as step

    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "before.txt").write_text("a finished result")

    def fails_half_way(config: object, *, model: Artifact, **others: object) -> None:
        Path(model.path).mkdir()
        (Path(model.path) / "half.txt").write_text("half")
        raise RuntimeError("half-way")

    def works(config: object, *, model: Artifact, metrics: Artifact, **others: object) -> None:
        Path(model.path).mkdir()
        (Path(model.path) / "whole.txt").write_text("whole")
        model.metadata["candidate"] = "finetuned"

    monkeypatch.setattr(step, "run", fails_half_way)
    with pytest.raises(SystemExit):
        finetune(tmp_path)
    assert [file.name for file in (tmp_path / "model").iterdir()] == ["before.txt"]
    assert not (tmp_path / "metrics").exists()

    monkeypatch.setattr(step, "run", works)
    finetune(tmp_path)
    assert [file.name for file in (tmp_path / "model").iterdir()] == ["whole.txt"]
    assert (tmp_path / "metrics").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logs", "metrics", "model", "outcomes"]


def test_what_was_refused_is_refused_at_once_in_the_same_run_and_not_in_the_next(
    tmp_path: Path, outcomes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIXTUNE_RUN_ID", "run-1")
    with pytest.raises(SystemExit):
        finetune(tmp_path)
    (first,) = load_outcomes(outcomes)
    # What was missing is there now; a retry in the same pipeline run has the same inputs, so it is not even looked at.
    write_data(tmp_path / "data", "finetune", "generation")
    with pytest.raises(SystemExit) as ended:
        finetune(tmp_path)
    assert ended.value.code == 2
    (again,) = load_outcomes(outcomes)
    assert (again.kind, again.sentences) == ("refused", first.sentences)
    monkeypatch.setenv("MIXTUNE_RUN_ID", "run-2")
    monkeypatch.setenv("MIXTUNE_OUTCOME_DIR", str(tmp_path / "outcomes-2"))
    with pytest.raises(SystemExit):
        finetune(tmp_path)
    (next_run,) = load_outcomes(tmp_path / "outcomes-2")
    assert "manifest.json" not in next_run.sentences[0]


def test_a_refusal_on_record_in_mlflow_ends_a_retry_that_sees_no_outcome_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", new_store(tmp_path / "mlflow.db"))
    for run_id, said_before in (("run-1", True), ("run-1", True), ("run-2", False)):
        monkeypatch.setenv("MIXTUNE_RUN_ID", run_id)
        with pytest.raises(SystemExit) as ended:
            finetune(tmp_path)
        assert ended.value.code in (1, 2)
        assert ("has no manifest.json" in capfd.readouterr().err) is said_before
        write_data(tmp_path / "data", "finetune", "generation")
    from mixtune.components.shared.tracking.tracker import Tracker

    assert len(Tracker.open("finish", "finish", "run-1").children()) == 2, "the retry made no run of its own"


@pytest.mark.parametrize("step", STEPS)
def test_every_step_is_one_folder_with_the_same_three_files(step: str) -> None:
    folder = Path(__file__).parents[3] / "components" / step
    assert {"config.py", "step.py", "component.py"} <= {path.name for path in folder.iterdir()}
    assert len((folder / "component.py").read_text().splitlines()) < 40


LIGHT = (
    "mixtune.components.checks",
    "mixtune.pipelines.cli",
    "mixtune.pipelines.pipeline",
    *(f"mixtune.components.{step}.component" for step in STEPS),
    *(f"mixtune.components.{step}.step" for step in ("plan", "prepare", "compare", "register", "finish")),
)


def test_what_needs_no_model_never_imports_torch() -> None:
    code = f"""
import importlib, sys
for name in {LIGHT!r}:
    importlib.import_module(name)
    assert not {{"torch", "mlflow"}} & set(sys.modules), name
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_a_step_was_given_is_on_record_so_that_it_can_run_alone(
    tmp_path: Path, outcomes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", new_store(tmp_path / "mlflow.db"))
    with pytest.raises(SystemExit):
        finetune(tmp_path)
    (outcome,) = load_outcomes(outcomes)
    inputs = {"start": str(tmp_path / "start"), "data": str(tmp_path / "data")}
    assert outcome.given["config"] == CONFIG
    assert json.loads(outcome.given["artifacts"]) == inputs
    assert outcome.mlflow_run is not None
    tags = connect(os.environ["MLFLOW_TRACKING_URI"]).get_run(outcome.mlflow_run).data.tags
    assert {name: tags[f"mixtune.outcome.given.{name}"] for name in outcome.given} == outcome.given


def test_inputs_are_on_record_and_outputs_are_not() -> None:
    lists = [Artifact("/a"), Artifact("/b", uri="s3://b")]
    given = _given(
        "compare", "{}", {"mixed": lists, "pretrained": None, "report": Artifact("/out")}, {"other_uri": "/x"}
    )
    assert given == {"config": "{}", "artifacts": '{"mixed": ["/a", "s3://b"]}'}
    assert _given("mixed", "{}", {}, {"candidate": "c"})["candidate"] == "c"
    assert _given("plan", "{}", {}, {}) == {}
