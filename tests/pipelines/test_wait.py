"""Waiting for a run, and the exit status that follows from MLflow's records, which the steps' own tracker writes here."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kfp_server_api as kfp_api
import pytest
from typer.testing import CliRunner, Result

from mixtune.components.finish.config import FinishStep
from mixtune.components.finish.step import run as finish
from mixtune.components.shared.artifacts import write_json
from mixtune.components.shared.errors import RefusedError, UnreachableError
from mixtune.components.shared.running.context import Context
from mixtune.components.shared.tracking.tracker import Tracker
from mixtune.pipelines.cli import app
from mixtune.pipelines.cluster import waiting
from mixtune.pipelines.cluster.api import Api, Connection, Patience
from mixtune.pipelines.cluster.records import read_record
from mixtune.pipelines.cluster.waiting import TimedOutError, seconds_of, wait_for
from tests.stores import new_store

from .kfp_server import Fault, KfpServer, settle

QUICK = Patience(seconds=1.0, first=0.01, longest=0.05, answer=0.5)


@pytest.fixture
def server() -> Iterator[KfpServer]:
    with KfpServer() as running:
        yield running


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(waiting, "POLL_SECONDS", 0.02)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An MLflow store for all tests, since to make one takes seconds; every run has an id of its own."""
    return new_store(tmp_path_factory.mktemp("mlflow") / "mlflow.db")


