"""A real MLflow server that a test can kill and start again on the same port and the same store."""

from __future__ import annotations

import contextlib
import functools
import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import psutil

from .stores import new_store


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


FORKS = """
import json, os, signal, sys, threading
import uvicorn
import mlflow.store.model_registry.sqlalchemy_store
import mlflow.store.tracking.sqlalchemy_store
from mlflow.server import constants
from mlflow.server.fastapi_app import app

signal.signal(signal.SIGCHLD, signal.SIG_IGN)
assert threading.active_count() == 1, threading.enumerate()
for line in sys.stdin:
    order = json.loads(line)
    process = os.fork()
    if process == 0:
        os.setsid()
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(log, stream)
        # What `mlflow server` passes on to its workers.
        os.environ[constants.BACKEND_STORE_URI_ENV_VAR] = os.environ[constants.REGISTRY_STORE_URI_ENV_VAR] = order["store"]
        os.environ[constants.ARTIFACT_ROOT_ENV_VAR] = "mlflow-artifacts:/"
        os.environ[constants.SERVE_ARTIFACTS_ENV_VAR] = "true"
        os.environ[constants.ARTIFACTS_DESTINATION_ENV_VAR] = order["artifacts"]
        uvicorn.run(app, host="127.0.0.1", port=order["port"])
        os._exit(0)
    print(process, flush=True)
"""
"""A process that has imported MLflow's server, which takes seconds, and forks for each server."""


@functools.cache
def forks() -> subprocess.Popen[str]:
    """Starts the process that servers are forked from. It ends with this one."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "MIXTUNE_"))}
    environment |= {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    return subprocess.Popen(
        [sys.executable, "-c", FORKS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )


class MlflowServer:
    """MLflow's own server with one worker on a SQLite store, which serves the artifacts too.

    Args:
        folder: where the store and the log are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: int | None = None

    def start(self) -> None:
        """Starts it and waits until it answers."""
        self.folder.mkdir(parents=True, exist_ok=True)
        store = new_store(self.folder / "server.db")
        log = self.folder / "server.log"
        order = {"log": str(log), "port": self.port, "store": store, "artifacts": str(self.folder / "artifacts")}
        maker = forks()
        assert maker.stdin
        assert maker.stdout
        maker.stdin.write(json.dumps(order) + "\n")
        maker.stdin.flush()
        self._process = int(maker.stdout.readline())
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            assert psutil.pid_exists(self._process), log.read_text()
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=2):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.05)
        raise AssertionError("the MLflow server did not start: " + log.read_text())

    @property
    def runs(self) -> bool:
        """Whether it was started and not killed."""
        return self._process is not None

    def signal(self, number: int) -> None:
        """A signal to it and all its processes, such as SIGSTOP, after which it takes requests and answers none."""
        assert self._process is not None
        os.killpg(self._process, number)

    def kill(self) -> None:
        """SIGKILL to it and all its processes."""
        if self._process is not None:
            os.killpg(self._process, signal.SIGKILL)
            while psutil.pid_exists(self._process):
                time.sleep(0.01)
            self._process = None


class RejectingProxy(http.server.BaseHTTPRequestHandler):
    """Answers 500 to text that is not ASCII, as a server does whose database cannot store it, and passes the rest on."""

    upstream: ClassVar[str]
    words: ClassVar[tuple[str, ...]] = ()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        # Files do not go into the database.
        is_text = bool(body) and "mlflow-artifacts" not in self.path
        text = json.dumps(json.loads(body), ensure_ascii=False) if is_text else ""
        if not text.isascii() or any(word in text for word in self.words):
            error = {"error_code": "INTERNAL_ERROR", "message": "'charmap' codec can't encode character"}
            self.reply(500, json.dumps(error).encode())
            return
        headers = {name: value for name, value in self.headers.items() if name.lower() not in ("host", "connection")}
        request = urllib.request.Request(
            self.upstream + self.path, data=body or None, headers=headers, method=self.command
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                self.reply(answer.status, answer.read())
        except urllib.error.HTTPError as error:
            self.reply(error.code, error.read())

    do_GET = do_PATCH = do_PUT = do_DELETE = do_POST

    def reply(self, status: int, body: bytes) -> None:
        """Answers with JSON."""
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Prints nothing."""


@contextlib.contextmanager
def rejecting_proxy(upstream: str, words: tuple[str, ...] = ()) -> Iterator[str]:
    """Runs a `RejectingProxy` before a server; yields its address.

    Args:
        words: text that is rejected in ASCII, too.
    """
    handler = type("Proxy", (RejectingProxy,), {"upstream": upstream, "words": words})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
