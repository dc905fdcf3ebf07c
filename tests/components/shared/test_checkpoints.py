"""Checkpoints: a training that is cut off goes on and ends bitwise the same; what is harmed is never half-loaded."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mixtune.components.shared.checkpoints.clearing import clear_finished
from mixtune.components.shared.checkpoints.keys import content_key
from mixtune.components.shared.checkpoints.resume import Sigterm
from mixtune.components.shared.checkpoints.store import CHECKPOINT_DIR, NUM_KEPT, CheckpointStore
from mixtune.components.shared.config import Budget
from mixtune.components.shared.data.prepared import Documents
from mixtune.components.shared.errors import MixtuneError
from mixtune.components.shared.model.mixed_model import MixedModel
from mixtune.components.shared.training.budget_search import BudgetSearch
from mixtune.components.shared.training.control import ControlText
from mixtune.components.shared.training.mix_weight import Constant
from mixtune.components.shared.training.reference_models import ReferenceModel
from mixtune.components.shared.training.result import Result
from mixtune.components.shared.training.stream_gradients import GradientScaled
from mixtune.components.shared.training.streams import PretrainStream
from mixtune.components.shared.training.variant import TrainingVariant
from tests.conftest import small_disk

from .cut_off import STEPS, CutOffError, Training, curve, equal
from .tiny import tiny_model
from .trained import LENGTH, PAD

pytestmark = pytest.mark.numeric


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CHECKPOINT_DIR, str(tmp_path / "checkpoints"))
    return tmp_path / "checkpoints"


def undisturbed(training: Training, monkeypatch: pytest.MonkeyPatch) -> tuple[MixedModel, Result]:
    with monkeypatch.context() as patch:
        patch.setenv(CHECKPOINT_DIR, "")
        return training.run()


def to_budget(folder: Path) -> BudgetSearch:
    """With a budget that fine-tuning on a text exceeds, so that the weights are pulled back at the end."""
    stream = PretrainStream(Documents(folder / "text", "control"), LENGTH, 0)
    control = ControlText.plan(stream, 0.05, 100 * STEPS, LENGTH, PAD, 2)
    return BudgetSearch(1e-3, Budget(max_trainings=1), control, tiny_model)


VARIANTS: dict[str, dict[str, Any]] = {
    "mixed": {},
    "pretrain": {"weight": 1.0},
    "finetune": {"weight": 0.0, "task": "generation"},
    "masked": {"architecture": "bert", "task": "question_answering"},
    "budget": {"make_variant": lambda model, folder: TrainingVariant(search=to_budget(folder))},
    "another reference": {
        "make_variant": lambda model, folder: TrainingVariant(search=to_budget(folder), reference=tiny_model(seed=3)),
    },
    "gradient scale": {"make_weight": lambda: GradientScaled(Constant(0.3)), "log_every_steps": 4},
    "lora": {"make_variant": lambda model, _: TrainingVariant(lora_rank=2), "architecture": "llama", "weight": 0.0},
    "osf": {"make_variant": lambda model, _: TrainingVariant(osf_share=0.5), "architecture": "llama", "weight": 0.0},
    "flow": {"make_variant": lambda model, _: TrainingVariant(flow=True), "task": "generation"},
    "penalties": {
        "make_variant": lambda model, _: TrainingVariant(start=ReferenceModel(model), kl_weight=0.1, l2sp_weight=0.1)
    },
    "inverse square root": {"schedule": "inverse_sqrt", "log_every_steps": 4},
    "warmup, stable, decay": {"schedule": "warmup_stable_decay", "layer_decay": 0.5, "log_every_steps": 3},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_cut_off_twice_and_gone_on_it_is_bitwise_the_same(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch, variant: str
) -> None:
    training = Training(tmp_path, **VARIANTS[variant])
    expected, whole = undisturbed(training, monkeypatch)
    for after in (3, 7):
        with pytest.raises(CutOffError):
            training.run(cut_off_after=after)
    model, result = training.run()
    assert equal(expected, model)
    assert curve(result) == curve(whole)
    assert (result.tokens, result.realised_mix_weight) == (whole.tokens, whole.realised_mix_weight)
    assert "goes on from the checkpoint of step 6" in training.lines[-1]


def test_two_are_kept_and_a_finished_one_is_cleared_with_its_run(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training(tmp_path)
    monkeypatch.setenv("MIXTUNE_RUN_ID", "run-1")
    _, result = training.run()
    (place,) = root.iterdir()
    assert sorted(path.name.split("-")[1] for path in place.glob("step-*")) == ["00000006", "00000008"]
    assert len(list(place.glob("step-*"))) == NUM_KEPT
    assert result.checkpoints is not None
    result.checkpoints.finish()
    assert [path.name.split("-")[1] for path in place.glob("step-*")] == ["00000008"]
    assert clear_finished(str(root), "run-2") == 0
    assert clear_finished(str(root), "run-1") == 1
    assert list(root.iterdir()) == []


def test_what_was_lost_on_its_way_after_the_end_costs_no_second_training(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training(tmp_path)
    first, result = training.run()
    assert result.checkpoints is not None
    result.checkpoints.finish()
    second, _ = training.run()
    assert "goes on from the checkpoint of step 8" in training.lines[-1]
    assert equal(first, second)


def test_checkpoints_come_by_time_too(tmp_path: Path, root: Path) -> None:
    Training(tmp_path, checkpoint_steps=None, checkpoint_minutes=1e-9).run()
    assert len(list(root.glob("*/step-*"))) == NUM_KEPT


def test_another_training_never_takes_them(tmp_path: Path, root: Path) -> None:
    with pytest.raises(CutOffError):
        Training(tmp_path).run(cut_off_after=5)
    for title, architecture in (("b", "gpt2"), ("a", "llama")):
        training = Training(tmp_path, architecture=architecture)
        training.run(title=title)
        assert not any("goes on" in line for line in training.lines)


def test_how_often_they_are_written_is_no_part_of_what_they_are_of(tmp_path: Path) -> None:
    model = tiny_model()
    keys = {content_key({"config": {"mixed": {"steps": 5, "checkpoint_minutes": m}}}, [model]) for m in (1, 2)}
    assert len(keys) == 1
    assert content_key({"config": {"mixed": {"steps": 6}}}, [model]) not in keys
    assert content_key({"config": {"mixed": {"steps": 5}}}, [tiny_model(seed=1)]) not in keys


def _truncate(folder: Path) -> None:
    with (folder / "optimizer.safetensors").open("r+b") as file:
        file.truncate(100)


def _flip(folder: Path) -> None:
    content = bytearray((folder / "weights.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "weights.safetensors").write_bytes(content)


def _change(folder: Path, name: str, value: str) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {name: value}))


HARM: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (_truncate, "optimizer.safetensors has 100 bytes instead of"),
    "corrupt": (_flip, "weights.safetensors is corrupt"),
    "a file short": (lambda folder: (folder / "state.json").unlink(), "state.json is missing"),
    "without a manifest": (lambda folder: (folder / "manifest.json").unlink(), "no readable manifest.json"),
    "half a manifest": (lambda folder: (folder / "manifest.json").write_text('{"for'), "no readable manifest.json"),
    "foreign": (lambda folder: _change(folder, "key", "0" * 64), "belongs to a training with other data"),
    "from another version": (lambda folder: _change(folder, "format", "mixtune-checkpoint/0"), "its format is"),
}


@pytest.mark.parametrize("harm", HARM)
def test_a_harmed_one_is_passed_over_with_a_reason_and_the_one_before_it_taken(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    training = Training(tmp_path)
    expected, _ = undisturbed(training, monkeypatch)
    with pytest.raises(CutOffError):
        training.run(cut_off_after=7)
    do_harm, reason = HARM[harm]
    (newest,) = root.glob("*/step-00000006-*")
    do_harm(newest)
    training.lines.clear()
    model, _ = training.run()
    assert reason in training.lines[0]
    assert newest.name in training.lines[0]
    assert "goes on from the checkpoint of step 4" in training.lines[1]
    assert equal(expected, model)


def test_with_all_of_them_harmed_it_starts_anew(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(tmp_path)
    expected, _ = undisturbed(training, monkeypatch)
    with pytest.raises(CutOffError):
        training.run(cut_off_after=7)
    for folder in root.glob("*/step-*"):
        _flip(folder)
    model, _ = training.run()
    assert equal(expected, model)


def _store(place: Path, lines: list[str] | None = None) -> CheckpointStore:
    store = CheckpointStore(place, "k", (lines if lines is not None else []).append)
    store.make_folder()
    return store


TENSORS = {"weights": {"w": torch.zeros(250_000)}, "optimizer": {"0.exp_avg": torch.zeros(250_000)}}


def _in_a_process(body: str, place: Path, *wrapper: str) -> subprocess.CompletedProcess[str]:
    script = f"""
