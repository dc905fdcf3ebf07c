"""A whole run whose MLflow server is killed in the middle: what the command says, and what `mixtune sync` makes of it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from mixtune.components.shared.tracking.connection import connect
from tests.mlflow_server import MlflowServer

from .project import ALWAYS, Project


@pytest.fixture
def server(tmp_path: Path) -> Iterator[MlflowServer]:
    server = MlflowServer(tmp_path / "server")
    server.start()
    yield server
    server.kill()


@pytest.fixture
def project(copied: Project, server: MlflowServer) -> Project:
    copied.config["tracking"] = {"uri": server.uri, "experiment": "away"}
    return copied


def run_and_kill_the_server_after_plan(project: Project, server: MlflowServer) -> tuple[int, str, str]:
    """Exit status, output and errors of a run whose server dies when its first step has ended."""
    outcomes = project.output / ".mixtune" / "outcomes"
    before = set(outcomes.glob("*/plan.json"))
    (project.folder / "config.yaml").write_text(yaml.safe_dump(project.config), encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, "-m", "mixtune.pipelines.cli", "run", "config.yaml"], cwd=project.folder,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while set(outcomes.glob("*/plan.json")) == before and time.monotonic() < deadline:
        time.sleep(0.02)
    server.kill()
    printed, errors = process.communicate(timeout=400)
    return process.returncode, printed, errors


def runs_of(server: MlflowServer) -> list[Any]:
    client = connect(server.uri)
    experiment = client.get_experiment_by_name("away")
    return list(client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"]))


def test_allowed_to_go_on_a_run_ends_well_and_is_on_record_after_a_sync(project: Project, server: MlflowServer) -> None:
    project.config["tracking"]["offline_when_unreachable"] = True
    project.config["mixed"] |= {"lambdas": [0.6], "steps": 12}
    status, printed, errors = run_and_kill_the_server_after_plan(project, server)
    assert status == 0, printed + errors
    assert "Traceback" not in printed + errors
    assert "nothing was registered: MLflow does not answer; deliver with `mixtune sync`, then run again" in errors
    assert f"not delivered to MLflow at {server.uri}: " in errors
    assert f"deliver it with `mixtune sync {project.output}`" in errors
    assert project.report()["gate"]["passed"]
    assert project.ran() == ALWAYS | {"mixed-0.6", "evaluate mixed-0.6", "register"}

    away = project.mixtune("sync")
    assert away.returncode == 4, away.stdout + away.stderr
    assert "still undelivered" in away.stdout
    server.start()
    for _ in range(2):
        done = project.mixtune("sync")
        assert done.returncode == 0, done.stdout + done.stderr
        runs = runs_of(server)
        nested = {one.info.run_name: one for one in runs if "mlflow.parentRunId" in one.data.tags}
        (parent,) = [one for one in runs if "mlflow.parentRunId" not in one.data.tags]
        assert len(runs) == len(nested) + 1
        assert set(nested) == project.ran()
        assert {one.data.tags["mlflow.parentRunId"] for one in nested.values()} == {parent.info.run_id}
        assert {one.info.status for one in runs} == {"FINISHED"}
        assert parent.data.tags["mixtune.verdict"].startswith("gate passed")
        assert parent.data.params["mixed.lambdas"] == "[0.6]"
        cached = {name.removeprefix("mixtune.cached.") for name in parent.data.tags if "cached." in name}
        assert "pretrain" in cached
        assert not {title.replace(" ", ".") for title in nested} & cached, "what has run was not from the cache"
        client = connect(server.uri)
        assert len(client.get_metric_history(nested["mixed-0.6"].info.run_id, "loss_finetune")) == 2
        assert "report/report.html" in {one.path for one in client.list_artifacts(parent.info.run_id, "report")}
    assert done.stdout == "no records are left to deliver in the runs below runs\n"

    status, _, printed = project.run()
    assert status == 0, printed
    assert "undelivered" not in printed
    assert connect(server.uri).get_model_version_by_alias("tiny", "candidate").version == "1"
    (again,) = [one for one in runs_of(server)[len(runs) :] if "mlflow.parentRunId" not in one.data.tags]
    linked = {name: run for name, run in again.data.tags.items() if name.startswith("mixtune.cached.")}
    assert linked["mixtune.cached.mixed-0.6"] == nested["mixed-0.6"].info.run_id
    assert not [run for run in linked.values() if run.startswith("local-")]


def test_not_allowed_to_go_on_the_next_step_ends_with_status_4_and_the_record_is_closed_by_a_sync(
    project: Project, server: MlflowServer
) -> None:
    status, printed, errors = run_and_kill_the_server_after_plan(project, server)
    assert status == 4, printed + errors
    assert "Traceback" not in printed + errors
    assert f"no MLflow server answers at {server.uri}" in errors
    assert "deliver it with `mixtune sync " in errors
    server.start()
    done = project.mixtune("sync", "runs/tiny")
    assert done.returncode == 0, done.stdout + done.stderr
    runs = runs_of(server)
    (parent,) = [one for one in runs if "mlflow.parentRunId" not in one.data.tags]
    assert parent.info.status == "FAILED"
    assert "no MLflow server answers" in parent.data.tags["mixtune.verdict"]
    assert "RUNNING" not in {one.info.status for one in runs}
