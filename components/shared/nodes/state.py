"""What a TrainJob and its pods say about a training. A TrainJob has conditions at its end and while it is suspended only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from ..outcome import EXIT_STATUS
from .connection import condition_of

RUN_LABEL = "mixtune/run"
CONTAINER = "node"
"""Name that Kubeflow Trainer expects of the training's container and of its job."""
CRASHES = 3
"""Starts of a container in its pod after which the launcher gives up. With our TrainingRuntime a container starts once."""
_INDEX = "batch.kubernetes.io/job-completion-index"
Pod = dict[str, Any]


@dataclass(frozen=True)
class JobState:
    """The state of a TrainJob.

    Attributes:
        kind: `waiting` until all nodes run, `running`, or how it ended.
        sentence: the same for people.
    """

    kind: Literal["waiting", "running", "complete", "failed"]
    sentence: str

    @property
    def ended(self) -> bool:
        """Tells whether the TrainJob has ended."""
        return self.kind in ("complete", "failed")


@dataclass(frozen=True)
class NodeFailure:
    """A pod whose container failed, or which was removed from its node.

    Attributes:
        id: identifies the failure.
        pod: name of the pod.
        node: its number in the training.
        status: exit status of the container; None if it has none.
        reason: Kubernetes' reason, such as `Error`, `OOMKilled` or `Evicted`.
        message: termination message of the container, or Kubernetes' message.
        at: time in Kubernetes' format.
    """

    id: str
    pod: str
    node: int
    status: int | None
    reason: str
    message: str
    at: str

    def __str__(self) -> str:
        """Returns a sentence without an end."""
        how = "was removed" if self.status is None else f"ended with exit status {self.status}"
        if self.reason == "OOMKilled":
            return f"node {self.node} ran out of memory (OOMKilled)"
        return f"node {self.node} {how}{f' ({self.reason})' if self.reason and self.reason != 'Error' else ''}"


def node_of(pod: Pod) -> int:
    """Returns the number of a pod's node in the training."""
    return int((pod["metadata"].get("annotations") or {}).get(_INDEX, 0))


def state_of(job: dict[str, Any], pods: list[Pod]) -> JobState:
    """Returns the state of a TrainJob, from its conditions and its pods."""
    for kind, condition in (("complete", "Complete"), ("failed", "Failed"), ("waiting", "Suspended")):
        found = condition_of(job, condition)
        if found is not None and found.get("status") == "True":
            why = f"{found.get('reason')}: {found.get('message')}"
            text = "is suspended; a queue admits it when there is room" if kind == "waiting" else why
            return JobState(kind, text)  # type: ignore[arg-type]
    failures = failures_of(pods)
    # A TrainingRuntime without our policies starts a container in its pod again and again, also after a refusal.
    if refused := next((one for one in failures if one.status == EXIT_STATUS["refused"]), None):
        return JobState("failed", f"{refused}")
    restarts = max((container.get("restartCount", 0) for container in _containers(pods)), default=0)
    if failures and restarts >= CRASHES:
        return JobState("failed", f"{failures[0]}, {restarts} times")
    nodes = int((job["spec"].get("trainer") or {}).get("numNodes") or 1)
    running = sum((pod.get("status") or {}).get("phase") in ("Running", "Succeeded") for pod in pods)
    if running >= nodes:
        return JobState("running", f"{running} of {nodes} nodes run")
    reasons = Counter(filter(None, map(_why_pending, pods)))
    why = "; ".join(f"{count} {'pod' if count == 1 else 'pods'}: {reason}" for reason, count in sorted(reasons.items()))
    return JobState("waiting", f"{running} of {nodes} nodes run{f' ({why})' if why else ''}")


def failures_of(pods: list[Pod]) -> list[NodeFailure]:
    """Returns the failures of pods, the earliest first: the others often follow from it."""
    return sorted((failure for pod in pods if (failure := _failure(pod))), key=lambda one: (one.at, one.node))


def _failure(pod: Pod) -> NodeFailure | None:
    status, meta = pod.get("status") or {}, pod["metadata"]
    name = meta["name"]
    for container in _containers([pod]):
        for state in (container.get("state") or {}, container.get("lastState") or {}):
            ended = state.get("terminated")
            if ended and ended.get("exitCode"):
                return NodeFailure(
                    id=f"{name} {ended.get('finishedAt')}",
                    pod=name,
                    node=node_of(pod),
                    status=int(ended["exitCode"]),
                    reason=str(ended.get("reason") or ""),
                    message=str(ended.get("message") or "").strip(),
                    at=str(ended.get("finishedAt") or ""),
                )
    removed = condition_of(pod, "DisruptionTarget") or {}
    if status.get("phase") != "Failed" and removed.get("status") != "True":
        return None
    return NodeFailure(
        id=f"{name} removed",
        pod=name,
        node=node_of(pod),
        status=None,
        reason=str(status.get("reason") or removed.get("reason") or ""),
        message=str(status.get("message") or removed.get("message") or "").strip(),
        at=str(removed.get("lastTransitionTime") or ""),
    )


def _containers(pods: list[Pod]) -> Iterator[dict[str, Any]]:
    for pod in pods:
        yield from (pod.get("status") or {}).get("containerStatuses") or []


def _why_pending(pod: Pod) -> str:
    if (pod.get("status") or {}).get("phase") not in (None, "Pending"):
        return ""
    scheduled = condition_of(pod, "PodScheduled") or {}
    if scheduled.get("status") == "False":
        return str(scheduled.get("message") or scheduled.get("reason") or "")
    for container in _containers([pod]):
        waiting = (container.get("state") or {}).get("waiting") or {}
        if waiting:
            return ": ".join(filter(None, [waiting.get("reason"), waiting.get("message")]))
    return ""
