"""The context of a running step: log, progress and the pipeline run that it belongs to.

A step reads run-specific values from its environment, so that they are not inputs, which would defeat caching:

    MIXTUNE_RUN_ID         id of the pipeline run (on a cluster from the pod's label, locally from the runner)
    MLFLOW_TRACKING_URI    tracking server; if unset, nothing is tracked
    MLFLOW_EXPERIMENT_NAME experiment; `mixtune` by default
    MIXTUNE_MLFLOW_...     both, and MLflow's credentials, from a cluster's secret; used if MLFLOW_TRACKING_URI is not set.
                           The names differ from MLflow's, since Kubernetes refuses a pod that gets the same variable from
                           the secret and from KFP's MLflow plugin
    MLFLOW_RUN_ID          with MLFLOW_EXPERIMENT_ID: the run that KFP's MLflow plugin made for this task; the step logs to it
    MIXTUNE_ALONE          1: the step runs as its own pipeline, so it also ends the parent run
    MIXTUNE_COMPILED       options that the package was compiled with, for `plan` and for `mixtune rerun`
    MIXTUNE_NODES          placement of the profile, for `plan`, as JSON: `gpu` is the default of the form's field `placement`,
                           `other` the node affinity of tasks without a GPU. Set on a cluster only
    MIXTUNE_RUN_NAME       name of the parent run in MLflow; the run id by default
    MIXTUNE_GIT_COMMIT     commit, recorded as a tag
    MIXTUNE_IMAGE          image that the step runs in, with its digest if known; recorded with registered versions
    MIXTUNE_LOG_DIR        folder for this step's log (locally; a pod logs to its output)
    MIXTUNE_OUTCOME_DIR    folder for the step's outcome record
    MIXTUNE_JOURNAL_DIR    folder for records that MLflow has not received; if unset, they are lost when the step ends
    MIXTUNE_TRACKING_OFFLINE  1: continue if the MLflow server does not answer
    MIXTUNE_PROGRESS_FILE  file that progress is appended to, for display
    MIXTUNE_CHECKPOINT_DIR folder or fsspec URL for checkpoints of a training; if unset, no checkpoints are saved
    MIXTUNE_GPUS           GPUs that the task requested; a step that finds fewer fails at once. If 0 or unset, a GPU is used
                           if there is one
    MIXTUNE_PROCESSES      processes of a training step; by default one for each GPU
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
NODES = "MIXTUNE_NODES"
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
    """Returns the environment variable through which a pod receives a key of the tracking secret."""
    return f"MIXTUNE_{key}"


def take_tracking_secret() -> None:
    """Copies the tracking secret's variables to MLflow's own names, unless a tracking server is already set."""
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
    """Appends to the progress file if the environment names one. A total of 0 means that the task has started."""
    path = os.environ.get("MIXTUNE_PROGRESS_FILE")
    if path and os.environ.get("RANK", "0") == "0":  # only the first process reports
        note = {"title": title, "done": done, "total": total, "unit": unit}
        note |= {"tokens_per_second": tokens_per_second, "seconds_left": seconds_left}
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(json.dumps(note) + "\n")


def started_titles(progress: Path) -> list[str]:
    """Returns the tasks in a progress file, in the order in which they started."""
    titles = []
    for line in progress.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError):  # a killed step can leave a partial line
            note = json.loads(line)
            # Only work within a step has a total and a unit; a step's own first line has neither.
            if not note["total"] and not note["unit"]:
                titles.append(str(note["title"]))
    return titles


class ProgressCounter:
    """Counts completed work and reports it: lines in the log, and more often in the progress file.

    Args:
        title: the task, such as `mixed-0.3`.
        total: number of units.
        unit: name of the units, such as `steps`.
        done: units that an earlier attempt completed.
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
        """Adds `n` completed units, in which `tokens` tokens were processed."""
        self._done += n
        self._tokens += tokens
        now = time.monotonic()
        if now - self._last_line >= LOG_LINE_SECONDS or now - self._last_draw >= DRAW_SECONDS:
            self._tell(now, last=False)

    @property
    def tokens_per_second(self) -> float:
        """Returns the mean rate so far."""
        return self._tokens / max(time.monotonic() - self._started, 1e-9)

    def _tell(self, now: float, last: bool) -> None:
        self._last_draw = now
        elapsed = now - self._started
        seconds_left = elapsed / max(self._done - self._first, 1) * (self._total - self._done)
        self._draw(seconds_left)
        if self._quiet or not (last or now - self._last_line >= LOG_LINE_SECONDS):
            return
        self._last_line = now
        rate = f", {self._tokens / max(elapsed, 1e-9):,.0f} tokens/s" if self._tokens else ""
        rest = f", {elapsed:.0f} s" if last else f", {seconds_left:.0f} s left"
        print(f"{self._title}: {self._done}/{self._total} {self._unit}{rate}{rest}", flush=True)

    def _draw(self, seconds_left: float) -> None:
        rate = round(self.tokens_per_second) if self._tokens else None
        note_progress(self._title, self._done, self._total, self._unit, rate, round(seconds_left, 1))


@dataclass
class Context:
    """The context of a step, passed to its `run`.

    Attributes:
        title: the step and its subject, such as `evaluate mixed-0.3`.
        tracker: the step's MLflow run.
        run_id: id of the pipeline run; None outside of one.
        facts: results for the outcome record, such as the gate's verdict.
    """

    title: str
    tracker: Tracker
    run_id: str | None = None
    quiet: bool = False
    facts: dict[str, str] = field(default_factory=dict)

    def say(self, line: str) -> None:
        """Prints a line to the log."""
        if not self.quiet:
            print(line, flush=True)

    def progress(self, total: int, unit: str, what: str = "", done: int = 0) -> ProgressCounter:
        """Returns a progress counter. `done` units were completed before."""
        return ProgressCounter(f"{self.title} {what}".strip(), total, unit, quiet=self.quiet, done=done)

    @classmethod
    def for_tests(cls) -> Context:
        """Returns a context without tracking and output."""
        return cls(title="test", tracker=Tracker.off(), quiet=True)
