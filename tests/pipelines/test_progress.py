"""What a wait shows of runs that a real cluster ran, line by line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from mixtune.components.form import parameters
from mixtune.components.shared.task_name import TaskName
from mixtune.components.shared.tracking.connection import connect
from mixtune.components.shared.tracking.tracker import Tracker
from mixtune.pipelines.cluster import slow, tracked, waiting
from mixtune.pipelines.cluster.api import Api, Connection, Patience
from mixtune.pipelines.cluster.waiting import wait_for
from mixtune.pipelines.configuration import read_config
from mixtune.pipelines.ended import Ended
from tests.stores import new_store

from .kfp_server import Fault, KfpServer

COMPILED = Path(__file__).parents[2] / "pipelines" / "compiled" / "mixtune.yaml"
QUICK = Patience(seconds=1.0, first=0.01, longest=0.05, answer=0.5)


@pytest.fixture
def server() -> Iterator[KfpServer]:
    with KfpServer() as running:
        yield running


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("KUBECONFIG", raising=False)
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setattr(waiting, "POLL_SECONDS", 0.01)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An MLflow store; to make one takes seconds."""
    return new_store(tmp_path_factory.mktemp("mlflow") / "mlflow.db")


@pytest.fixture(scope="module")
def values() -> dict[str, Any]:
    """Parameters of the runs that were recorded."""
    return parameters(read_config(None, ["mixed.lambdas=[0.1,0.3]", "mixed.forgetting_budgets=[]"]))


def follow(server: KfpServer, run: str) -> tuple[list[str], Ended]:
    """The lines that are shown, with single spaces, and what came of the run."""
    lines: list[str] = []
    ended = wait_for(Api(Connection(server.url), QUICK), run, None, lines.append)
    return [" ".join(line.split()) for line in lines], ended


CACHED = [
    "plan running",
    "plan done 42 s",
    "prepare pretrain from the cache",
    "prepare finetune from the cache",
    "pretrain from the cache",
    "evaluate pretrained from the cache",
    "finetune from the cache",
    "evaluate finetuned from the cache",
    "evaluate interpolated from the cache",
    "mixed-0.1 from the cache",
    "mixed-0.3 from the cache",
    "evaluate mixed-0.1 from the cache",
    "evaluate mixed-0.3 from the cache",
    "compare running",
    "compare done 79 s",
    "register done 60 s",
    "finish running",
    "finish done 41 s",
]


def test_a_run_from_the_cache(server: KfpServer, values: dict[str, Any]) -> None:
    moments = ("11:25:40", "11:26:30", "11:27:15", "11:28:55", "11:31:20")
    lines, _ = follow(server, server.replay("cached", parameters=values, moments=moments))
    assert lines == CACHED


def test_tasks_that_kfp_leaves_running_are_done_when_the_run_is(server: KfpServer, values: dict[str, Any]) -> None:
    run = server.replay("succeeded", parameters=values, moments=("11:13:16", "11:20:00"))
    lines, _ = follow(server, run)
    assert lines == [
        "plan done 44 s",
        "prepare pretrain done 69 s",
        "prepare finetune done 81 s",
        "pretrain done 216 s",
        "evaluate pretrained running",
        "finetune running",
        "finetune done 111 s",
        "evaluate pretrained done 112 s",
        "mixed-0.1 running",
        "mixed-0.3 running",
        "mixed-0.1 done",
        "mixed-0.3 done",
    ]


def test_without_its_parameters_candidates_are_numbered(server: KfpServer) -> None:
    lines, _ = follow(server, server.replay("cached"))
    assert [line for line in lines if "candidate" in line] == [
        "candidate 1 from the cache",
        "candidate 2 from the cache",
        "evaluate candidate 1 from the cache",
        "evaluate candidate 2 from the cache",
    ]


def test_a_run_that_was_retried(server: KfpServer, values: dict[str, Any]) -> None:
    run = server.replay("retried", parameters=values, moments=("11:44:55", "11:50:30"))
    lines, _ = follow(server, run)
    assert lines[-4:] == ["compare done 77 s", "register running", "finish done 49 s", "register done 137 s"]


def test_bad_data(server: KfpServer, values: dict[str, Any]) -> None:
    lines, ended = follow(server, server.replay("bad-data", parameters=values))
    assert lines == ["plan failed 20 s", "finish done 20 s"]
    assert (ended.outcome, ended.status) == ("failed", 1)


def test_a_run_that_was_stopped(server: KfpServer, values: dict[str, Any]) -> None:
    lines, ended = follow(server, server.replay("stopped", parameters=values))
    assert lines == [
        "plan done 41 s",
        "prepare pretrain from the cache",
        "prepare finetune from the cache",
        "pretrain stopped 87 s",
        "finish done 44 s",
    ]
    assert (ended.outcome, ended.status) == ("interrupted", 130)


