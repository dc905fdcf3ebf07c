"""Saves a training's state in checkpoints and resumes from them: after a kill, in another pod, in another run.

The checkpoint folder follows from the content of the training (settings, data, start model, code), not from the run: a run
that trains the same again resumes from the last checkpoint. A step depends only on the checkpoint and on functions of the
step number. On a CPU the result is therefore bitwise identical to that of an uninterrupted training in as many processes.
Another number of processes can resume, too: its result differs by rounding, and its dropout draws other numbers.
"""

from __future__ import annotations

import contextlib
import copy
import shutil
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Protocol, Self

import torch
from accelerate import Accelerator
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..config import Training
from ..errors import MixtuneError
from ..model.mixed_model import MixedModel
from ..model.sharding import is_sharded
from ..outcome import EXIT_STATUS
from ..running.context import Context
from .background import BackgroundWriter, copied
from .random_states import random_state, set_random_state
from .store import CHECKPOINT_DIR, NUM_KEPT, WAIT_SECONDS, WAITING_LINE_SECONDS, CheckpointStore, megabytes
from .tensors import optimizer_states, read_tensors, trained_weights, write_parts

SAME_SIGNAL_SECONDS = 2.0
FLUSH_SECONDS = 20.0
_ADAM_STATES = 2  # first and second moment of every trained weight


@dataclass(frozen=True)
class TrainingJob:
    """Identifies a training.

    Attributes:
        title: the candidate.
        identity: everything that the result depends on, besides the start model and the code.
        output: folder that the model will be written to.
        steps_before: optimizer steps of earlier trainings of the same candidate, which its metrics continue.
        keeps_end: whether the state after the last step is saved too, for trainings whose model is not written.
    """

    title: str
    identity: Mapping[str, Any]
    output: Path
    steps_before: int = 0
    keeps_end: bool = False


class Sigterm:
    """Defers the first SIGTERM until the training's state is consistent. A second SIGTERM ends the training at once."""

    def __init__(self) -> None:
        self.received = False
        self._at = 0.0
        self._before: Any = None

    def __enter__(self) -> Self:
        with contextlib.suppress(ValueError):  # only the main thread can install signal handlers
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        # A process group receives the same signal twice: from outside, and forwarded by torchrun.
        if self.received and time.monotonic() - self._at > SAME_SIGNAL_SECONDS:
            raise SystemExit(EXIT_STATUS["terminated"])
        if not self.received:
            self.received, self._at = True, time.monotonic()


class Counters(Protocol):
    """Counters of the training loop. Their `sums` are over the rows of a rank; all others are the same on all ranks."""

    def copy(self) -> Counters:
        """Returns a snapshot without waiting for a device."""

    def state(self) -> dict[str, Any]:
        """Returns the counters as JSON."""


@dataclass(frozen=True)
class _RankState:
    """A rank's own state at one point of the training."""

    random: dict[str, Any]
    counters: Counters

    def state(self) -> dict[str, Any]:
        return {"random": self.random, "numbers": self.counters.state()}


class Stateful(Protocol):
    """An object whose state belongs in a checkpoint, such as an adaptive λ."""

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: dict[str, Any]) -> None: ...


@dataclass
class TrainingState:
    """The objects that change during a training."""

    model: MixedModel
    optimizer: Optimizer
    schedule: LRScheduler
    mix_weight: Stateful
    result: Any


