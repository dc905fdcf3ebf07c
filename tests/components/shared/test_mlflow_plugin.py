"""KFP's own MLflow plugin: its runs are used where it injects them, as it was recorded on a cluster.

The plugin makes a run for the pipeline run, and nested runs for every task and every node of the DAG.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from mixtune.components.finish.config import FinishStep
from mixtune.components.finish.step import run as finish
from mixtune.components.shared.errors import RefusedError
from mixtune.components.shared.running.context import TRACKING_KEYS, Context, from_secret, take_tracking_secret
from mixtune.components.shared.tracking.connection import connect
from mixtune.components.shared.tracking.mlflow_runs import PARENT
from mixtune.components.shared.tracking.mlflow_store import store_at
from mixtune.components.shared.tracking.tracker import Tracker
from mixtune.pipelines.cluster.records import read_record
from tests.stores import new_store


class Plugin:
    """What the plugin makes of a run with one candidate, in an experiment of its own."""

    def __init__(self, uri: str, patch: pytest.MonkeyPatch) -> None:
        self.uri, self._patch = uri, patch
        self.client = connect(uri)
        self.experiment = self.client.create_experiment("kfp")
        self.root = self.make("mixtune 20261126", None)
        self.handler = self.make("exit-handler-1", self.root)
        self.loop = self.make("for-loop-2", self.handler)

    def make(self, name: str, parent: str | None) -> str:
        tags = {PARENT: parent} if parent else {}
        return str(self.client.create_run(self.experiment, run_name=name, tags=tags).info.run_id)

    def task(self, name: str, parent: str) -> str:
        """Makes the run of a task and injects it, as the driver does before the pod starts."""
        run_id = self.make(name, parent)
        self.inject(run_id)
        return run_id

    def inject(self, run_id: str) -> None:
        values = {"MLFLOW_TRACKING_URI": self.uri, "MLFLOW_RUN_ID": run_id, "MLFLOW_EXPERIMENT_ID": self.experiment}
        for name, value in {**values, "MIXTUNE_RUN_ID": "run-1"}.items():
            self._patch.setenv(name, value)
        # The secret of mixtune names another server. It is passed over.
        self._patch.setenv(from_secret("MLFLOW_TRACKING_URI"), "http://127.0.0.1:9")
        take_tracking_secret()

    def run(self, run_id: str) -> Any:
        return self.client.get_run(run_id)


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plugin:
    return Plugin(new_store(tmp_path / "mlflow.db"), monkeypatch)


def test_one_tree_with_the_candidates_named_and_nothing_left_open(plugin: Plugin) -> None:
    mixed = plugin.task("mixed", plugin.loop)
    tracker = Tracker.open("mixed", "mixed-0.3", "run-1")
    assert (tracker.run_id, tracker.parent_id) == (mixed, plugin.root)
    tracker.log_metrics({"loss": 2.0}, 1)
    tracker.close("FINISHED", {"kind": "done"})
    compare = plugin.task("compare", plugin.handler)
    tracker = Tracker.open("compare", "compare", "run-1")
    tracker.set_tags({"mixtune.gate": "passed", "mixtune.selected": "mixed-0.3"}, parent=True)
    left_open = tracker.run_id
    plugin.task("finish", plugin.root)
    tracker = Tracker.open("finish", "finish", "run-1")
    finish(FinishStep(), context=Context("finish", tracker, "run-1", quiet=True), state="COMPLETE", error="")
    tracker.close("FINISHED", {"kind": "done"})

    assert plugin.run(mixed).info.run_name == "mixed-0.3"
    assert plugin.run(mixed).data.metrics == {"loss": 2.0}
    assert plugin.run(mixed).data.tags[PARENT] == plugin.loop, "the plugin's tree stays as it is"
    assert left_open == compare
    assert plugin.run(compare).info.status == "FINISHED"
    root = plugin.run(plugin.root)
    assert root.info.run_name == "mixtune 20261126"
    assert (root.info.status, root.data.tags["mixtune.verdict"]) == ("FINISHED", "gate passed: mixed-0.3")
    experiments = plugin.client.search_experiments()
    found = plugin.client.search_runs([one.experiment_id for one in experiments])
    assert len(found) == 6, "no run beside the plugin's"
    record = read_record("run-1", with_report=False)
    assert record is not None
    assert (record.run_id, set(record.steps)) == (plugin.root, {"mixed-0.3", "compare", "finish"})


def test_another_try_of_a_pod_goes_on_with_the_same_run(plugin: Plugin) -> None:
    mixed = plugin.task("mixed", plugin.loop)
    Tracker.open("mixed", "mixed-0.3", "run-1").close("FAILED", {"kind": "failed", "sentence": "killed"})
    tracker = Tracker.open("mixed", "mixed-0.3", "run-1")
    assert tracker.run_id == mixed
    assert plugin.run(mixed).info.status == "RUNNING"
    tracker.close("FAILED", {"kind": "refused", "sentence": "no labels"})
    with pytest.raises(RefusedError, match="no labels"):
        Tracker.open("mixed", "mixed-0.3", "run-1")


def test_while_mlflow_is_away_what_is_logged_waits_for_the_injected_run(
    plugin: Plugin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mixed = plugin.task("mixed", plugin.loop)
    monkeypatch.setenv("MIXTUNE_TRACKING_OFFLINE", "1")
    monkeypatch.setenv("MIXTUNE_JOURNAL_DIR", str(tmp_path / "undelivered"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    tracker = Tracker.open("mixed", "mixed-0.3", "run-1")
    tracker.log_metrics({"loss": 2.0}, 1)
    tracker.close("FINISHED", {"kind": "done"})
    assert "going on without it" in capsys.readouterr().out
    # The journal is for the address that did not answer; the server that answers is there under another one.
    for journal in (tmp_path / "undelivered").glob("*.jsonl"):
        journal.write_text(journal.read_text().replace("http://127.0.0.1:9", plugin.uri))
    store_at(plugin.uri, "kfp").deliver_leftovers(tmp_path / "undelivered")
    run = plugin.run(mixed)
    assert (run.info.run_name, run.info.status, run.data.metrics) == ("mixed-0.3", "FINISHED", {"loss": 2.0})
    assert plugin.run(plugin.root).data.tags["mixtune.run_id"] == "run-1"


def test_the_secret_counts_where_nobody_else_names_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in TRACKING_KEYS:
        monkeypatch.delenv(key, raising=False)
        monkeypatch.setenv(from_secret(key), f"of the secret: {key}")
    take_tracking_secret()
    assert {key: os.environ.pop(key) for key in TRACKING_KEYS} == {
        key: f"of the secret: {key}" for key in TRACKING_KEYS
    }
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://of-the-plugin")
    take_tracking_secret()
    assert os.environ["MLFLOW_TRACKING_URI"] == "http://of-the-plugin"
    assert "MLFLOW_TRACKING_PASSWORD" not in os.environ, "credentials belong to the server that they came with"
