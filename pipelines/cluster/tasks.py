"""The tasks of a run by title, from KFP's task details or Argo's workflow.

Both list the nodes of the same tree. Each task of the package has several nodes: a driver, a retry wrapper (`plan`), its
attempts (`plan(0)`), and below them `executor` with its own attempts. KFP reports a node's display name and the ids of its
children, but not its own id. Argo's ids are hashes of full node names, so the names are found by search: starting at the
root, names are tried whose ids the tree contains.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import kfp_server_api as kfp_api

from mixtune.components.shared.task_name import TaskName

State = Literal["pending", "running", "done", "cached", "failed", "skipped", "stopped"]
PHASES = {
    "Pending": "PENDING", "Running": "RUNNING", "Succeeded": "SUCCEEDED", "Failed": "FAILED", "Error": "FAILED",
    "Skipped": "SKIPPED",
}  # fmt: skip
_SUFFIX = re.compile(r"\([^()]*\)$")
_ITERATION = re.compile(r"iterations\((\d+):[^()]*\)")


@dataclass(frozen=True)
class Node:
    """A node of the workflow.

    Attributes:
        display: name among its siblings, such as `plan` or `executor(0)`.
        state: state in KFP's terms; empty for a node that will not run.
        children: ids of its children; for an attempt also ids of the nodes that follow it.
        message: Argo's message, if there is one.
        path: full name, such as `mixtune-4l89s(0).root(0).plan`; empty if it could not be determined.
    """

    display: str
    state: str
    children: tuple[str, ...] = ()
    started: datetime.datetime | None = None
    ended: datetime.datetime | None = None
    message: str = ""
    path: str = ""


@dataclass(frozen=True)
class TaskStatus:
    """A task of the package.

    Attributes:
        path: full name of its node.
        since: time since when it is pending.
        message: why it is pending or failed.
        about: identifies the reason; if empty, the message does.
    """

    title: str
    state: State
    path: str = ""
    started: datetime.datetime | None = None
    ended: datetime.datetime | None = None
    since: datetime.datetime | None = None
    message: str = ""
    about: str = ""

    @property
    def pending_seconds(self) -> float | None:
        """Returns how long the task has been pending; None if it is not pending."""
        if self.state != "pending" or self.since is None:
            return None
        return (datetime.datetime.now(datetime.UTC) - self.since).total_seconds()

    @property
    def seconds(self) -> float | None:
        """Returns how long the task took; None if it has not ended."""
        return (self.ended - self.started).total_seconds() if self.started and self.ended else None


@dataclass(frozen=True)
class Failure:
    """A failed task, or a failed driver that should have started it.

    Attributes:
        title: title of the task; empty if the run as a whole could not start.
        driver: whether the task was never started.
        pod_ids: node ids of the failed pods, last one first.
    """

    title: str
    driver: bool
    message: str = ""
    pod_ids: tuple[str, ...] = ()


@dataclass
class RunTree:
    """The tree of nodes of a run, with full names.

    Args:
        nodes: all nodes, in any order.
        candidates: ids of the candidates, in the order of the loop; empty if unknown.
        alone: title of the task in a step's own pipeline; empty if it is the step's name.
        stopped_at: time at which a stop of the run was requested.
    """

    nodes: Sequence[Node]
    candidates: Sequence[str] = ()
    alone: str | None = None
    stopped_at: datetime.datetime | None = None
    _by_path: dict[str, Node] = field(init=False, default_factory=dict)
    _ids: set[str] = field(init=False, default_factory=set)

    def __post_init__(self) -> None:
        self._ids = {child for node in self.nodes for child in node.children}
        self._by_path = locate(self.nodes, self._ids)

    @property
    def workflow(self) -> str:
        """Returns the name of the workflow."""
        return workflow_name(self._ids)

    def title(self, path: str) -> str | None:
        """Returns the title of the task that a node (also a driver) belongs to; None for nodes of groups and importers."""
        for part in reversed(path.split(".")):
            task = _without_suffixes(part).removesuffix("-driver")
            iteration = _ITERATION.search(path)
            index = int(iteration[1]) if iteration else None
            name = TaskName.of_package_task(task, None if index is None else self._candidate(index), index)
            if name is None:
                continue
            if self.alone is not None:
                return self.alone or name.step
            return str(name)
        return None

    def _candidate(self, index: int) -> str:
        return self.candidates[index] if index < len(self.candidates) else f"candidate {index + 1}"

    def tasks(self) -> dict[str, TaskStatus]:
        """Returns the tasks that have started, by title, in the order of their start."""
        found = []
        for path, node in self._by_path.items():
            if not _is_task(node) or not node.state:
                continue
            title = self.title(path)
            if title is not None:
                found.append(self._task(title, path, node))
        found.sort(key=lambda task: (_moment(task.started), _moment(task.ended), task.title))
        return {task.title: task for task in found}

    def _task(self, title: str, path: str, node: Node) -> TaskStatus:
        words: dict[str, State] = {
            "PENDING": "running", "RUNNING": "running", "SUCCEEDED": "done", "FAILED": "failed", "SKIPPED": "skipped",
            "CANCELED": "stopped", "CACHED": "cached",
        }  # fmt: skip
        state, since, message = words.get(node.state, "running"), None, node.message
        if state == "done" and node.started == node.ended:
            state = "cached"  # pods never start and end within one second
        if state == "failed" and self.stopped_at and _moment(node.ended) >= self.stopped_at.timestamp():
            state = "stopped"
        if state == "running" and (waiting := self._waiting(path)):
            state, since, message = "pending", waiting.started, waiting.message
        return TaskStatus(title, state, path, node.started, node.ended, since, message)

    def _waiting(self, path: str) -> Node | None:
        """Returns the pod of a running task if the pod has not started.

        KFP does not report which `executor(0)` belongs to which task, so all those that started with the task must be pending.
        """
        executor = next((self._by_path[one] for one in _below(path, self._by_path) if one.endswith(".executor")), None)
        if executor is None:
            return None
        last = f"executor({max(len(executor.children) - 1, 0)})"
        own = [node for one, node in self._by_path.items() if one.startswith(f"{path}(") and node.display == last]
        pods = own or [
            node
            for node in self.nodes
            if node.display == last
            and node.state in ("PENDING", "RUNNING")
            and (node.started == executor.started or last != "executor(0)")
        ]
        return pods[-1] if pods and all(node.state == "PENDING" for node in pods) else None

    def failures(self) -> list[Failure]:
        """Returns the failures in the order in which they occurred; all attempts at a task count as one."""
        failed = sorted(
            (node for node in self._by_path.values() if node.state == "FAILED" and _is_leaf(node)),
            key=lambda node: _moment(node.ended),
        )
        found: dict[str, Failure] = {}
        for node in failed:
            driver = not _is_task(node)
            title = self.title(node.path) or ""
            if title not in found:
                message = node.message or self._message_below(node.path)
                found[title] = Failure(title, driver, message, tuple(self._pods_of(node)))
        return list(found.values())

    def _message_below(self, path: str) -> str:
        return next(
            (self._by_path[one].message for one in _below(path, self._by_path) if self._by_path[one].message), ""
        )

    def _pods_of(self, node: Node) -> list[str]:
        attempts = range(len(node.children) or 1)
        if _is_task(node):
            names = [f"{node.path}({outer}).executor({inner})" for outer in attempts for inner in range(12)]
            names += [f"{node.path}.executor"]
        else:
            names = [f"{node.path}({attempt})" for attempt in attempts]
        return [one for name in reversed(names) if (one := node_id(self.workflow, name)) in self._ids]


def _is_task(node: Node) -> bool:
    return TaskName.of_package_task(node.display) is not None


def _is_leaf(node: Node) -> bool:
    """Tells whether a node represents pods of its own, over all attempts."""
    return _is_task(node) or bool(re.fullmatch(r".*-driver|importer(-\d+)?", node.display))


def _below(path: str, paths: Iterable[str]) -> list[str]:
    return [one for one in paths if one.startswith((f"{path}(", f"{path}."))]


def _moment(when: datetime.datetime | None) -> float:
    return when.timestamp() if when else float("inf")


def _without_suffixes(display: str) -> str:
    while display != (shorter := _SUFFIX.sub("", display)):
        display = shorter
    return display


def workflow_name(ids: Iterable[str]) -> str:
    """Returns the common prefix of the ids of a workflow's nodes, which is its name."""
    return next((one.rpartition("-")[0] for one in sorted(ids) if "-" in one), "")