@dataclass
class TrainingCheckpointer:
    """Saves and restores the state of one training. Without a store it only handles SIGTERM.

    Attributes:
        store: the training's checkpoints; None if checkpoints are disabled, and in all processes but the first.
    """

    store: CheckpointStore | None
    training_state: TrainingState
    training: Training
    accelerator: Accelerator
    context: Context
    sigterm: Sigterm
    job: TrainingJob | None = None
    _group: Any = None
    _writing_group: Any = None
    _writer: BackgroundWriter = field(default_factory=BackgroundWriter)
    _enabled: bool = False
    _saved_step: int = -1
    _saved_at: float = field(default_factory=time.monotonic)
    _began: tuple[int, _RankState] | None = None

    def __post_init__(self) -> None:
        if self.accelerator.num_processes > 1:
            # gloo runs on the CPU, so that the exchange does not wait for a GPU.
            self._group = torch.distributed.new_group(backend="gloo")
            self._writing_group = torch.distributed.new_group(backend="gloo")

    @property
    def _is_main(self) -> bool:
        return self.accelerator.is_main_process

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._wait()
            return
        # A second SIGTERM ends the training at once. After the first one, nothing is being written any more.
        if not issubclass(kind, SystemExit):
            with contextlib.suppress(Exception):  # the error that is on its way is told
                self._writer.wait()
        self._release()

    def _wait(self) -> None:
        """Waits until the last checkpoint is written. All processes take part.

        Raises:
            Exception: in all of them, if one could not write.
        """
        error: Exception | None = None
        try:
            self._writer.wait()
        except Exception as raised:
            error = raised
        (failed,) = self._on_any_rank(error is not None)
        if failed:
            self._release()
            raise error or MixtuneError("checkpoints: one could not be written by another process")

    def _release(self) -> None:
        if self.store is not None:
            self.store.release()

    def claim(self) -> None:
        """Waits until no other process trains the same, then checks that there is enough disk space.

        Raises:
            MixtuneError: if the folder cannot be written or has too little space.
        """
        self._enabled = bool(self._from_main(self.store is not None))
        if not self._enabled:
            return
        if self.store is not None:
            self.store.make_folder()
        last_line = 0.0
        while not self._from_main(self.store.try_claim() if self.store is not None else None):
            if self.store is not None and time.monotonic() - last_line > WAITING_LINE_SECONDS:
                last_line = time.monotonic()
                self.context.say(f"{self.context.title}: waiting for {self.store.waiting_for()}, which trains the same")
            if any(self._on_any_rank(self.sigterm.received)):
                raise SystemExit(EXIT_STATUS["terminated"])
            time.sleep(WAIT_SECONDS)
        if self.store is not None and self.job is not None:
            check_free_space(self.store, self.training_state.model, self.job.output)

    def restore(self) -> tuple[int, dict[str, Any]]:
        """Restores the newest complete checkpoint.

        Returns:
            The number of completed steps and this rank's counters at that step; 0 and {} without a checkpoint.
        """
        checkpoint = self._from_main(self.store.newest() if self.store is not None else None)
        if checkpoint is None:
            return 0, {}
        state = checkpoint.state()
        current = self.training_state
        read_tensors(checkpoint.folder, current.model, current.optimizer, state["optimizer"])
        _restore_schedule(current.schedule, state["schedule"])
        current.mix_weight.restore(state["mix_weight"])
        for name, value in state["result"].items():
            setattr(current.result, name, value)
        counters = self._own_counters(state["ranks"])
        self._saved_step, self._saved_at = checkpoint.step, time.monotonic()
        if self._is_main:
            for entry in current.result.curve:
                values = {name: value for name, value in entry.items() if name != "step"}
                self.context.tracker.log_metrics(values, entry["step"] + (self.job.steps_before if self.job else 0))
            self.context.say(f"{self.context.title}: goes on from the checkpoint of step {checkpoint.step}")
        return checkpoint.step, counters

    def _own_counters(self, ranks: list[dict[str, Any]]) -> dict[str, Any]:
        """Returns this rank's counters and restores its random state, if there were as many ranks when they were saved.

        Otherwise the random generators start as in a new training, and the first rank continues all sums.
        """
        rank = self.accelerator.process_index
        if len(ranks) == self.accelerator.num_processes:
            set_random_state(ranks[rank]["random"])
        else:
            names = ranks[0]["numbers"]["sums"]
            total = {name: 0.0 if rank else sum(each["numbers"]["sums"][name] for each in ranks) for name in names}
            ranks = [{"numbers": {**ranks[0]["numbers"], "sums": total}}] * (rank + 1)
        counters: dict[str, Any] = ranks[rank]["numbers"]
        return counters

    def before_step(self, step: int, counters: Counters) -> None:
        """Records the state at the beginning of a step, in case the step is interrupted."""
        self._began = step, _RankState(random_state(), counters.copy())

    def end_if_terminated(self) -> None:
        """Between micro-batches: if any rank received SIGTERM, saves the state from the beginning of the step and ends."""
        if any(self._on_any_rank(self.sigterm.received)) and self._began is not None:
            self._end(*self._began)

    def after_step(self, done: int, counters: Counters) -> None:
        """Saves a checkpoint if it is due, and ends the training after a SIGTERM.

        Args:
            done: number of completed steps.
            counters: this rank's counters.
        """
        terminated, failed = self._on_any_rank(self.sigterm.received, self._writer.has_failed)
        if terminated:
            self._end(done, _RankState(random_state(), counters))
        if failed:
            self._wait()
        every = self.training.checkpoint_steps
        late = time.monotonic() - self._saved_at > 60 * self.training.checkpoint_minutes
        if done < self.training_state.result.steps:
            due = (every is not None and done % every == 0) or late
        else:
            due = self.job is not None and self.job.keeps_end
        if any(self._on_any_rank(due)):
            self._save(done, _RankState(random_state(), counters))

    def _end(self, done: int, rank_state: _RankState) -> None:
        if done > 0:
            self._save(done, rank_state)
            self._wait()
            if self.store is not None:
                self.store.flush(FLUSH_SECONDS)
                self.context.say(
                    f"{self.context.title}: SIGTERM: the state after step {done} is saved, run again to go on"
                )
        raise SystemExit(EXIT_STATUS["terminated"])

    def _save(self, done: int, rank_state: _RankState) -> None:
        """Copies the state and starts to write it, when the checkpoint before it is written."""
        self._saved_at = time.monotonic()
        if not self._enabled or done == self._saved_step:
            return
        self._wait()
        ranks: list[Any] = [rank_state.state()]
        if self._group is not None:
            ranks = [None] * self.accelerator.num_processes
            torch.distributed.gather_object(rank_state.state(), ranks if self._is_main else None, group=self._group)
        current = self.training_state
        states, numbers = optimizer_states(current.optimizer)
        sharded = is_sharded(current.model)
        if self.store is None and not sharded:
            self._saved_step = done
            return
        tensors = copied({"weights": trained_weights(current.model), "optimizer": states})

        def write_together(folder: Path | None) -> None:
            folder = self._from_main(folder, self._writing_group)
            write_parts(folder, {**tensors["weights"], **tensors["optimizer"]}, self._writing_group)

        def write_own_part() -> None:
            try:
                write_together(None)
            except Exception as error:
                raise MixtuneError(f"checkpoints: the one of step {done} could not be written ({error})") from None

        if self.store is None:
            self._writer.start(write_own_part)
        else:
            names = ("curve", "tokens", "realised_mix_weight", "seconds", "flops")
            state = {
                "step": done,
                "schedule": {
                    name: value for name, value in current.schedule.state_dict().items() if name != "lr_lambdas"
                },
                "optimizer": numbers,
                "mix_weight": current.mix_weight.state(),
                "result": {name: getattr(current.result, name) for name in names},
                "ranks": ranks,
            }
            save = partial(self.store.save, done, tensors, copy.deepcopy(state), write_together if sharded else None)
            self._writer.start(save)
        self._saved_step, self._saved_at = done, time.monotonic()

    def _on_any_rank(self, *conditions: bool) -> list[bool]:
        """Returns for each condition whether it is true on any rank. All ranks get the same result."""
        if self._group is None:
            return list(conditions)
        flags = torch.tensor(conditions, dtype=torch.int32)
        torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX, group=self._group)
        return [bool(flag) for flag in flags]

    def _from_main(self, value: Any, group: Any = None) -> Any:
        if self._group is None:
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0, group=group or self._group)
        return box[0]


