"""`register` against a real MLflow store: one version for one model, whatever is registered it answers as measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from mixtune.components.register.config import RegisterStep
from mixtune.components.register.step import run
from mixtune.components.shared.artifacts import Artifact, write_json
from mixtune.components.shared.context import Context
from mixtune.components.shared.tracking import Tracker, connect
from tests.components.stages import Stages


@pytest.fixture
def stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stages:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    stages = Stages(tmp_path)
    stages.pretrain()
    stages.finetune()
    return stages


def register(stages: Stages, kind: str, run_id: str) -> Context:
    row = {
        "id": kind,
        "kind": kind,
        "params": {"alpha": 0.5},
        "delta_bpb": {"value": 0.1},
        "task_score": {"value": 0.9},
    }
    report = {"selected": kind, "candidates": [row], "task": {"kind": "classification", "metric": "accuracy"}}
    write_json(stages.folder / "comparison" / "report.json", report)
    for name in ("report.html", "report.md"):
        (stages.folder / "comparison" / name).write_text("a report")
    context = Context("register", Tracker.open("register", "register", run_id), run_id, quiet=True)
    run(
        RegisterStep(registered_model="tiny", alias="candidate"), context=context,
        selected=stages.artifact("pretrained" if kind == "interpolated" else "finetuned"),
        other=Artifact(str(stages.folder / ("finetuned" if kind == "interpolated" else "comparison"))),
        comparison=stages.artifact("comparison"), model=stages.artifact("registered"),
    )  # fmt: skip
    return context


@pytest.mark.slow
def test_the_same_model_twice_is_one_version_and_another_is_another(stages: Stages, tmp_path: Path) -> None:
    client = connect(f"sqlite:///{tmp_path / 'mlflow.db'}")
    for run_id in ("run-1", "run-2"):
        assert register(stages, "finetuned", run_id).facts["registered"] == "tiny version 1, alias candidate"
    context = register(stages, "interpolated", "run-3")
    assert context.facts["registered"] == "tiny version 2, alias candidate"
    assert (stages.folder / "registered" / "model.safetensors").is_file()
    assert client.get_model_version_by_alias("tiny", "candidate").tags["mixtune.kind"] == "interpolated"
    assert client.get_model_version("tiny", "1").tags["mixtune.kfp_run"] == "run-2"
