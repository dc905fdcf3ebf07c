"""What a running step is given: a place to log to, a way to show progress, and the run that it belongs to.

A step learns from its environment which run it is in, so that nothing that differs from run to run is an input:

    MIXTUNE_RUN_ID         id of the pipeline run (on a cluster from the pod's label, locally from the runner)
    MLFLOW_TRACKING_URI    where metrics go; without it nothing is tracked
    MLFLOW_EXPERIMENT_NAME experiment, `mixtune` without it
    MIXTUNE_MLFLOW_...     both, and MLflow's credentials, from a cluster's secret; used where MLFLOW_TRACKING_URI is not set.
                           Their names differ from MLflow's: Kubernetes refuses a pod that has one variable from the secret
                           and from KFP's MLflow plugin
    MLFLOW_RUN_ID          with MLFLOW_EXPERIMENT_ID: the run that KFP's MLflow plugin made for this task; the step writes to it
    MIXTUNE_ALONE          1: the step is a pipeline of its own, so it ends the parent run too
    MIXTUNE_COMPILED       what the package was compiled with, for `plan` and for `mixtune rerun`
    MIXTUNE_RUN_NAME       name of the parent run in MLflow; the id without it
    MIXTUNE_GIT_COMMIT     commit that goes on record as a tag
    MIXTUNE_IMAGE          image that the step runs in, with its digest where one is known; a registered version names it
    MIXTUNE_LOG_DIR        folder for this step's log (locally; a pod's log is its output)
    MIXTUNE_OUTCOME_DIR    folder for the step's outcome record
    MIXTUNE_JOURNAL_DIR    folder for what MLflow has not got yet; without it that is lost when the step ends
    MIXTUNE_TRACKING_OFFLINE  1: go on without an MLflow server that does not answer
    MIXTUNE_PROGRESS_FILE  file that progress is appended to, for whoever draws it
    MIXTUNE_CHECKPOINT_DIR folder or fsspec URL that checkpoints of a training are kept in; without it there are none
    MIXTUNE_GPUS           GPUs that the task was placed with; a step that finds fewer ends at once. 0 or unset: a GPU is used
                           where there is one
    MIXTUNE_PROCESSES      processes of a training step; one for each GPU without it
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from ..tracking.tracker import Tracker

ALONE = "MIXTUNE_ALONE"
COMPILED = "MIXTUNE_COMPILED"
TRACKING_KEYS = (
    "MLFLOW_TRACKING_URI",
    "MLFLOW_EXPERIMENT_NAME",
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
)
"""Keys of the Kubernetes secret `mixtune-mlflow`."""
LOG_LINE_SECONDS = 15.0
DRAW_SECONDS = 0.3


def from_secret(key: str) -> str:
    """Returns the name under which a key of the tracking secret reaches a pod."""
    return f"MIXTUNE_{key}"


def take_tracking_secret() -> None:
    """Gives the tracking secret's variables MLflow's own names, unless somebody else has named a tracking server."""
    if not os.environ.get(TRACKING_KEYS[0]):
        os.environ |= {key: value for key in TRACKING_KEYS if (value := os.environ.get(from_secret(key)))}


def note_progress(
    title: str,
    done: int = 0,
    total: int = 0,
    unit: str = "",
    tokens_per_second: int | None = None,
    seconds_left: float = 0.0,
) -> None:
    """Appends to the progress file, where the environment names one. A total of 0 says that the task has started."""
    path = os.environ.get("MIXTUNE_PROGRESS_FILE")
    if path and os.environ.get("RANK", "0") == "0":  # of several processes one tells it
        note = {"title": title, "done": done, "total": total, "unit": unit}
        note |= {"tokens_per_second": tokens_per_second, "seconds_left": seconds_left}
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(json.dumps(note) + "\n")


def started_titles(progress: Path) -> list[str]:
    """The tasks that a progress file tells of, in the order in which they started."""
    titles = []
    for line in progress.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError):  # a step that was killed can have left half a line
            note = json.loads(line)
            # A total and a unit belong to work within a step; a step's own first line has neither.
            if not note["total"] and not note["unit"]:
                titles.append(str(note["title"]))
    return titles


class Progress:
    """Counts done work and tells it: plain lines in the log, finer ones in the progress file.

    Args:
        title: the task, such as `mixed-0.3`.
        total: units of work.
        unit: name of the units, such as `steps`.
        done: units that were done before, by another attempt.
    """

    def __init__(self, title: str, total: int, unit: str, quiet: bool = False, done: int = 0) -> None:
        self._title, self._total, self._unit, self._quiet = title, total, unit, quiet
        self._done = self._first = done
        self._tokens = 0
        self._started = time.monotonic()
        self._last_line = self._started
        self._last_draw = 0.0

    def __enter__(self) -> Self:
        self._draw(0.0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._tell(time.monotonic(), last=True)

    def advance(self, n: int = 1, tokens: int = 0) -> None:
        """Notes `n` more units, in which `tokens` tokens were processed."""
        self._done += n
        self._tokens += tokens
        now = time.monotonic()
        if now - self._last_line >= LOG_LINE_SECONDS or now - self._last_draw >= DRAW_SECONDS:
            self._tell(now, last=False)

    @property
    def tokens_per_second(self) -> float:
        """Mean rate so far."""
        return self._tokens / max(time.monotonic() - self._started, 1e-9)

    def _tell(self, now: float, last: bool) -> None:
        self._last_draw = now
        elapsed = now - self._started
        left = elapsed / max(self._done - self._first, 1) * (self._total - self._done)
        self._draw(left)
        if self._quiet or not (last or now - self._last_line >= LOG_LINE_SECONDS):
            return
        self._last_line = now
        rate = f", {self._tokens / max(elapsed, 1e-9):,.0f} tokens/s" if self._tokens else ""
        rest = f", {elapsed:.0f} s" if last else f", {left:.0f} s left"
        print(f"{self._title}: {self._done}/{self._total} {self._unit}{rate}{rest}", flush=True)

    def _draw(self, seconds_left: float) -> None:
        rate = round(self.tokens_per_second) if self._tokens else None
        note_progress(self._title, self._done, self._total, self._unit, rate, round(seconds_left, 1))


@dataclass
class Context:
    """Handed to every step's `run`.

    Attributes:
        title: step and what it works on, such as `evaluate mixed-0.3`.
        tracker: the step's MLflow run.
        run_id: id of the pipeline run, None outside of one.
        facts: what the step wants others to know of its outcome, such as the gate's verdict.
    """

    title: str
    tracker: Tracker
    run_id: str | None = None
    quiet: bool = False
    facts: dict[str, str] = field(default_factory=dict)

    def say(self, line: str) -> None:
        """One plain line in the log."""
        if not self.quiet:
            print(line, flush=True)

    def progress(self, total: int, unit: str, what: str = "", done: int = 0) -> Progress:
        """A count of work to come, shown as it goes on; `done` of it was done before."""
        return Progress(f"{self.title} {what}".strip(), total, unit, quiet=self.quiet, done=done)

    @classmethod
    def for_tests(cls) -> Context:
        """No tracking, no output."""
        return cls(title="test", tracker=Tracker.off(), quiet=True)
