"""Shows the progress of a run on a cluster: a line when a task starts, waits or ends, and lines for running trainings."""

from __future__ import annotations

import datetime
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import kfp_server_api as kfp_api

from mixtune.components.shared.task_name import TaskName

from .pods import PodState
from .runs import title_alone
from .slow import Say
from .tasks import Node, RunTree, TaskStatus, nodes_of_run, stopped_at
from .tracked import Attempt, TrackedRun

TRAINING_SECONDS = 60.0
# Every pod is pending for some time.
PENDING_SECONDS = 60.0
# MLflow learns of an end before KFP does, but KFP has the final state.
LATE_SECONDS = 60.0
THE_RUN = "the run"
_WORDS = {
    "running": "running", "done": "done", "cached": "from the cache", "failed": "failed", "skipped": "skipped",
    "stopped": "stopped",
}  # fmt: skip


def line(title: str, text: str) -> str:
    """Formats a line about a task."""
    return f"  {title:<28} {text}"


def tree_of(run: kfp_api.V2beta1Run, nodes: list[Node] | None = None) -> RunTree:
    """Returns the tasks of a run.

    Args:
        nodes: nodes of Argo's workflow, if it could be read; otherwise KFP's task details are used.
    """
    values = (run.runtime_config.parameters if run.runtime_config else None) or {}
    return RunTree(nodes or nodes_of_run(run), _candidates(values), _alone(run, values), stopped_at(run))


def is_alone(run: kfp_api.V2beta1Run) -> bool:
    """Tells whether a run consists of one step. Only such runs have a parameter `config`, the step's configuration."""
    return "config" in ((run.runtime_config.parameters if run.runtime_config else None) or {})


def _candidates(values: Mapping[str, Any]) -> list[str]:
    """Returns the candidates in the order of the loop, from the parameters that `plan` reads."""
    from mixtune.components.form import ADVANCED, FIELDS, read_form
    from mixtune.components.mixed.config import candidates
    from mixtune.components.shared.errors import RefusedError

    if not {*FIELDS, ADVANCED} <= set(values):
        return []
    try:
        return [one.id for one in candidates(read_form(values).mixed)]
    except RefusedError:
        return []  # created manually, or by another version


def _alone(run: kfp_api.V2beta1Run, values: Mapping[str, Any]) -> str | None:
    """Returns the title of a step's own run, from the description that `mixtune rerun` sets."""
    return title_alone(run.description or "") or ("" if "config" in values else None)


class RunProgress:
    """Shows changes since the last call.

    Args:
        run_id: id of the run.
        tell: shows a line.
    """

    def __init__(self, run_id: str, tell: Say) -> None:
        self._tell = tell
        self._tracked = TrackedRun(run_id, tell)
        self._shown: dict[str, str] = {}
        self._reasons: dict[str, str] = {}
        self._lines: dict[str, tuple[float, str]] = {}

    def show(
        self, run: RunTree, pods: Sequence[PodState] = (), look_with: str = "", ended: str = ""
    ) -> dict[str, TaskStatus]:
        """Shows tasks that changed, reasons why tasks are pending or were killed, and running trainings.

        Args:
            pods: pods that are pending or were killed, if they can be read.
            look_with: command that shows why a task is pending, if pods cannot be read.
            ended: state of the run, if it has ended.

        Returns:
            The tasks by title.
        """
        attempts = {} if run.alone == "" else self._tracked.attempts()
        tasks = {title: _with_attempt(task, attempts.get(title)) for title, task in run.tasks().items()}
        for title, attempt in attempts.items():
            if title not in tasks and (known := _from_attempt(attempt)):
                tasks[title] = known  # a large workflow, which KFP no longer updates
        for pod in pods:
            title = run.title(pod.path) or THE_RUN
            if pod.killed:
                self._tell_once(f"{title}, {pod.about}", pod.about, title, pod.reason)
            elif not ended:
                task = tasks.get(title, TaskStatus(title, "pending"))
                tasks[title] = replace(task, state="pending", since=pod.since, message=pod.reason, about=pod.about)
        for task in tasks.values():
            self._show_task(task, look_with, ended)
        if not ended:
            self._show_trainings(tasks, attempts)
        return tasks

    def _show_task(self, task: TaskStatus, look_with: str, ended: str) -> None:
        if ended == "SUCCEEDED" and task.state in ("running", "pending"):
            # KFP never updates the last tasks of a large workflow.
            task = replace(task, state="done", ended=None)
        if task.state == "pending":
            if task.message:
                self._tell_once(task.title, task.about or task.message, task.title, f"pending: {task.message}")
            elif look_with and (task.pending_seconds or 0) >= PENDING_SECONDS:
                self._tell_once(task.title, look_with, task.title, f"pending; see why: {look_with}")
            return
        self._reasons.pop(task.title, None)
        if task.state in _WORDS and self._shown.get(task.title) != task.state:
            self._shown[task.title] = task.state
            took = task.seconds if task.state in ("done", "failed", "stopped") else None
            self._tell(line(task.title, _WORDS[task.state] + (f" {took:.0f} s" if took is not None else "")))

    def _tell_once(self, key: str, about: str, title: str, text: str) -> None:
        if self._reasons.get(key) != about:
            self._reasons[key] = about
            self._tell(line(title, text))

    def _show_trainings(self, tasks: Mapping[str, TaskStatus], attempts: Mapping[str, Attempt]) -> None:
        for title, attempt in attempts.items():
            task = tasks.get(title)
            if task is None or task.state != "running" or attempt.status != "RUNNING" or not _trains(title):
                continue
            last, before = self._lines.get(title, (float("-inf"), ""))
            if time.monotonic() - last < TRAINING_SECONDS:
                continue
            text = self._tracked.training_line(attempt)
            if text and text != before:
                self._tell(line(title, text))
            self._lines[title] = (time.monotonic(), text or before)


def _trains(title: str) -> bool:
    name = TaskName.parse(title)
    return name is not None and name.trains


def _with_attempt(task: TaskStatus, attempt: Attempt | None) -> TaskStatus:
    """Updates KFP's state of a task with MLflow's record of it."""
    if attempt is None or task.state not in ("pending", "running") or _before(attempt.started, task.started):
        return task
    if attempt.status == "RUNNING":
        return replace(task, state="running")
    if (known := _from_attempt(attempt)) and known.state == "done":
        return known
    return task


def _from_attempt(attempt: Attempt) -> TaskStatus | None:
    if attempt.status == "RUNNING":
        return TaskStatus(attempt.title, "running", started=attempt.started)
    now = datetime.datetime.now(datetime.UTC)
    if attempt.status == "FINISHED" and attempt.ended and (now - attempt.ended).total_seconds() >= LATE_SECONDS:
        return TaskStatus(attempt.title, "done", started=attempt.started, ended=attempt.ended)
    return None


def _before(one: datetime.datetime | None, other: datetime.datetime | None) -> bool:
    return one is not None and other is not None and one < other - datetime.timedelta(seconds=LATE_SECONDS)