import torch
from pathlib import Path
from mixtune.components.shared.checkpoints.store import CheckpointStore
from mixtune.components.shared.data.prepared import Documents
from mixtune.components.shared.errors import MixtuneError
store = CheckpointStore(Path({str(place)!r}), "k", print)
tensors = {{"weights": {{"w": torch.zeros(250_000)}}, "optimizer": {{"0.exp_avg": torch.zeros(250_000)}}}}
try:
{textwrap.indent(textwrap.dedent(body), "    ")}
except MixtuneError as error:
    print("problem:", error.problems[0])
"""
    return subprocess.run([*wrapper, sys.executable, "-c", script], capture_output=True, text=True, check=False)


def test_a_full_disk_is_said_with_numbers_and_leaves_the_last_one_whole(tmp_path: Path) -> None:
    # A limit on the size of files stands for a full disk where nothing can be mounted; the system call fails alike.
    store = _store(tmp_path)
    store.save(2, TENSORS, {})
    done = _in_a_process(
        """
        import resource, signal
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
        store.save(4, tensors, {})
        """,
        tmp_path,
    )
    assert "problem: checkpoints: the one of step 4 could not be written" in done.stdout, done
    assert "it needs 2.0 MB" in done.stdout
    assert "are free there; the one of step 2 is whole and stays" in done.stdout
    found = _store(tmp_path).newest()
    assert found is not None
    assert found.step == 2
    assert not list(tmp_path.glob("aside-*"))


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with small_disk(disk, "3m"):
        store = _store(disk / "place")
        store.save(2, TENSORS, {})
        with pytest.raises(MixtuneError, match=r"No space left.*it needs 2\.0 MB.*the one of step 2 is whole"):
            store.save(4, TENSORS, {})
        found = store.newest()
        assert found is not None
        assert found.step == 2
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(MixtuneError, match=r"cannot be written \(Read-only file system\)"):
            _store(disk / "place")


def test_no_memory_for_saving_is_said_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = _store(tmp_path)
    store.save(2, TENSORS, {})

    def no_memory(*given: object) -> None:
        raise MemoryError

    monkeypatch.setattr("safetensors.torch.save_file", no_memory)
    with pytest.raises(MixtuneError, match=r"out of memory.*needs about 2\.0 MB; the one of step 2 is whole"):
        store.save(4, TENSORS, {})


def test_a_place_that_cannot_be_written_is_said_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv(CHECKPOINT_DIR, str(tmp_path / "file" / "checkpoints"))
    with pytest.raises(MixtuneError, match=r"checkpoints: .* cannot be written \(Not a directory\)"):
        Training(tmp_path / "data").run()


def test_room_is_checked_before_training(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    training = Training(tmp_path)
    with pytest.raises(MixtuneError, match=r"need about .* MB in .*, where 0\.0 MB are available; free space"):
        training.run()
    assert not list(root.glob("*/step-*"))


def test_a_second_live_run_waits_and_takes_over_when_the_first_is_dead(tmp_path: Path) -> None:
    lines: list[str] = []
    script = "store.make_folder(); print(store.try_claim(), flush=True); import time; time.sleep(60)"
    code = f"""
