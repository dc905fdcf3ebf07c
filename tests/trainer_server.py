"""A small server that speaks the Kubernetes API as the launcher of TrainJobs needs it, and plays a Trainer, with faults.

A job goes through frames: its status and its pods, as a real Trainer's were recorded. Each look at the job shows the next
frame.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, urlsplit

import yaml

from tests.served import Served

RECORDINGS = Path(__file__).parent / "recordings"
JOBS = re.compile(r"/apis/trainer\.kubeflow\.org/v1alpha1/namespaces/ns/trainjobs(?:/([^/]+))?")
PODS = re.compile(r"/api/v1/namespaces/ns/pods(?:/([^/]+?))?(/log)?")


def recorded(name: str) -> Any:
    """Returns what a real cluster answered."""
    return json.loads((RECORDINGS / f"{name}.json").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Frame:
    """What a cluster shows of a job at one time.

    Attributes:
        status: of the TrainJob.
        pods: name, status and the number of the node of each.
    """

    status: dict[str, Any] = field(default_factory=dict)
    pods: list[dict[str, Any]] = field(default_factory=list)


def pod(name: str, node: int, **status: Any) -> dict[str, Any]:
    """Returns a pod of a TrainJob, with the annotations of a recorded one."""
    meta = recorded("trainjob-pod")["metadata"]
    annotations = meta["annotations"] | {"batch.kubernetes.io/job-completion-index": str(node)}
    return {"metadata": {"name": name, "annotations": annotations}, "status": status}


def running(attempt: str = "a") -> list[dict[str, Any]]:
    """Returns two pods that run."""
    return [pod(f"{attempt}-{node}", node, phase="Running") for node in (0, 1)]


def refused_pods() -> list[dict[str, Any]]:
    """Returns the recorded pods that ended with exit status 2."""
    return [pod(one["name"], node, **one["status"]) for node, one in enumerate(recorded("trainjob-refused-pods"))]


def as_recorded(name: str, pods: list[dict[str, Any]] | None = None) -> Frame:
    """Returns the recorded status of a TrainJob as a frame."""
    return Frame(recorded(f"trainjob-{name}")["status"], pods or [])


@dataclass
class Fault:
    """An answer in place of the right one.

    Attributes:
        method: HTTP method.
        path: pattern of the path.
        status: status of the answer; 0 closes the connection without one.
        times: how often.
        after: whether the request is carried out first, so that only its answer is lost.
        message: Kubernetes' message.
        headers: of the answer.
    """

    method: str
    path: str
    status: int = 0
    times: int = 1
    after: bool = False
    message: str = "a fault"
    headers: dict[str, str] = field(default_factory=dict)


class TrainerServer(Served):
    """The server; use it as a context manager.

    Attributes:
        frames: what is shown, one for each look at the job; the last one stays.
        on_create: called with each new job.
        jobs: the jobs that exist, by name.
        created, deleted: names, in order; `requests`: method and path of each request.
        faults: answers in place of the right ones.
        logs: of pods, by their names, lines with time stamps.
        keeps: looks for which a deleted job still exists.
        drops_patches: an older Trainer, whose schema has no `runtimePatches`.
    """

    def __init__(self, *frames: Frame, on_create: Callable[[dict[str, Any]], None] | None = None) -> None:
        self.frames, self.on_create = list(frames), on_create
        self.jobs: dict[str, dict[str, Any]] = {}
        self.created: list[str] = []
        self.deleted: list[str] = []
        self.requests: list[tuple[str, str]] = []
        self.queries: list[dict[str, str]] = []
        self.faults: list[Fault] = []
        self.logs: dict[str, list[str]] = {}
        self.keeps = 0
        self.drops_patches = False
        self._now = Frame()
        super().__init__(_Handler, "cluster")

    def write_kubeconfig(self, path: Path) -> None:
        """Writes a file that names this cluster."""
        path.write_text(yaml.safe_dump({
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "clusters": [{"name": "test", "cluster": {"server": self.url}}], "users": [{"name": "me", "user": {"token": "t"}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "me"}}],
        }))  # fmt: skip

    def answer(self, method: str, path: str, query: dict[str, str], body: Any) -> tuple[int, Any]:
        """Returns status and body for a request."""
        if found := JOBS.fullmatch(path):
            return self._jobs(method, found[1], query, body)
        if found := PODS.fullmatch(path):
            name, log = found.groups()
            if log:
                return (200, self._log(name, query)) if name in self.logs else (404, "no such pod")
            if name:
                owner = {
                    "apiVersion": "argoproj.io/v1alpha1",
                    "kind": "Workflow",
                    "name": "w",
                    "uid": "u",
                    "controller": True,
                }
                return 200, {"metadata": {"name": name, "ownerReferences": [owner]}}
            jobset = query["labelSelector"].removeprefix("jobset.sigs.k8s.io/jobset-name=")
            return 200, {"items": self._now.pods if jobset in self.jobs else []}
        return 404, "not found"

    def _jobs(self, method: str, name: str | None, query: dict[str, str], body: Any) -> tuple[int, Any]:
        if method == "POST":
            name = str(body["metadata"]["name"])
            if name in self.jobs:
                return 409, f'trainjobs.trainer.kubeflow.org "{name}" already exists'
            if self.drops_patches:
                body["spec"].pop("runtimePatches")
            self.jobs[name] = body
            self.created.append(name)
            if self.on_create:
                self.on_create(body)
            return 201, body
        if method == "DELETE":
            if name not in self.jobs:
                return 404, "not found"
            self.deleted.append(name)
            self.queries.append(query)
            if self.keeps:
                self.jobs[name]["metadata"]["deletionTimestamp"] = "2026-11-26T12:00:00Z"
                return 200, self.jobs[name]
            del self.jobs[name]
            return 200, {}
        if name is None:
            label, _, value = query["labelSelector"].partition("=")
            return 200, {"items": [one for one in self.jobs.values() if one["metadata"]["labels"].get(label) == value]}
        if name not in self.jobs:
            return 404, "not found"
        job = self.jobs[name]
        if "deletionTimestamp" in job["metadata"]:
            self.keeps -= 1
            if self.keeps <= 0:
                del self.jobs[name]
        elif self.frames:
            self._now = self.frames.pop(0)
        return 200, {**job, "status": self._now.status}

    def _log(self, name: str, query: dict[str, str]) -> str:
        lines = self.logs[name][-int(query.get("tailLines", 0)) :]
        return "\n".join(line if "timestamps" in query else line.partition(" ")[2] for line in lines)


class _Handler(BaseHTTPRequestHandler):
    cluster: ClassVar[TrainerServer]
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def _handle(self) -> None:
        address = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(address.query).items()}
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else {}
        self.cluster.requests.append((self.command, address.path))
        fault = next(
            (one for one in self.cluster.faults
             if one.times and one.method == self.command and re.search(one.path, address.path)), None
        )  # fmt: skip
        if fault:
            fault.times -= 1
        if fault is None or fault.after:
            status, answer = self.cluster.answer(self.command, address.path, query, body)
        if fault:
            status, answer = fault.status, fault.message
        if not status:
            self.close_connection = True
            return
        if status >= 400:
            answer = {"kind": "Status", "status": "Failure", "message": answer, "code": status}
        content = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
        self.send_response(status)
        for name, value in (fault.headers if fault else {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_DELETE = _handle

    def log_message(self, *_: object) -> None:
        """Says nothing."""