def node_id(workflow: str, path: str) -> str:
    """Returns the id that Argo gives to a node with this full name."""
    return workflow if path == workflow else f"{workflow}-{_fnv32a(path)}"


def _fnv32a(text: str, state: int = 0x811C9DC5) -> int:
    for byte in text.encode():
        state = ((state ^ byte) * 0x01000193) & 0xFFFFFFFF
    return state


def locate(nodes: Sequence[Node], ids: set[str]) -> dict[str, Node]:
    """Returns the nodes by full name, if the name could be determined.

    Args:
        nodes: all nodes of a workflow.
        ids: all ids in the workflow.
    """
    named = {node.path: node for node in nodes if node.path}
    if named:
        return named
    workflow = workflow_name(ids)
    displays = [node.display for node in nodes]
    suffixes = {suffix for display in displays for suffix in re.findall(r"\([^()]*\)", display)}
    steps = {f".{_without_suffixes(display)}" for display in displays if display}
    extensions: dict[str, set[str]] = {}
    at_display: dict[str, list[str]] = {}
    waiting = [(workflow, workflow, _fnv32a(workflow))]
    while waiting:
        path, display, state = waiting.pop()
        at_display.setdefault(display, []).append(path)
        extensions[path] = set()
        for more in (*suffixes, *steps):
            there = _fnv32a(more, state)
            if (one := f"{workflow}-{there}") in ids:
                extensions[path].add(one)
                waiting.append((path + more, display + more if more[0] == "(" else more[1:], there))
    located = {}
    for node in nodes:
        paths = at_display.get(node.display, [])
        if len(paths) > 1 or displays.count(node.display) > 1:
            paths = [path for path in paths if extensions[path] & set(node.children)]
        if len(paths) == 1:
            located[paths[0]] = Node(**{**node.__dict__, "path": paths[0]})
    return located


