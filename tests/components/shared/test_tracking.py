"""MLflow for real: a SQLite store, nested runs, links to what came from the cache."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from mixtune.components.shared.errors import RefusedError, UnreachableError, without_credentials
from mixtune.components.shared.tracking.connection import connect
from mixtune.components.shared.tracking.mlflow_runs import PARENT
from mixtune.components.shared.tracking.tracker import Tracker
from tests.conftest import small_disk
from tests.stores import new_store


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    uri = f"sqlite:///{tmp_path / 'mlflow' / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return uri


def test_steps_of_one_run_share_a_parent_whoever_comes_first(store: str) -> None:
    first = Tracker.open("finetune", "finetune", "run-1")
    second = Tracker.open("mixed", "mixed-0.3", "run-1")
    other = Tracker.open("mixed", "mixed-0.3", "run-2")
    assert first.parent_id == second.parent_id != other.parent_id
    client = connect(store)
    assert second.run_id is not None
    run = client.get_run(second.run_id)
    assert run.data.tags[PARENT] == first.parent_id
    assert run.info.run_name == "mixed-0.3"
    assert [child.title for child in first.children()] == ["finetune", "mixed-0.3"]


def test_a_store_on_a_full_disk_is_said_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with small_disk(tmp_path, "4m"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", new_store(tmp_path / "mlflow.db"))
        Tracker.open("plan", "plan", "run-1").close("FINISHED")
        with contextlib.suppress(OSError), (tmp_path / "other").open("wb") as file:
            while True:
                file.write(bytes(512))
                file.flush()
        with pytest.raises(
            UnreachableError, match=r"mlflow.db cannot be written \(database or disk is full\); free space"
        ):
            Tracker.open("finetune", "finetune", "run-2")
        assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    "uri",
    [
        "foo://bar",
        "mlruns",
        "file:///mlruns",
        "http//no-colon",
        "postgresql://u:secret@127.0.0.1/x",
        "sqlite:////proc/x/y.db",
    ],
)
def test_an_address_that_mlflow_cannot_use_is_refused(uri: str) -> None:
    with pytest.raises(
        RefusedError, match=r"^MLFLOW_TRACKING_URI: .* cannot be used .*; give the address of an MLflow server"
    ) as refused:
        connect(uri)
    assert "secret" not in str(refused.value)


def test_a_deleted_experiment_is_refused(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "trash")
    client = connect(store)
    client.delete_experiment(client.create_experiment("trash"))
    with pytest.raises(
        RefusedError, match=r"^tracking\.experiment: trash is deleted in MLflow; restore it or choose another name"
    ):
        Tracker.open("plan", "plan", "run-1")


def test_an_injected_run_id_does_not_redirect_a_nested_run(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    tracker = Tracker.open("plan", "plan", "run-1")
    tracker.log_metrics({"x": 1.0}, 1)
    tracker.close("FINISHED")
    assert tracker.run_id is not None
    assert connect(store).get_run(tracker.run_id).data.metrics == {"x": 1.0}


def test_what_is_logged_is_there(store: str, tmp_path: Path) -> None:
    tracker = Tracker.open("pretrain", "pretrain", "run-1")
    tracker.log_params({"a": {"b": 1, "c": [1, 2]}, "long": "x" * 9000})
    for step in range(1200):
        tracker.log_metrics({"loss": 1 / (step + 1), "missing": None, "nan": float("nan")}, step)
    (tmp_path / "note.txt").write_text("hello")
    tracker.log_artifact(tmp_path / "note.txt", "notes")
    tracker.log_input("pretrain stream", "d" * 64, "prepare", "training")
    tracker.set_tags({"mixtune.gate": "passed"}, parent=True)
    tracker.close("FINISHED", {"kind": "done"})

    client = connect(store)
    assert tracker.run_id is not None
    run = client.get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["a.b"] == "1"
    assert len(run.data.params["long"]) == 6000
    assert len(client.get_metric_history(tracker.run_id, "loss")) == 1200
    assert set(run.data.metrics) == {"loss"}
    assert [one.path for one in client.list_artifacts(tracker.run_id, "notes")] == ["notes/note.txt"]
    assert run.inputs.dataset_inputs[0].dataset.name == "pretrain stream"
    assert tracker.parent_tags()["mixtune.gate"] == "passed"
    # A SQLite store keeps its artifacts beside it, wherever the command was started.
    assert (tmp_path / "mlflow" / "artifacts").is_dir()


def test_what_came_from_the_cache_links_to_the_run_that_made_it(store: str) -> None:
    earlier = Tracker.open("pretrain", "pretrain", "run-1")
    now = Tracker.open("finetune", "finetune", "run-2")
    compare = Tracker.open("compare", "compare", "run-2")
    assert earlier.run_id is not None
    assert now.run_id is not None
    compare.link({"pretrain": earlier.run_id, "finetune": now.run_id, "gone": "f" * 32})
    tags = compare.parent_tags()
    assert tags["mixtune.cached.pretrain"] == earlier.run_id
    assert "mixtune.cached.finetune" not in tags
    assert tags["mixtune.cached.gone"] == "f" * 32


def test_closing_the_parent_says_how_the_run_ended(store: str) -> None:
    tracker = Tracker.open("finish", "finish", "run-1")
    tracker.close_parent("FAILED", "failed: pretrain: no data")
    assert tracker.parent_id is not None
    parent = connect(store).get_run(tracker.parent_id)
    assert parent.info.status == "FAILED"
    assert parent.data.tags["mixtune.verdict"] == "failed: pretrain: no data"


def test_a_server_that_does_not_answer_is_said_in_one_sentence_without_its_password() -> None:
    with pytest.raises(UnreachableError) as unreachable:
        connect("http://user:secret@127.0.0.1:9")
    (sentence,) = unreachable.value.problems
    assert "127.0.0.1:9" in sentence
    assert "secret" not in sentence


def test_without_an_address_nothing_is_tracked() -> None:
    tracker = Tracker.open("plan", "plan", "run-1")
    tracker.log_params({"a": 1})
    tracker.log_metrics({"a": 1.0})
    tracker.close("FINISHED")
    assert tracker.run_id is None
    assert tracker.children() == []


def test_credentials_are_removed_from_addresses() -> None:
    assert without_credentials("postgresql://u:p@host/db") == "postgresql://host/db"
    assert without_credentials("sqlite:////a/b.db") == "sqlite:////a/b.db"