def test_a_step_alone_is_named_by_its_description(server: KfpServer) -> None:
    lines, ended = follow(server, server.replay("pending-then-stopped", parameters={"config": "{}"}))
    assert lines == ["evaluate mixed-0.3 stopped 1112 s"]
    assert ended.status == 130


def test_trainings_show_their_last_metrics_and_mlflow_knows_what_kfp_no_longer_says(
    server: KfpServer, values: dict[str, Any], store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a large workflow KFP stops to update the tasks, so that those after the trainings are missing."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    run = server.replay("succeeded", parameters=values, moments=("11:13:50", "11:20:00"))
    for title, step in (("mixed-0.1", 40), ("mixed-0.3", 30)):
        tracker = Tracker.open("mixed", title, run)
        tracker.log_params({"mixed": {"steps": 100, "epochs": None}})
        for number in (10, step):
            losses = {
                "mix_weight": float(title[6:]),
                "loss": 3.0 + number,
                "loss_pretrain": 4.0 + number,
                "loss_finetune": 2.0 + number,
            }
            tracker.log_metrics({**losses, "mix_weight": float(title[6:]), "tokens_per_second": 1203.4}, number)
        tracker.detach()  # it runs on
    client = connect(store)
    ended = Tracker.open("evaluate", "evaluate finetuned", run)
    ended.close("FINISHED", {})
    # It has just ended, so KFP may yet say otherwise; an older one is believed.
    parent = client.get_run(ended.run_id).info.experiment_id
    long_ago = 1_790_000_000_000
    made = client.create_run(
        parent, start_time=long_ago, run_name="evaluate interpolated",
        tags={"mixtune.run_id": run, "mixtune.step": "evaluate"},
    )  # fmt: skip
    client.set_terminated(made.info.run_id, "FINISHED", end_time=long_ago + 75_000)
    lines, _ = follow(server, run)
    assert [line for line in lines if "mixed" in line or line.startswith("evaluate")] == [
        "evaluate pretrained running",
        "mixed-0.1 running",
        "mixed-0.3 running",
        "evaluate interpolated done 75 s",
        "mixed-0.1 step 40/100, λ 0.1, loss 43.000 (pretrain 44.000, finetune 42.000), 1,203 tokens/s",
        "mixed-0.3 step 30/100, λ 0.3, loss 33.000 (pretrain 34.000, finetune 32.000), 1,203 tokens/s",
        "evaluate pretrained done 112 s",
        "mixed-0.1 done",
        "mixed-0.3 done",
    ]


def test_an_mlflow_that_does_not_answer_is_told_once(
    server: KfpServer, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setattr(tracked, "REST_SECONDS", 0.0)
    lines, _ = follow(server, server.replay("cached", parameters=values, moments=("11:26:30",)))
    told = [line for line in lines if "MLflow" in line]
    assert len(told) == 1
    assert told[0].startswith("MLflow at http://127.0.0.1:9 does not answer, so the progress of trainings is not shown")


@pytest.mark.parametrize("kind", ["hang", "status"])
def test_a_call_that_takes_long_is_told_once(
    kind: str, server: KfpServer, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slow, "SLOW_SECONDS", 0.2)
    run = server.replay("cached", parameters=values)
    server.faults.append(Fault(kind, r"/runs/", times=4, status=503))
    lines: list[str] = []
    patience = Patience(seconds=20.0, first=0.3, longest=0.3, answer=0.3)
    wait_for(Api(Connection(server.url), patience, lines.append), run, None, lines.append)
    why = "timeout" if kind == "hang" else "status 503"
    told = [line for line in lines if line.startswith("KFP")]
    assert len(told) == 2
    assert told[0].startswith(f"KFP at {server.url} does not answer")
    assert told[0].endswith("; retrying for 20 s")
    assert "the request to get the run" in told[0]
    assert f" ({why}); " in told[0] or kind == "hang"
    assert told[1] == "KFP answers again"


def test_the_titles_are_those_of_the_tasks_of_the_package() -> None:
    """KFP numbers tasks in the order of calls: a table that is out of step with the DAG would name the wrong ones."""
    package, *_ = yaml.safe_load_all(COMPILED.read_text(encoding="utf-8"))
    titles = {}
    for component in package["components"].values():
        for name, task in component.get("dag", {}).get("tasks", {}).items():
            if found := TaskName.of_package_task(name):
                titles[name] = (found, task["taskInfo"]["name"])
    for title, shown in titles.values():
        assert title.words in (shown, f"{shown} (mixed)")
    assert {"evaluate interpolated", "prepare finetune", "register"} <= {str(title) for title, _ in titles.values()}
