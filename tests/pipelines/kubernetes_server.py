"""A small HTTP server that speaks the paths of the Kubernetes API that mixtune reads, with the client's own models."""

from __future__ import annotations

import json
import re
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, urlsplit

import yaml
from kubernetes import client

from tests.served import Served

TOKEN = "a token"
_serialise: Any = client.ApiClient(client.Configuration(host="http://nowhere")).sanitize_for_serialization


def node(
    name: str,
    labels: dict[str, str] | None = None,
    taints: list[client.V1Taint] | None = None,
    ready: bool = True,
    cordoned: bool = False,
    **resources: str,
) -> client.V1Node:
    """A node with 16 CPUs and 64 GiB by default; `gpu` counts NVIDIA's. Kubernetes taints nodes by their condition."""
    taints = list(taints or [])
    if not ready:
        taints.append(client.V1Taint(key="node.kubernetes.io/not-ready", effect="NoExecute"))
    if cordoned:
        taints.append(client.V1Taint(key="node.kubernetes.io/unschedulable", effect="NoSchedule"))
    allocatable = {"cpu": "16", "memory": "64Gi"} | resources
    if "gpu" in allocatable:
        allocatable["nvidia.com/gpu"] = allocatable.pop("gpu")
    return client.V1Node(
        metadata=client.V1ObjectMeta(name=name, labels=labels),
        spec=client.V1NodeSpec(taints=taints, unschedulable=cordoned or None),
        status=client.V1NodeStatus(
            allocatable=allocatable,
            conditions=[client.V1NodeCondition(type="Ready", status="True" if ready else "False")],
        ),
    )


def local_queue(message: str = "Can submit new workloads to localQueue", active: str | None = "True") -> dict[str, Any]:
    """A queue of Kueue's; with `active` None Kueue has not looked at it yet."""
    conditions = [] if active is None else [{"type": "Active", "status": active, "message": message}]
    return {"kind": "LocalQueue", "status": {"conditions": conditions}}


