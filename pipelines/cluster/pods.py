"""Determines why tasks of a run do not start or were killed, from the workflow and the pods in Kubernetes."""

from __future__ import annotations

import base64
import datetime
import gzip
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import urllib3

from mixtune.components.shared.errors import UnreachableError, first_line
from mixtune.components.shared.nodes.connection import condition_of, connect

from .kubernetes_api import kueue_version
from .slow import Say
from .tasks import PHASES, Node

RUN_LABEL = "pipeline/runid"
NODE_NAME = "workflows.argoproj.io/node-name"
REST_SECONDS = 60.0
TIMEOUT = (3.0, 10.0)
# Mounting a volume or pulling an image takes time. Events are only requested after this long.
CREATING_SECONDS = 60.0
_IMAGE = frozenset({"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull"})
_CONTAINER = frozenset({"CreateContainerConfigError", "CreateContainerError", "RunContainerError"})
LOG_LINES = 100
T = TypeVar("T")


@dataclass(frozen=True)
class PodState:
    """A pod that is pending or was killed.

    Attributes:
        path: full name of its node in the workflow.
        reason: the reason, as a sentence; empty if it is not known yet.
        about: identifies the reason; the reason is shown again when this changes.
        since: time since when the pod is pending.
        killed: whether it was killed; otherwise it is pending.
    """

    path: str
    reason: str
    about: str
    since: datetime.datetime | None = None
    killed: bool = False


class RunOnCluster:
    """The workflow and pods of a run, as far as this user can access them.

    Args:
        namespace: namespace of the run's pods.
        run_id: id of the KFP run.
        say: shows a line.
    """

    def __init__(self, namespace: str, run_id: str, say: Say) -> None:
        self._namespace, self._run_id, self._say = namespace, run_id, say
        self._api: Any = None
        self._rest_until = 0.0
        self._away = False
        self.readable = False
        """Whether the last request for the pods succeeded."""

    @property
    def command(self) -> str:
        """Returns a command that shows the pods, for users without access to the Kubernetes API from here."""
        return f"kubectl describe pods --namespace {self._namespace} --selector {RUN_LABEL}={self._run_id}"

    def nodes(self) -> list[Node]:
        """Returns the nodes of the workflow; an empty list if it cannot be read."""
        found = self._workflows()
        return nodes_of_workflow(found[0]) if found else []

    def pods(self) -> list[PodState]:
        """Returns the pods that are pending or were killed."""
        pods = self._list_pods()
        self.readable = pods is not None
        workloads = None
        states = []
        for pod in pods or []:
            if pod.status.phase == "Pending":
                if pod.spec and pod.spec.scheduling_gates and workloads is None:
                    workloads = self._workloads()
                states.append(self._waiting(pod, workloads or []))
            elif reason := _killed(pod):
                states.append(PodState(_path(pod), reason, pod.metadata.name, killed=True))
        return states

    def pod_of(self, node_ids: tuple[str, ...]) -> Any:
        """Returns the pod of the first of these nodes whose pod exists; None if there is none, or if pods cannot be read."""
        pods = {pod.metadata.name.rpartition("-")[2]: pod for pod in self._list_pods() or []}
        return next((pods[one] for node in node_ids if (one := node.rpartition("-")[2]) in pods), None)

    def log_of(self, pod: str) -> str:
        """Returns the end of the log of a pod's main container; empty if it cannot be read."""
        from kubernetes import client

        found = self._ask(
            lambda api: client.CoreV1Api(api).read_namespaced_pod_log(
                pod, self._namespace, container="main", tail_lines=LOG_LINES, _request_timeout=TIMEOUT
            ),
            str,
        )
        return found or ""

    def _list_pods(self) -> list[Any] | None:
        from kubernetes import client

        of_run = {"label_selector": f"{RUN_LABEL}={self._run_id}", "field_selector": "status.phase!=Succeeded"}
        return self._ask(
            lambda api: client.CoreV1Api(api).list_namespaced_pod(self._namespace, _request_timeout=TIMEOUT, **of_run),
            lambda found: list(found.items),
        )

    def _workflows(self) -> list[dict[str, Any]]:
        from kubernetes import client

        of_run = f"{RUN_LABEL}={self._run_id}"
        found = self._ask(
            lambda api: client.CustomObjectsApi(api).list_namespaced_custom_object(
                "argoproj.io", "v1alpha1", self._namespace, "workflows", label_selector=of_run, _request_timeout=TIMEOUT
            ),
            lambda found: list(found.get("items") or []),
        )
        return found or []

    def _workloads(self) -> list[dict[str, Any]]:
        from kubernetes import client

        found = self._ask(
            lambda api: client.CustomObjectsApi(api).list_namespaced_custom_object(
                "kueue.x-k8s.io", kueue_version(api), self._namespace, "workloads", _request_timeout=TIMEOUT
            ),
            lambda found: list(found.get("items") or []),
        )
        return found or []

    def _ask(self, question: Callable[[Any], Any], answer: Callable[[Any], T]) -> T | None:
        from kubernetes.client import ApiException

        if time.monotonic() < self._rest_until:
            return None
        try:
            if self._api is None:
                self._api = connect()
            found = answer(question(self._api))
        except UnreachableError:
            self._rest_until = float("inf")  # no cluster is configured
        except ApiException as error:
            if error.status not in (403, 404):
                self._rest(f"status {error.status}")
        except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
            self._rest(first_line(error))
        else:
            self._away = False
            return found
        return None

    def _rest(self, why: str) -> None:
        self._rest_until = time.monotonic() + REST_SECONDS
        if not self._away:
            self._say(f"the Kubernetes API does not answer ({why}), so the reasons of pending tasks are not shown")
        self._away = True

    def _waiting(self, pod: Any, workloads: list[dict[str, Any]]) -> PodState:
        state = partial(PodState, _path(pod), since=pod.metadata.creation_timestamp)
        if pod.spec and pod.spec.scheduling_gates:
            queue = (pod.metadata.labels or {}).get("kueue.x-k8s.io/queue-name", "")
            said = _queue_message(pod, workloads)
            return state(f"waits in the Kueue queue {queue}" + (f": {said}" if said else ""), about=f"queue {said}")
        for one in pod.status.conditions or []:
            if one.type == "PodScheduled" and one.status == "False":
                said = one.message or one.reason or ""
                return state(f"its pod cannot be scheduled: {said}".rstrip(": "), about=said)
        for status in (*(pod.status.init_container_statuses or []), *(pod.status.container_statuses or [])):
            waiting = status.state.waiting if status.state else None
            if waiting and waiting.reason in _IMAGE:
                said = f": {waiting.message}" if waiting.message else ""
                # The message changes with every retry.
                return state(f"its image {status.image} cannot be pulled{said}", about=f"image {status.image}")
            if waiting and waiting.reason in _CONTAINER:
                said = waiting.message or waiting.reason
                return state(f"its container cannot be started: {said}", about=f"container {said}")
        return self._creating(pod, state)

    def _creating(self, pod: Any, state: Callable[..., PodState]) -> PodState:
        now = datetime.datetime.now(datetime.UTC)
        created = pod.metadata.creation_timestamp
        if created is None or (now - created).total_seconds() < CREATING_SECONDS:
            return state("", about="")
        from kubernetes import client

        of_pod = f"involvedObject.name={pod.metadata.name},type=Warning"
        events = self._ask(
            lambda api: client.CoreV1Api(api).list_namespaced_event(
                self._namespace, field_selector=of_pod, _request_timeout=TIMEOUT
            ),
            lambda found: list(found.items),
        )
        last = events[-1] if events else None
        return state(f"{last.reason}: {last.message}", about=last.reason) if last else state("", about="")


