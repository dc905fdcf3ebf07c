"""Stands in for Kubeflow's model registry, which is a server written in Go: its REST interface, checked by its own models."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from mr_openapi.models import ModelArtifact, ModelVersionCreate, RegisteredModelCreate

ROOT = "/api/model_registry/v1/"
CREATED: dict[str, Any] = {"registered_models": RegisteredModelCreate, "model_versions": ModelVersionCreate}


class Registry:
    """What the server holds.

    Attributes:
        held: objects by kind.
        status: status of every answer, if it is not None.
        tokens: what the requests gave as authorization.
        fails_at: kind of object that cannot be created.
    """

    def __init__(self) -> None:
        self.held: dict[str, list[dict[str, Any]]] = {"registered_models": [], "model_versions": [], "artifacts": []}
        self.status: int | None = None
        self.fails_at = ""
        self.tokens: list[str | None] = []

    def find(self, path: str, query: dict[str, list[str]]) -> dict[str, Any] | None:
        parts = path.removeprefix(ROOT).split("/")
        if len(parts) == 3:
            items = [one for one in self.held["artifacts"] if one["modelVersionId"] == parts[1]]
            return {"items": items, "size": len(items), "pageSize": 100, "nextPageToken": ""}
        for one in self.held[f"{parts[0]}s"]:
            parent = query.get("parentResourceId", [one.get("registeredModelId")])[0]
            if one["name"] == query["name"][0] and one.get("registeredModelId") == parent:
                return one
        return None

    def make(self, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
        parts = path.removeprefix(ROOT).split("/")
        kind = parts[-1]
        if kind == self.fails_at:
            return None
        if kind == "artifacts":
            ModelArtifact.model_validate(body)
            body = {**body, "modelVersionId": parts[1]}
        else:
            CREATED[kind].model_validate(body)
        made = {**body, "id": str(len(self.held[kind]) + 1)}
        self.held[kind].append(made)
        return made


@contextmanager
def kubeflow_registry() -> Iterator[tuple[str, Registry]]:
    """Yields the address of a registry, and what it holds."""
    registry = Registry()

    class Handler(BaseHTTPRequestHandler):
        def _answer(self, found: dict[str, Any] | None, good: int, missing: int) -> None:
            registry.tokens.append(self.headers.get("Authorization"))
            status = registry.status or (good if found is not None else missing)
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(found if status == good else {"code": "", "message": "no"}).encode())

        def do_GET(self) -> None:
            url = urlsplit(self.path)
            self._answer(registry.find(url.path, parse_qs(url.query)), 200, 404)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self._answer(registry.make(urlsplit(self.path).path, body), 201, 500)

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", registry
    finally:
        server.shutdown()
        server.server_close()
