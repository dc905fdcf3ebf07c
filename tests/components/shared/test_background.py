"""Checkpoints are written while the training goes on, and what becomes of one that is not written in time."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mixtune.components.shared.checkpoints.background import BackgroundWriter, copied
from mixtune.components.shared.checkpoints.store import CHECKPOINT_DIR, CheckpointStore
from mixtune.components.shared.errors import MixtuneError
from mixtune.components.shared.training.streams import Mix

from .cut_off import Training, equal

SECONDS = 60
"""After which a test that waits for something has failed."""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CHECKPOINT_DIR, str(tmp_path / "checkpoints"))
    return tmp_path / "checkpoints"


def before_saving(monkeypatch: pytest.MonkeyPatch, do: Callable[[int], None]) -> None:
    """Does something in the thread that writes, before the real writing."""
    save = CheckpointStore.save

    def first(self: CheckpointStore, step: int, *given: Any) -> Path:
        do(step)
        return save(self, step, *given)

    monkeypatch.setattr(CheckpointStore, "save", first)


def on_step(monkeypatch: pytest.MonkeyPatch, do: Callable[[int], None]) -> None:
    """Does something in the training, when the data of a step is made."""
    step = Mix.step

    def first(self: Mix, number: int) -> Any:
        do(number)
        return step(self, number)

    monkeypatch.setattr(Mix, "step", first)


def test_steps_are_trained_while_a_checkpoint_is_written(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training(tmp_path, checkpoint_steps=3)
    with monkeypatch.context() as patch:
        patch.setenv(CHECKPOINT_DIR, "")
        expected, _ = training.run()
    reached = threading.Event()
    with monkeypatch.context() as patch:
        # The checkpoint of step 3 is written only after step 5 was trained.
        on_step(patch, lambda number: reached.set() if number == 6 else None)
        before_saving(patch, lambda step: None if reached.wait(SECONDS) else pytest.fail("the training waited"))
        model, result = training.run()
    assert equal(model, expected)
    assert result.checkpoints is not None
    result.checkpoints.release()
    for newest in root.glob("*/step-00000006-*"):
        (newest / "manifest.json").unlink()
    again, _ = training.run()
    assert "goes on from the checkpoint of step 3" in training.lines[-1], "it holds the state of step 3"
    assert equal(again, expected)


def test_a_failed_write_ends_the_training_with_its_sentence(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors import torch as safe_torch

    write = safe_torch.save_file

    def full(tensors: Any, file: Path, *given: Any) -> None:
        if "aside-4" in str(file):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(tensors, file, *given)

    monkeypatch.setattr(safe_torch, "save_file", full)
    training = Training(tmp_path)
    with pytest.raises(MixtuneError, match=r"the one of step 4 could not be written to .*the one of step 2 is whole"):
        training.run()
    assert [path.name.split("-")[1] for path in root.glob("*/step-*")] == ["00000002"]
    assert not list(root.glob("*/holder.json")), "the lease is given back"


def test_sigterm_finishes_what_is_being_written(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(tmp_path)
    terminated = threading.Event()

    def terminate(number: int) -> None:
        if number == 4:
            os.kill(os.getpid(), signal.SIGTERM)
            terminated.set()

    on_step(monkeypatch, terminate)
    before_saving(monkeypatch, lambda step: None if terminated.wait(SECONDS) else pytest.fail("no SIGTERM"))
    with pytest.raises(SystemExit) as ended:
        training.run()
    assert ended.value.code == 143
    found = sorted(path.name.split("-")[1] for path in root.glob("*/step-*"))
    assert found[0] == "00000002", "the one that was being written"
    assert len(found) == 2, "and one of the state at the signal"


def test_the_next_work_waits_for_the_last_and_an_error_is_told_once() -> None:
    writer, may_end = BackgroundWriter(), threading.Event()
    done: list[int] = []

    def first() -> None:
        may_end.wait(SECONDS)
        done.append(1)

    writer.start(first)
    threading.Timer(0.05, may_end.set).start()
    writer.start(lambda: done.append(2))
    writer.wait()
    assert done == [1, 2]

    def fail() -> None:
        raise MixtuneError("no space")

    writer.start(fail)
    with pytest.raises(MixtuneError, match="no space"):
        writer.wait()
    assert not writer.has_failed
    writer.wait()


def test_copies_do_not_change_with_what_they_are_of() -> None:
    weight = torch.arange(6.0).view(2, 3).t()
    made = copied({"weights": {"w": weight, "empty": torch.empty(0)}})
    weight.zero_()
    assert torch.equal(made["weights"]["w"], torch.arange(6.0).view(2, 3).t())
    assert made["weights"]["empty"].shape == (0,)
