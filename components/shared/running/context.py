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
    MIXTUNE_TENSORBOARD_DIR  folder for TensorBoard event files of trainings; if unset, none are written
    MIXTUNE_PROGRESS_FILE  file that progress is appended to, for display
    MIXTUNE_CHECKPOINT_DIR folder or fsspec URL for checkpoints of a training and finished shards of `prepare`; if unset, none
                           are saved
    MIXTUNE_GPUS           GPUs that the task requested; a step that finds fewer fails at once. If 0 or unset, a GPU is used
                           if there is one
    MIXTUNE_PROCESSES      processes of a training step; by default one for each GPU
    MIXTUNE_TRAINJOB       the TrainJob of a training on several nodes, as JSON (shared/nodes/manifest.py); with
                           MIXTUNE_TRAINJOB_GPUS, _GPU_TYPE, _NODE_SELECTOR, _TOLERATIONS and _AFFINITY
    MIXTUNE_POD_NAMESPACE  with MIXTUNE_POD_NAME: the pod that launches it
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

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


def note_progress(title: str, **work: Any) -> None:
    """Appends to the progress file if the environment names one.

    Args:
        title: title of the task.
        work: fields of `WorkDone`; none of them means that the task has started.
    """
    path = os.environ.get("MIXTUNE_PROGRESS_FILE")
    if path and os.environ.get("RANK", "0") == "0":  # only the first process reports
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"title": title, **work}) + "\n")


def note_cached(title: str) -> None:
    """Appends to the progress file that the results of a task come from the cache."""
    note_progress(title, cached=True)


def started_titles(progress: Path) -> list[str]:
    """Returns the tasks in a progress file that have started, in order."""
    titles: dict[str, None] = {}
    for line in progress.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError):  # a killed step can leave a partial line
            note = json.loads(line)
            if not note.get("cached"):
                titles[str(note["title"])] = None
    return list(titles)


@dataclass(frozen=True)
class WorkDone:
    """How much of a part of a task is done.

    Attributes:
        what: the part, such as `test documents`; empty if it is the whole task.
        done: completed units.
        total: all units.
        unit: name of the units, such as `steps`.
        detail: last measured values, such as the losses.
        tokens_per_second: mean rate; None if no tokens are counted.
        seconds_left: estimated time until the part is done.
    """

    what: str
    done: int
    total: int
    unit: str
    detail: str = ""
    tokens_per_second: int | None = None
    seconds_left: float = 0.0

    @property
    def text(self) -> str:
        """Returns what was done, such as `test documents: 3/12 batches`."""
        counted = f"{self.done:,}/{self.total:,} {self.unit}"
        return ", ".join(filter(None, [f"{self.what}: {counted}" if self.what else counted, self.detail]))

    @property
    def rate(self) -> str:
        """Returns the rate in words; empty if no tokens are counted."""
        return f"{self.tokens_per_second:,} tokens/s" if self.tokens_per_second else ""

    @property
    def line(self) -> str:
        """Returns all in one line."""
        return ", ".join(filter(None, [self.text, self.rate, f"{self.seconds_left:,.0f} s left"]))


class ProgressCounter:
    """Counts completed work and reports it: lines in the log, and more often in the progress file.

    Args:
        title: the task, such as `mixed-0.3`.
        total: number of units.
        unit: name of the units, such as `steps`.
        what: the part of the task, if it is not the whole.
        done: units that an earlier attempt completed.
    """

    def __init__(self, title: str, total: int, unit: str, what: str = "", quiet: bool = False, done: int = 0) -> None:
        self._title, self._total, self._unit, self._what, self._quiet = title, total, unit, what, quiet
        self._done = self._first = done
        self._tokens = 0
        self._detail = ""
        self._started = time.monotonic()
        self._last_line = self._started
        self._last_draw = 0.0

    def __enter__(self) -> Self:
        self._draw(self._started)
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

    def measured(self, detail: str) -> None:
        """Sets the last measured values, which are shown from the next unit on."""
        self._detail = detail

    def _tell(self, now: float, last: bool) -> None:
        work = self._draw(now)
        if self._quiet or not (last or now - self._last_line >= LOG_LINE_SECONDS):
            return
        self._last_line = now
        took = [work.text, work.rate, f"{now - self._started:,.0f} s"]
        print(f"{self._title}: {', '.join(filter(None, took)) if last else work.line}", flush=True)

    def _draw(self, now: float) -> WorkDone:
        self._last_draw = now
        elapsed = now - self._started
        left = elapsed / max(self._done - self._first, 1) * (self._total - self._done)
        rate = round(self._tokens / max(elapsed, 1e-9)) if self._tokens else None
        work = WorkDone(self._what, self._done, self._total, self._unit, self._detail, rate, round(left, 1))
        note_progress(self._title, **asdict(work))
        return work


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
        return ProgressCounter(self.title, total, unit, what, quiet=self.quiet, done=done)

    @classmethod
    def for_tests(cls) -> Context:
        """Returns a context without tracking and output."""
        return cls(title="test", tracker=Tracker.off(), quiet=True)
