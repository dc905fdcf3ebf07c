"""A small HTTP server that speaks the paths of the Kubernetes API that mixtune reads, with the client's own models."""

from __future__ import annotations

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import yaml
from kubernetes import client

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
    """A node with 16 CPUs and 64 GiB, if nothing else is said; `gpu` are NVIDIA's."""
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


class KubernetesServer:
    """The server; use it as a context manager.

    Attributes:
        nodes, secrets, claims, queues: what the cluster has; all but nodes by (namespace, name).
        forbidden: pattern of paths that are answered with 403.
        broken: pattern of paths that are answered with 503.
    """

    def __init__(self) -> None:
        self.nodes: list[client.V1Node] = []
        self.secrets: dict[tuple[str, str], client.V1Secret] = {}
        self.claims: dict[tuple[str, str], client.V1PersistentVolumeClaim] = {}
        self.queues: set[tuple[str, str]] = set()
        self.forbidden: str | None = None
        self.broken: str | None = None
        self.token = TOKEN
        handler = type("Handler", (_Handler,), {"cluster": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> KubernetesServer:
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def write_kubeconfig(self, path: Path) -> None:
        """A file that names this cluster."""
        path.write_text(yaml.safe_dump({
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "clusters": [{"name": "test", "cluster": {"server": self.url}}],
            "users": [{"name": "me", "user": {"token": TOKEN}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "me"}}],
        }))  # fmt: skip

    def answer(self, path: str, headers: Any) -> tuple[int, Any]:
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
        queue = r"/apis/kueue\.x-k8s\.io/v1beta1/namespaces/([^/]+)/localqueues/([^/]+)"
        if (found := re.fullmatch(queue, path)) and found.groups() in self.queues:
            return 200, {"kind": "LocalQueue", "metadata": {"name": found.group(2)}}
        return 404, "not found"


class _Handler(BaseHTTPRequestHandler):
    cluster: ClassVar[KubernetesServer]

    def do_GET(self) -> None:
        status, body = self.cluster.answer(self.path.split("?")[0], self.headers)
        if status != 200:
            body = client.V1Status(api_version="v1", kind="Status", status="Failure", message=body, code=status)
        content = json.dumps(_serialise(body)).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Says nothing."""
