"""`mixtune deploy`: what is served, from where, and only past the gate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from typer.testing import CliRunner

from mixtune.components.shared.tracking.connection import connect
from mixtune.components.shared.tracking.mlflow_runs import parent_run
from mixtune.components.shared.tracking.registered import REGISTERED
from mixtune.pipelines.cli import app
from tests.stores import new_store

from .project import Project

SCHEMA = json.loads((Path(__file__).parents[1] / "k8s" / "schemas" / "inferenceservice.json").read_text())
LINEAGE = {"mixtune.candidate": "mixed-0.3", "mixtune.task_score": "0.9", "mixtune.kfp_run": "run-1"}


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A registry with a classifier and a model that writes, both in an object store; and what others registered."""
    uri = new_store(tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    client = connect(uri)
    for name, tags in {
        "tiny": {"mixtune.task": "classification", **LINEAGE}, "writer": {"mixtune.task": "generation"}, "foreign": {},
        "Large_Name": {"mixtune.task": "classification"},
    }.items():  # fmt: skip
        client.create_registered_model(name)
        client.create_model_version(name, source=f"s3://bucket/models/{name}", tags=tags)
        client.set_registered_model_alias(name, "candidate", "1")
    return client


def deploy(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["deploy", "--dry-run", *arguments])


def manifest(*arguments: str) -> dict[str, Any]:
    done = deploy(*arguments)
    assert done.exit_code == 0, done.output
    made = yaml.safe_load(done.stdout)
    jsonschema.validate(made, SCHEMA)
    return dict(made)


def test_a_task_head_is_served_by_the_mlflow_runtime(store: Any) -> None:
    made = manifest("models:/tiny@candidate", "--namespace", "team", "--service-account", "reader")
    assert made["metadata"] == {
        "name": "tiny", "namespace": "team",
        "labels": {
            "app.kubernetes.io/name": "mixtune", "app.kubernetes.io/part-of": "mixtune",
            "app.kubernetes.io/component": "serving", "mixtune/candidate": "mixed-0.3",
        },
        "annotations": {
            "mixtune/registered-model": "models:/tiny/1", "mixtune/candidate": "mixed-0.3", "mixtune/task_score": "0.9",
            "mixtune/kfp_run": "run-1",
        },
    }  # fmt: skip
    limits = {"cpu": "2", "memory": "8Gi"}
    assert made["spec"]["predictor"] == {
        "serviceAccountName": "reader",
        "model": {
            "modelFormat": {"name": "mlflow"}, "protocolVersion": "v2", "storageUri": "s3://bucket/models/tiny",
            "resources": {"requests": limits, "limits": limits},
        },
    }  # fmt: skip


def test_a_model_that_writes_is_served_by_the_hugging_face_runtime(store: Any, tmp_path: Path) -> None:
    done = deploy("models:/writer/1", "--gpus=1", "--name=answers", "--output", str(tmp_path / "service.yaml"))
    assert done.exit_code == 0, done.output
    made = yaml.safe_load((tmp_path / "service.yaml").read_text())
    jsonschema.validate(made, SCHEMA)
    model = made["spec"]["predictor"]["model"]
    assert model["modelFormat"] == {"name": "huggingface"}
    assert model["args"] == ["--model_name=answers"]
    assert model["storageUri"] == "s3://bucket/models/writer/model", "the folder with config.json"
    assert model["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_a_run_is_what_it_registered_and_past_the_gate_only(store: Any) -> None:
    experiment = store.create_experiment("mixtune")
    passed = parent_run(store, experiment, "run-1", "run-1", {}).info.run_id
    store.set_tag(passed, REGISTERED, "models:/tiny/1")
    missed = parent_run(store, experiment, "run-2", "run-2", {}).info.run_id
    store.set_tag(missed, "mixtune.verdict", "gate not met: it forgets too much")
    assert manifest("run-1")["metadata"]["annotations"]["mixtune/registered-model"] == "models:/tiny/1"
    done = deploy("run-2")
    assert (done.exit_code, done.stderr) == (
        3,
        "mixtune: run-2: registered no model, so there is nothing to deploy: gate not met: it forgets too much\n",
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("models:/foreign/1",), "was not registered by mixtune, so no gate has let it pass"),
        (("models:/tiny/2",), "the registry has no such version"),
        (("models:/none@candidate",), "the registry has no such version"),
        (("no-such-run",), "MLflow has no such run"),
        (("runs/none",), "no such folder"),
        (("models:/Large_Name/1", "--storage-uri=/here"), "--name: must be at most 40 lower-case letters"),
        (("models:/Large_Name/1", "--storage-uri=/here"), "such as s3://bucket/path, found /here; MLflow has its files at"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_refused(store: Any, arguments: tuple[str, ...], words: str) -> None:
    done = deploy(*arguments)
    assert done.exit_code == 2, done.output
    assert words in done.stderr
    assert done.stdout == ""


def test_nothing_is_applied() -> None:
    done = CliRunner().invoke(app, ["deploy", "models:/tiny/1"])
    assert done.exit_code == 2
    assert "applies nothing by itself; give --dry-run" in done.stderr


def test_the_run_in_an_output_folder(finished: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    done = deploy(str(finished.output))
    assert done.exit_code == 2
    assert "--storage-uri: must be an address from which KServe can fetch the model" in done.stderr
    made = manifest(str(finished.output), "--storage-uri", "s3://bucket/tiny")
    assert made["metadata"]["name"] == "tiny"
    assert made["metadata"]["annotations"]["mixtune/registered-model"] == "models:/tiny/1"
