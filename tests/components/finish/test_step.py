"""`finish` and `register` against a real MLflow store."""

from __future__ import annotations

from pathlib import Path

import pytest

from mixtune.components.finish.config import FinishStep
from mixtune.components.finish.step import run
from mixtune.components.shared.checkpoints.store import CheckpointStore
from mixtune.components.shared.outcome import Outcome
from mixtune.components.shared.running.context import Context
from mixtune.components.shared.tracking.connection import connect
from mixtune.components.shared.tracking.tracker import Tracker
from tests.stores import new_store


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    uri = new_store(tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return uri


def finish(state: str) -> tuple[Context, Tracker]:
    tracker = Tracker.open("finish", "finish", "run-1")
    context = Context("finish", tracker, "run-1", quiet=True)
    run(FinishStep(), context=context, state=state, error="Task mixed failed.")
    return context, tracker


def test_a_failure_is_told_in_the_words_of_the_step_that_failed(store: str) -> None:
    Tracker.open("prepare", "prepare finetune", "run-1").close(
        "FAILED", {"kind": "refused", "sentence": "data.finetune: there is no column label"}
    )
    context, tracker = finish("FAILED")
    assert context.facts["verdict"] == "failed: prepare finetune: data.finetune: there is no column label"
    assert tracker.parent_id is not None
    assert connect(store).get_run(tracker.parent_id).info.status == "FAILED"


# A cluster's exit task is told COMPLETE or, now and then, RUNNING of a run that went well; the local runner says SUCCEEDED.
WENT_WELL = ["COMPLETE", "RUNNING", "SUCCEEDED"]


@pytest.mark.parametrize("state", WENT_WELL)
@pytest.mark.parametrize(("gate", "verdict"), [("passed", "gate passed: mixed-0.3"), ("not met", "gate not met: why")])
def test_the_verdict_is_the_gates(store: str, state: str, gate: str, verdict: str) -> None:
    tags = {"mixtune.gate": gate, "mixtune.selected": "mixed-0.3", "mixtune.gate_reasons": "why"}
    compare = Tracker.open("compare", "compare", "run-1")
    compare.set_tags(tags, parent=True)
    compare.close("FINISHED", {"kind": "done"})
    context, tracker = finish(state)
    assert context.facts["verdict"] == verdict
    assert tracker.parent_id is not None
    parent = connect(store).get_run(tracker.parent_id)
    assert (parent.info.status, parent.data.tags["mixtune.verdict"]) == ("FINISHED", verdict)


@pytest.mark.parametrize("state", ["FAILED", "CANCELLED"])
def test_only_a_failure_or_a_stop_in_kfp_counts_against_the_gate(store: str, state: str) -> None:
    tags = {"mixtune.gate": "passed", "mixtune.selected": "mixed-0.3"}
    compare = Tracker.open("compare", "compare", "run-1")
    compare.set_tags(tags, parent=True)
    compare.close("FINISHED", {"kind": "done"})
    context, tracker = finish(state)
    expected = {"FAILED": ("failed: Task mixed failed.", "FAILED"), "CANCELLED": ("stopped", "KILLED")}
    assert tracker.parent_id is not None
    assert (context.facts["verdict"], connect(store).get_run(tracker.parent_id).info.status) == expected[state]


@pytest.mark.parametrize(("state", "left_open"), [("COMPLETE", "FINISHED"), ("FAILED", "KILLED")])
def test_runs_that_the_steps_left_open_are_ended(store: str, state: str, left_open: str) -> None:
    """MLflow can reject the last batch of a task, and a pod that is killed sends none."""
    silent = Tracker.open("mixed", "mixed-0.3", "run-1")
    refused = Tracker.open("prepare", "prepare finetune", "run-1")
    refused.set_tags({"mixtune.outcome.kind": "refused", "mixtune.outcome.sentence": "no labels"})
    context, tracker = finish(state)
    client = connect(store)
    assert silent.run_id is not None
    assert refused.run_id is not None
    assert client.get_run(silent.run_id).info.status == (
        "KILLED" if "failed" in context.facts["verdict"] else left_open
    )
    assert client.get_run(refused.run_id).info.status == "FAILED"
    # Its own run goes on until the step ends.
    assert tracker.run_id is not None
    assert client.get_run(tracker.run_id).info.status == "RUNNING"


def test_a_step_that_was_killed_is_named(store: str) -> None:
    Tracker.open("pretrain", "pretrain", "run-1").close("FINISHED", {"kind": "done"})
    Tracker.open("mixed", "mixed-0.3", "run-1")
    verdict = finish("FAILED")[0].facts["verdict"]
    assert verdict == "failed: mixed-0.3: ended without an outcome record (probably killed)"


@pytest.mark.parametrize("state", ["COMPLETE", "FAILED"])
def test_a_run_that_succeeded_needs_its_checkpoints_no_more(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    monkeypatch.setenv("MIXTUNE_CHECKPOINT_DIR", str(tmp_path / "checkpoints"))
    for run_id in ("run-1", "run-2"):
        monkeypatch.setenv("MIXTUNE_RUN_ID", run_id)
        store_of_run = CheckpointStore(tmp_path / "checkpoints" / f"mixed-{run_id}", "k", print)
        store_of_run.make_folder()
        assert store_of_run.try_claim()
        (store_of_run.folder / "step-00000002-0000").mkdir()
        store_of_run.finish()
    finish(state)
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == (["mixed-run-2"] if state == "COMPLETE" else ["mixed-run-1", "mixed-run-2"])


def test_of_several_attempts_at_a_step_the_last_one_counts(store: str) -> None:
    Tracker.open("pretrain", "pretrain", "run-1")  # killed: another attempt comes, and this one never ends
    Tracker.open("pretrain", "pretrain", "run-1").close("FINISHED")
    Tracker.open("mixed", "mixed-0.3", "run-1").close("FAILED", {"kind": "failed", "sentence": "not finite"})
    assert finish("FAILED")[0].facts["verdict"] == "failed: mixed-0.3: not finite"


def test_without_mlflow_the_verdict_is_what_the_other_steps_left_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MIXTUNE_TRACKING_OFFLINE", "1")
    monkeypatch.setenv("MIXTUNE_JOURNAL_DIR", str(tmp_path / "undelivered"))
    monkeypatch.setenv("MIXTUNE_OUTCOME_DIR", str(tmp_path / "outcomes"))
    assert finish("SUCCEEDED")[0].facts["verdict"] == "no verdict is recorded"
    # What compare could still tell MLflow is known from its record alone, ...
    facts = {"gate": "not met", "selected": "mixed-0.3", "gate_reasons": "forgets too much"}
    Outcome(title="compare", kind="done", facts=facts).save(tmp_path / "outcomes")
    assert finish("SUCCEEDED")[0].facts["verdict"] == "gate not met: forgets too much"
    # ... and what it could not tell is in the journal too.
    tags = {"mixtune.gate": "passed", "mixtune.selected": "mixed-0.6"}
    Tracker.open("compare", "compare", "run-1").set_tags(tags, parent=True)
    assert finish("SUCCEEDED")[0].facts["verdict"] == "gate passed: mixed-0.6"
    Outcome(title="mixed-0.3", kind="failed", sentences=["not finite"]).save(tmp_path / "outcomes")
    assert finish("FAILED")[0].facts["verdict"] == "failed: mixed-0.3: not finite"
