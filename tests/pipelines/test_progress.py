"""What a wait shows of runs that a real cluster ran, line by line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mixtune.components.config import parameters
from mixtune.pipelines import waiting
from mixtune.pipelines.configuration import read_config
from mixtune.pipelines.kfp_api import Api, Connection, Patience
from mixtune.pipelines.records import Ended
from mixtune.pipelines.waiting import wait_for

from .kfp_server import KfpServer

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