def nodes_of_workflow(workflow: dict[str, Any]) -> list[Node]:
    """Returns the nodes in a workflow's status, which Argo compresses if it is large."""
    status = workflow.get("status") or {}
    nodes = status.get("nodes") or {}
    if packed := status.get("compressedNodes"):
        nodes = json.loads(gzip.decompress(base64.b64decode(packed)))
    return [
        Node(
            str(node.get("displayName") or ""),
            PHASES.get(str(node.get("phase")), ""),
            tuple(node.get("children") or ()),
            _time(node.get("startedAt")),
            _time(node.get("finishedAt")),
            str(node.get("message") or ""),
            str(node.get("name") or ""),
        )
        for node in nodes.values()
    ]


def _time(text: str | None) -> datetime.datetime | None:
    return datetime.datetime.fromisoformat(text) if text else None


def _path(pod: Any) -> str:
    return str((pod.metadata.annotations or {}).get(NODE_NAME, ""))


def last_message(pod: Any) -> str:
    """Returns why a failed pod was killed, or the termination message of its container."""
    if killed := _killed(pod):
        return killed
    for status in pod.status.container_statuses or []:
        ended = status.state.terminated if status.state else None
        if ended and ended.exit_code and ended.message:
            return str(ended.message).strip()
    return ""


def _killed(pod: Any) -> str:
    """Returns why Kubernetes killed a pod; empty if its program ended by itself."""
    for status in pod.status.container_statuses or []:
        ended = status.state.terminated if status.state else None
        if ended and ended.reason == "OOMKilled":
            limit = _memory_limit(pod, status.name)
            return f"was killed because it ran out of memory{limit}; raise placement.memory or placement.gpu_memory"
    if pod.status.phase == "Failed" and pod.status.reason:
        return f"was ended by Kubernetes: {pod.status.reason}" + (
            f" ({pod.status.message})" if pod.status.message else ""
        )
    return ""


def _memory_limit(pod: Any, container: str) -> str:
    for one in (pod.spec.containers if pod.spec else None) or []:
        if one.name == container and one.resources and (limit := (one.resources.limits or {}).get("memory")):
            return f" (limit {limit})"
    return ""


def _queue_message(pod: Any, workloads: list[dict[str, Any]]) -> str:
    for one in workloads:
        owned = (one["metadata"].get("labels") or {}).get("kueue.x-k8s.io/job-uid")
        named = one["metadata"]["name"].startswith(f"pod-{pod.metadata.name}-")
        if named or (owned and owned == pod.metadata.uid):
            for kind in ("QuotaReserved", "Admitted"):
                found = condition_of(one, kind)
                if found and found.get("status") != "True" and found.get("message"):
                    return str(found["message"])
    return ""
