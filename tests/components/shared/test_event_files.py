"""TensorBoard event files hold what goes to MLflow, while the training runs."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from mixtune.components.shared.tracking.connection import connect
from mixtune.components.shared.tracking.event_files import EventFiles
from mixtune.components.shared.tracking.tracker import Tracker
from tests.stores import new_store


def events(file: Path) -> Iterator[Any]:
    """The events of a file in TensorFlow's record format: a length, its checksum, the record, its checksum."""
    content, at = file.read_bytes(), 0
    while at < len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        yield Event.FromString(content[at + 12 : at + 12 + length])
        at += length + 16


def scalars(folder: Path) -> list[tuple[int, str, Any]]:
    return [
        (event.step, value.tag, pytest.approx(value.simple_value))
        for file in sorted(folder.iterdir())
        for event in events(file)
        for value in event.summary.value
    ]


def test_a_training_logs_the_same_to_mlflow_and_to_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = new_store(tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.setenv("MIXTUNE_TENSORBOARD_DIR", str(tmp_path / "tensorboard"))
    tracker = Tracker.open("mixed", "mixed-0.3", "run")
    for step in (10, 20):
        tracker.log_metrics({"loss": 3.0 - step / 100, "loss_pretrain": None}, step)
    tracker.log_metrics({"final_loss": 2.8})
    tracker.close("FINISHED", {})
    assert scalars(tmp_path / "tensorboard" / "mixed-0.3") == [(10, "loss", 2.9), (20, "loss", 2.8)]
    client = connect(store)
    history = client.get_metric_history(tracker.run_id, "loss")
    assert [(one.step, one.value) for one in history] == [(10, 2.9), (20, 2.8)]
    (file,) = client.list_artifacts(tracker.run_id, "tensorboard")
    assert Path(file.path).name in {one.name for one in (tmp_path / "tensorboard" / "mixed-0.3").iterdir()}
    # An evaluation has no curves.
    other = Tracker.open("evaluate", "evaluate mixed-0.3", "run")
    other.log_metrics({"test.bpb": 1.0}, 0)
    other.close("FINISHED", {})
    assert [one.name for one in (tmp_path / "tensorboard").iterdir()] == ["mixed-0.3"]


def test_a_resumed_training_replaces_what_follows_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorBoard leaves out what earlier files hold from the step of a start on. Without MLflow there are files, too."""
    monkeypatch.setenv("MIXTUNE_TENSORBOARD_DIR", str(tmp_path))
    for first in (10, 30):
        tracker = Tracker.open("pretrain", "pretrain", None)
        tracker.log_metrics({"loss": 1.0}, first)
        tracker.close("FINISHED", {})
    found = [event for file in (tmp_path / "pretrained").iterdir() for event in events(file)]
    starts = [event.step for event in found if event.session_log.status == SessionLog.START]
    assert sorted(starts) == [10, 30]


def test_none_are_written_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert EventFiles.from_environment("pretrain") is None