def check_free_space(store: CheckpointStore, model: MixedModel, output: Path) -> None:
    """Checks that the checkpoints and the model will fit on the disk.

    Raises:
        MixtuneError: if they will not, with the required and the free space.
    """
    trained = sum(weight.numel() * weight.element_size() for weight in model.parameters() if weight.requires_grad)
    whole = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    # One more than are kept: the oldest checkpoint is deleted after the newest is written.
    needs = {store.folder: (1 + _ADAM_STATES) * trained * (NUM_KEPT + 1) - store.used_bytes()}
    target = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    same_disk = target.stat().st_dev == store.folder.stat().st_dev
    needs[store.folder if same_disk else target] = needs[store.folder] * same_disk + whole
    for folder, need in needs.items():
        free = shutil.disk_usage(folder).free
        if free < need:
            raise MixtuneError(
                f"checkpoints: checkpoints and model need about {megabytes(need)} in {folder}, where {megabytes(free)} are "
                f"available; free space, or set {CHECKPOINT_DIR} to another folder"
            )


def _restore_schedule(schedule: LRScheduler, saved: Mapping[str, Any]) -> None:
    # Keep the schedule's own lambdas: they are functions and are not saved.
    schedule.load_state_dict({**saved, "lr_lambdas": [None] * len(schedule.optimizer.param_groups)})
    for group, rate in zip(schedule.optimizer.param_groups, schedule.get_last_lr(), strict=True):
        group["lr"] = rate
