"""A tracking server whose database does not take λ: a real MLflow server behind a proxy that answers 500 to such text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mixtune.components.shared.tracking.connection import connect
from mixtune.components.shared.tracking.tracker import Tracker
from tests.mlflow_server import MlflowServer, RejectingProxy, rejecting_proxy


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    server = MlflowServer(tmp_path_factory.mktemp("server"))
    server.start()
    with rejecting_proxy(server.uri, words=("unspeakable",)) as uri:
        yield uri
    server.kill()


@pytest.fixture
def store(proxy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy)
    monkeypatch.setenv("MIXTUNE_JOURNAL_DIR", str(tmp_path / "undelivered"))
    # The server answers, so there is nothing to wait for.
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    return proxy


def test_text_arrives_in_ascii_or_not_at_all_and_holds_nothing_up(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MIXTUNE_RUN_NAME", "Büchse run-1")
    tracker = Tracker.open("compare", "compare", "run-1")
    tags = {"mixtune.gate": "passed", "mixtune.headline": "λ = 0.3 forgets least", "mixtune.note": "unspeakable"}
    tracker.set_tags(tags, parent=True)
    tracker.log_params({"labels": "好 and 坏", "plain": 1})
    tracker.log_input("text 中", "d" * 64, "prepare", "training")
    tracker.log_metrics({"loss": 1.5}, 1)
    tracker.close_parent("FINISHED", "gate passed: λ = 0.3")
    tracker.close("FINISHED", {"kind": "done", "sentence": "α"})

    assert tracker.run_id is not None
    assert tracker.parent_id is not None
    client = connect(store)
    run, parent = client.get_run(tracker.run_id), client.get_run(tracker.parent_id)
    assert parent.info.run_name == "Buchse run-1"
    assert parent.data.tags["mixtune.headline"] == "lambda = 0.3 forgets least"
    assert parent.data.tags["mixtune.gate"] == "passed"
    assert parent.data.tags["mixtune.verdict"] == "gate passed: lambda = 0.3"
    assert "mixtune.note" not in parent.data.tags
    assert run.data.params == {"labels": "\\u597d and \\u574f", "plain": "1"}
    assert run.inputs.dataset_inputs[0].dataset.name == "text \\u4e2d"
    assert run.data.metrics == {"loss": 1.5}
    assert (run.info.status, parent.info.status) == ("FINISHED", "FINISHED")
    said = capsys.readouterr().out
    assert "MLflow does not take the tag mixtune.note" in said
    assert "not delivered" not in said


def test_a_server_that_fails_at_everything_rejects_no_text(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a server cannot take because it is broken is kept, not left out."""
    tracker = Tracker.open("plan", "plan", "run-2")
    tracker.set_tags({"a": "there"})
    for name in ("do_GET", "do_POST"):
        monkeypatch.setattr(RejectingProxy, name, lambda self: self.reply(500, b"{}"))
    tracker.set_tags({"b": "λ"})
    tracker.close("FINISHED")
    said = capsys.readouterr().out
    assert "left out" not in said
    assert "not delivered to MLflow" in said