@pytest.fixture
def mlflow(store: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    return store


def running(server: KfpServer, *script: Any) -> str:
    """A run that goes through these states."""
    run = server.add_run(kfp_api.V2beta1Run(experiment_id="e", display_name="demo"))
    server.store.scripts[run.run_id] = list(script)
    return str(run.run_id)


def on_record(run_id: str, title: str, kind: str = "done", sentence: str = "", **parent: str) -> None:
    """One step on record in MLflow, as the step itself leaves it."""
    tracker = Tracker.open(title.split(" ")[0], title, run_id)
    tracker.set_tags({f"mixtune.{name}": value for name, value in parent.items()}, parent=True)
    tracker.close("FINISHED" if kind == "done" else "FAILED", {"kind": kind, "sentence": sentence})


def report(run_id: str, folder: Path, passed: bool) -> None:
    value = {"value": 0.9, "low": 0.8, "high": 0.95}
    one = {"id": "mixed-0.3", "kind": "mixed", "lambda": 0.3, "task_score": value, "task_score_vs_finetuned": value,
           "delta_bpb": value}  # fmt: skip
    content = {"name": "demo", "selected": "mixed-0.3", "gate": {"passed": passed, "reasons": ["forgetting 0.9"]},
               "task": {"metric": "accuracy"}, "candidates": [one]}  # fmt: skip
    write_json(folder / "report.json", content)
    tracker = Tracker.open("compare", "compare", run_id)
    tracker.log_artifact(folder / "report.json", "report", parent=True)
    verdict = {"mixtune.gate": "passed" if passed else "not met", "mixtune.gate_reasons": "forgetting 0.9"}
    tracker.set_tags({**verdict, "mixtune.selected": "mixed-0.3"}, parent=True)
    tracker.close("FINISHED", {"kind": "done"})


def wait(server: KfpServer, run: str, *options: str) -> Result:
    return CliRunner().invoke(app, ["wait", run, "--host", server.url, *options], prog_name="mixtune")


@pytest.mark.parametrize(("passed", "status"), [(True, 0), (False, 3)])
def test_the_gate_is_the_status_of_a_run_that_succeeded(
    passed: bool, status: int, server: KfpServer, mlflow: str, tmp_path: Path
) -> None:
    run = running(server, "RUNNING", "SUCCEEDED")
    report(run, tmp_path, passed)
    result = wait(server, run, "--json", "--summary", str(tmp_path / "summary.md"))
    printed = json.loads(result.stdout)
    assert result.exit_code == printed["exit_status"] == status, result.output
    assert printed["report"]["selected"] == "mixed-0.3"
    assert printed["verdict"] == ("gate passed: mixed-0.3" if passed else "gate not met: forgetting 0.9")
    assert printed["links"]["run"].endswith(f"/#/runs/details/{run}")
    text = (tmp_path / "summary.md").read_text()
    assert "| mixed-0.3 | 0.3 | 0.900 [0.800, 0.950] |" in text
    assert ("gate passed" if passed else "gate not met: forgetting 0.9") in text


@pytest.mark.parametrize(
    ("kind", "status"), [("failed", 1), ("refused", 2), ("unreachable", 4), ("terminated", 1), ("gate_not_met", 3)]
)
def test_a_failed_run_has_the_status_of_its_step(kind: str, status: int, server: KfpServer, mlflow: str) -> None:
    run = running(server, "FAILED")
    on_record(run, "prepare pretrain")
    on_record(run, "mixed-0.3", kind, "what happened", gate="not met", gate_reasons="why")
    result = wait(server, run)
    assert result.exit_code == status, result.output
    assert ("mixtune: gate not met: why" if status == 3 else "mixtune: mixed-0.3: what happened") in result.stderr


def test_a_step_that_was_killed_is_explained_by_the_platform(server: KfpServer, mlflow: str) -> None:
    run = server.replay("bad-data")
    on_record(run, "plan", "failed")
    server.logs["mixtune-sfcjw-metadata-0-1-system-container-impl-3676484945"] = "Killed by the kernel\n"
    result = wait(server, run)
    assert result.exit_code == 1
    assert result.stderr == "mixtune: plan: Killed by the kernel\n"


def test_of_several_attempts_the_last_one_counts(server: KfpServer, mlflow: str) -> None:
    run = running(server, "SUCCEEDED")
    on_record(run, "pretrain", "failed", "out of memory")
    on_record(run, "pretrain", gate="passed")
    assert wait(server, run).exit_code == 0


def test_after_a_retry_the_verdict_on_record_is_corrected(server: KfpServer, mlflow: str, tmp_path: Path) -> None:
    """KFP does not run `finish` again, since it succeeded at the first attempt."""
    run = running(server, "SUCCEEDED")
    report(run, tmp_path, passed=True)
    on_record(run, "register", "failed", "the server answered 500")
    tracker = Tracker.open("finish", "finish", run)
    finish(FinishStep(), context=Context("finish", tracker, run, quiet=True), state="FAILED", error="")
    tracker.close("FINISHED", {"kind": "done"})
    before = read_record(run, with_report=False)
    assert before is not None
    verdict = "failed: register: the server answered 500"
    assert (before.status, before.tags["mixtune.verdict"]) == ("FAILED", verdict)

    Tracker.open("register", "register", run)  # this attempt never told how it ended, as KFP says it did
    on_record(run, "register")
    result = wait(server, run, "--json")
    assert result.exit_code == 0, result.output
    after = read_record(run, with_report=False)
    assert after is not None
    assert (after.status, after.tags["mixtune.verdict"]) == ("FINISHED", "gate passed: mixed-0.3")


def test_a_run_that_was_stopped_is_closed_on_record(server: KfpServer, mlflow: str) -> None:
    run = running(server, "RUNNING")
    Tracker.open("mixed", "mixed-0.3", run)
    assert CliRunner().invoke(app, ["stop", run, "--host", server.url], prog_name="mixtune").exit_code == 0
    assert wait(server, run).exit_code == 130
    record = read_record(run, with_report=False)
    assert record is not None
    assert (record.status, record.tags["mixtune.verdict"]) == ("KILLED", "stopped")
    assert record.steps["mixed-0.3"].status == "KILLED"


def test_without_mlflow_a_good_end_is_no_verdict(server: KfpServer) -> None:
    result = wait(server, running(server, "SUCCEEDED"))
    assert result.exit_code == 4
    assert "it is not known whether the gate was met: MLFLOW_TRACKING_URI is not set here" in result.stderr


def test_what_kfp_says_of_a_run_that_never_began(server: KfpServer) -> None:
    run = running(server, "FAILED")
    server.store.runs[run].error = kfp_api.GoogleRpcStatus(
        code=3, message="Failed to create a run: no such image\nmore"
    )
    assert wait(server, run).stderr == "mixtune: KFP: Failed to create a run: no such image\n"


def test_one_step_alone_has_no_verdict_and_needs_none(server: KfpServer, mlflow: str) -> None:
    values = kfp_api.V2beta1RuntimeConfig(parameters={"config": "{}", "model_uri": "s3://a"})
    for record, state, status in ((True, "SUCCEEDED", 0), (False, "SUCCEEDED", 0), (True, "FAILED", 2)):
        run = running(server, state)
        server.store.runs[run].runtime_config = values
        if record:
            on_record(run, "evaluate mixed-0.3", "done" if status == 0 else "refused", "no such model")
        assert wait(server, run).exit_code == status
    compared = running(server, "SUCCEEDED")
    server.store.runs[compared].runtime_config = values
    on_record(compared, "compare", gate="not met")
    assert wait(server, compared).exit_code == 3


def test_an_outage_while_waiting_is_sat_out(server: KfpServer, mlflow: str) -> None:
    run = running(server, "RUNNING", "RUNNING", "SUCCEEDED")
    on_record(run, "compare", gate="passed")
    api = Api(Connection(server.url), Patience(seconds=0.1, first=0.01, longest=0.05, answer=0.3))
    kinds = ("status", "half", "cut", "drop")
    # The first look is answered; then come 16 bad answers, for longer than a single call would be tried.
    server.faults += [Fault("none", r"/runs/", times=1), *(Fault(kind, r"/runs/", times=4) for kind in kinds)]
    ended = wait_for(api, run, None, lambda line: None)
    assert ended.status == 0
    assert server.count("GET", "/runs/") > 16


def test_a_time_that_is_up_leaves_the_run_going(server: KfpServer, tmp_path: Path) -> None:
    run = running(server, "RUNNING")
    with pytest.raises(TimedOutError, match=rf"continues; wait for it with `mixtune wait {run} --host .*stop it with"):
        wait_for(Api(Connection(server.url), QUICK), run, 0.2, lambda line: None)
    assert server.store.runs[run].state == "RUNNING"
    result = wait(server, run, "--timeout", "0.1s", "--json", "--summary", str(tmp_path / "summary.md"))
    assert result.exit_code == 6
    printed = json.loads(result.stdout)
    assert (printed["outcome"], printed["exit_status"]) == ("timed_out", 6)
    assert printed["verdict"] == "the run has not ended within --timeout; it continues"
    assert "continues; wait for it with" in result.stderr
    assert (tmp_path / "summary.md").read_text().startswith("## mixtune: timed out\n")
    assert "failed" not in result.output
    assert server.count("POST", "") == 0


def test_stopped_runs(server: KfpServer) -> None:
    run = running(server, "RUNNING")
    result = CliRunner().invoke(app, ["stop", run, "--host", server.url], prog_name="mixtune")
    assert result.exit_code == 0
    assert wait(server, run).exit_code == 130


def test_a_run_that_nobody_knows_is_refused(server: KfpServer) -> None:
    result = wait(server, "nothing")
    assert result.exit_code == 2
    assert "has no such run" in result.stderr


def test_kfp_that_does_not_answer_is_unreachable(server: KfpServer) -> None:
    server.faults.append(Fault("hang", times=10**6))
    with pytest.raises(UnreachableError, match="timeout"):
        wait_for(Api(Connection(server.url), Patience(0.3, 0.01, 0.05, 0.1)), "x", None, lambda line: None)


def test_ctrl_c_leaves_the_run_going_and_says_how_to_go_on(server: KfpServer, tmp_path: Path) -> None:
    run = running(server, "RUNNING")
    command = [
        sys.executable,
        "-m",
        "mixtune.pipelines.cli",
        "wait",
        run,
        "--host",
        server.url,
        "--namespace",
        "team",
    ]
    waiter = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    settle(lambda: server.count("GET", "/runs/"), 60)
    waiter.send_signal(signal.SIGINT)
    _, told = waiter.communicate(timeout=30)
    assert waiter.returncode == 130
    assert f"the run continues; wait for it with `mixtune wait {run} --host {server.url} --namespace team`" in told
    assert f"`mixtune stop {run}" in told
    assert server.count("POST", "") == 0


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("90s", 90), ("30m", 1800), ("6h", 21600), ("1.5d", 129600)])
def test_times(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "-1h", "0s", "6 weeks"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(RefusedError, match="--timeout"):
        seconds_of(text)


def test_a_job_that_is_started_again_finds_its_run_and_its_status(
    server: KfpServer, mlflow: str, tmp_path: Path
) -> None:
    job = ["submit", "--host", server.url, "--run-key", "job-17", "--json", "--wait", "--timeout", "1h"]
    server.script = ["FAILED"]  # type: ignore[misc]
    first = CliRunner().invoke(app, job, prog_name="mixtune")
    assert first.exit_code == 1, first.output
    run = json.loads(first.stdout)["run_id"]
    assert run in first.stderr
    server.store.scripts[run] = ["RUNNING", "SUCCEEDED"]
    report(run, tmp_path, passed=False)
    again = CliRunner().invoke(app, [*job, "--summary", str(tmp_path / "summary.md")], prog_name="mixtune")
    assert again.exit_code == 3, again.output
    assert json.loads(again.stdout)["run_id"] == run
    assert "found by its key, not created again" in again.stderr
    assert len(server.store.runs) == 1
    assert "gate not met" in (tmp_path / "summary.md").read_text()
