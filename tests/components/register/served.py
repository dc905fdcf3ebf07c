"""A registered model behind MLflow's own server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.mlflow_server import free_port


@contextmanager
def served(model: str, uri: str) -> Iterator[str]:
    """Serves a registered model from its own folder, in which mixtune is not needed; yields the address of its predictions."""
    port = free_port()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # it starts uvicorn by its name
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", model, "-p", str(port)]
    environment = os.environ | {"MLFLOW_TRACKING_URI": uri, "PATH": path}
    with subprocess.Popen(
        [*command, "--env-manager", "local", "-h", "127.0.0.1"], env=environment, start_new_session=True
    ) as server:
        try:
            yield f"http://127.0.0.1:{port}/invocations"
        finally:
            os.killpg(server.pid, signal.SIGKILL)


def sent(url: str, question: dict[str, Any]) -> Any:
    """Sends a question as soon as the server answers; returns its answer."""
    request = urllib.request.Request(url, json.dumps(question).encode(), {"Content-Type": "application/json"})
    deadline = time.monotonic() + 120
    while True:
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return json.loads(response.read())
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from None
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.5)