from pathlib import Path
from mixtune.components.shared.checkpoints.store import CheckpointStore
store = CheckpointStore(Path({str(tmp_path)!r}), "k", print)
{script}
"""
    environment = {**os.environ, "MIXTUNE_RUN_ID": "run-1"}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "True\n"
        second = _store(tmp_path, lines)
        assert not second.try_claim()
        assert f"run run-1 (process {first.pid} on" in second.waiting_for()
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert second.try_claim()
    assert f"taking over from run run-1 (process {first.pid}" in lines[0]
    second.release()
    third = _store(tmp_path, lines)
    assert third.try_claim()
    assert len(lines) == 1  # given back in order, so there is nothing to say


def test_the_first_sigterm_is_held_and_the_second_ends_at_once() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Sigterm() as sigterm:
        assert not sigterm.received
        os.kill(os.getpid(), signal.SIGTERM)
        assert sigterm.received
        os.kill(os.getpid(), signal.SIGTERM)  # the same one, passed on by another process of the group
        sigterm._at -= 10
        with pytest.raises(SystemExit) as ended:
            os.kill(os.getpid(), signal.SIGTERM)
        assert ended.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == before


def test_sigterm_between_two_micro_batches_keeps_the_state_that_the_step_began_with(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training(tmp_path, micro_batch_size=1, checkpoint_steps=None)
    expected, whole = undisturbed(training, monkeypatch)
    calls = 0
    forward = MixedModel.forward

    def count(*given: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 12:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(*given, **named)

    monkeypatch.setattr(MixedModel, "forward", count)
    with pytest.raises(SystemExit) as ended:
        training.run()
    assert ended.value.code == 143
    assert calls == 12
    assert training.lines[-1] == "test: SIGTERM: the state after step 1 is saved, run again to go on"
    model, result = training.run()
    assert equal(expected, model)
    assert curve(result) == curve(whole)


def test_without_a_place_it_trains_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CHECKPOINT_DIR, raising=False)
    training = Training(tmp_path)
    training.run()
    assert training.lines == [f"a: no checkpoints are kept inside the training, since {CHECKPOINT_DIR} is not set"]