class KubernetesServer(Served):
    """The server; use it as a context manager.

    Attributes:
        nodes, secrets, claims, queues: what the cluster has; all but nodes by (namespace, name).
        pods, events, workflows, workloads: of whatever namespace is asked for, as JSON.
        logs: of pods' main containers, by the pods' names.
        has_trainer, runtimes: whether Kubeflow Trainer is installed, and its TrainingRuntimes by (namespace, name).
        kueue: versions of Kueue's API, the preferred one first.
        forbidden: pattern of paths that are answered with 403.
        broken: pattern of paths that are answered with 503.
    """

    def __init__(self) -> None:
        self.nodes: list[client.V1Node] = []
        self.secrets: dict[tuple[str, str], client.V1Secret] = {}
        self.claims: dict[tuple[str, str], client.V1PersistentVolumeClaim] = {}
        self.queues: dict[tuple[str, str], dict[str, Any]] = {}
        self.pods: list[dict[str, Any]] = []
        self.logs: dict[str, str] = {}
        self.events: list[dict[str, Any]] = []
        self.workflows: list[dict[str, Any]] = []
        self.workloads: list[dict[str, Any]] = []
        self.has_trainer = False
        self.runtimes: set[tuple[str, ...]] = set()
        self.kueue: tuple[str, ...] = ("v1beta2", "v1beta1")
        self.forbidden: str | None = None
        self.broken: str | None = None
        self.token = TOKEN
        super().__init__(_Handler, "cluster")

    def write_kubeconfig(self, path: Path) -> None:
        """A file that names this cluster."""
        path.write_text(yaml.safe_dump({
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "clusters": [{"name": "test", "cluster": {"server": self.url}}],
            "users": [{"name": "me", "user": {"token": TOKEN}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "me"}}],
        }))  # fmt: skip

    def answer(self, path: str, query: dict[str, str], headers: Any) -> tuple[int, Any]:
        """Status and body for a path."""
        if headers.get("authorization") != f"Bearer {self.token}":
            return 401, "Unauthorized"
        if self.forbidden and re.search(self.forbidden, path):
            return 403, "forbidden: User cannot do this"
        if self.broken and re.search(self.broken, path):
            return 503, "the server is currently unable to handle the request"
        if path == "/api/v1/nodes":
            return 200, client.V1NodeList(items=self.nodes)
        kinds: dict[str, Any] = {"secrets": self.secrets, "persistentvolumeclaims": self.claims}
        if found := re.fullmatch(r"/api/v1/namespaces/([^/]+)/(secrets|persistentvolumeclaims)/([^/]+)", path):
            one = kinds[found.group(2)].get((found.group(1), found.group(3)))
            return (200, one) if one is not None else (404, "not found")
        if path == "/apis/":
            versions = [{"groupVersion": f"kueue.x-k8s.io/{one}", "version": one} for one in self.kueue]
            groups = [{"name": "kueue.x-k8s.io", "versions": versions, "preferredVersion": versions[0]}]
            if self.has_trainer:
                version = {"groupVersion": "trainer.kubeflow.org/v1alpha1", "version": "v1alpha1"}
                groups.append({"name": "trainer.kubeflow.org", "versions": [version], "preferredVersion": version})
            return 200, {"kind": "APIGroupList", "groups": groups}
        if path.startswith("/apis/trainer.kubeflow.org/v1alpha1/namespaces/") and self.has_trainer:
            return (200, {}) if tuple(path.split("/")[5::2]) in self.runtimes else (404, "not found")
        if found := re.fullmatch(r"/apis/kueue\.x-k8s\.io/([^/]+)/namespaces/([^/]+)/localqueues/([^/]+)", path):
            one = self.queues.get((found.group(2), found.group(3))) if found.group(1) in self.kueue else None
            return (200, one) if one is not None else (404, "not found")
        if found := re.fullmatch(r"/api/v1/namespaces/[^/]+/pods/([^/]+)/log", path):
            return (200, self.logs[found.group(1)]) if found.group(1) in self.logs else (404, "not found")
        lists = {
            "/api/v1/namespaces/[^/]+/pods": self.pods,
            "/api/v1/namespaces/[^/]+/events": self.events,
            "/apis/argoproj.io/v1alpha1/namespaces/[^/]+/workflows": self.workflows,
            f"/apis/kueue.x-k8s.io/({'|'.join(self.kueue)})/namespaces/[^/]+/workloads": self.workloads,
        }
        items = next((items for pattern, items in lists.items() if re.fullmatch(pattern, path)), None)
        if items is None:
            return 404, "not found"
        return 200, {"items": [one for one in items if _selected(one, query)]}


def _selected(item: dict[str, Any], query: dict[str, str]) -> bool:
    labels, fields = query.get("labelSelector", ""), query.get("fieldSelector", "")
    for one in filter(None, labels.split(",")):
        name, value = one.split("=")
        if (item["metadata"].get("labels") or {}).get(name) != value:
            return False
    for one in filter(None, fields.split(",")):
        path, unequal, value = re.fullmatch(r"([^!=]+)(!?)=(.*)", one).groups()  # type: ignore[union-attr]
        found: Any = item
        for part in path.split("."):
            found = found[part]
        if (found == value) == bool(unequal):
            return False
    return True


class _Handler(BaseHTTPRequestHandler):
    cluster: ClassVar[KubernetesServer]

    def do_GET(self) -> None:
        status, body = self._answer()
        if status != 200:
            body = client.V1Status(api_version="v1", kind="Status", status="Failure", message=body, code=status)
        content = (body if isinstance(body, str) else json.dumps(_serialise(body))).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _answer(self) -> tuple[int, Any]:
        address = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(address.query).items()}
        return self.cluster.answer(address.path, query, self.headers)

    def log_message(self, *_: object) -> None:
        """Says nothing."""