def nodes_of_run(run: kfp_api.V2beta1Run) -> list[Node]:
    """Returns the nodes in KFP's task details."""
    details = run.run_details.task_details if run.run_details else None
    # Entries without a display name come from the cache and describe tasks that ended. KFP no longer updates the nodes of large
    # workflows, so nodes that were pending before such an entry may no longer be pending.
    latest = max(
        (end.timestamp() for one in details or [] if not one.display_name and (end := _time(one.end_time))), default=0
    )
    return [
        Node(
            str(task.display_name),
            "RUNNING"
            if task.state == "PENDING" and _moment(_time(task.start_time)) < latest
            else str(task.state or ""),
            tuple(child.pod_name for child in task.child_tasks or [] if child.pod_name),
            _time(task.start_time),
            _time(task.end_time),
            task.error.message if task.error and task.error.message else "",
        )
        for task in details or []
        if task.display_name
    ]


def _time(when: Any) -> datetime.datetime | None:
    return when if isinstance(when, datetime.datetime) and when.year > 1 else None


def stopped_at(run: kfp_api.V2beta1Run) -> datetime.datetime | None:
    """Returns when a stop of the run was requested, unless it was retried since. KFP reports stopped runs as FAILED."""
    states = [(one.state, one.update_time) for one in run.state_history or []]
    for state, when in reversed(states):
        if state in ("CANCELING", "CANCELED"):
            return _time(when)
        if state in ("RUNNING", "PENDING"):
            return None
    return None
