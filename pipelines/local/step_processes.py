"""Runs local steps in processes that are forked from a server, which has imported their packages once.

A Python process that imports what a training needs takes seconds before its first line. The server pays for this once; each
step still has a process of its own. A server starts no Python threads and initialises no GPU, so that forking it is safe.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any

from .step_server import SERVER, STEP, read_all
from .step_server import __name__ as MODULE

_RUNTIME = (
    "kfp.dsl.executor_main",
    "mixtune.components.shared.runtime",
    "mlflow",
    "mlflow.tracking",
    "mixtune.components.plan.step",
    "mixtune.components.finish.step",
)
_DATABASE = (
    "mlflow.store.tracking.sqlalchemy_store",
    "mlflow.store.model_registry.sqlalchemy_store",
    "mlflow.store.tracking.sqlalchemy_workspace_store",
    "mlflow.store.model_registry.sqlalchemy_workspace_store",
    "alembic.command",
    "sqlalchemy.dialects.sqlite",
)
# Third-party modules are named here if a step imports them only when it needs them.
_LIGHT = (
    "mixtune.components.compare.step",
    "scipy.stats",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
    "mixtune.components.prepare.step",
    "datasets",
    "transformers.tokenization_utils_tokenizers",
    "mixtune.components.register.step",
)
_TORCH = ("mixtune.components.pretrain.step", "mixtune.components.finetune.step", "mixtune.components.mixed.step")
_TORCH_LATER = ("torch.profiler", "mixtune.components.evaluate.step")
_CANDIDATE_STEPS = frozenset({"mixed", "evaluate"})


class StepServer:
    """A process that forks one process for each step. It ends when this object is closed or its process dies.

    Args:
        modules: modules that the server imports before it runs the first step.
        more_modules: modules that it imports later, while no step waits.
        parent: a server to fork this one from, with all that it has imported; None starts a new process.
    """

    def __init__(self, modules: Sequence[str], more_modules: Sequence[str], parent: StepServer | None = None) -> None:
        self._control, theirs = socket.socketpair()
        with theirs:
            if parent is not None:
                socket.send_fds(parent._control, [SERVER], [theirs.fileno()])
            else:
                subprocess.Popen(
                    [sys.executable, "-m", MODULE, str(theirs.fileno())],
                    # Without it, `import kfp` also imports KFP's client and compiler.
                    env={**os.environ, "_KFP_RUNTIME": "true"},
                    pass_fds=[theirs.fileno()],
                )
        order = {"modules": list(modules), "more_modules": list(more_modules)}
        self._control.sendall(json.dumps(order).encode() + b"\n")

    def close(self) -> None:
        """Ends the server. Steps that still run go on."""
        self._control.close()

    def run(self, request: dict[str, Any]) -> int:
        """Runs a step and waits for its process to end. May be called from several threads.

        Returns:
            The exit status. 1 if the process was killed.
        """
        mine, theirs = socket.socketpair()
        with mine:
            with theirs:
                socket.send_fds(self._control, [STEP], [theirs.fileno()])
            mine.sendall(json.dumps(request).encode())
            mine.shutdown(socket.SHUT_WR)
            answer = read_all(mine)
        return int(answer) if answer else 1


class StepServers:
    """Runs the commands that KFP's local runner would start as processes.

    The server with torch starts with the first step that computes: a run whose results are all cached needs none.

    Args:
        parallel: number of candidates that are trained side by side. Each gets an equal share of the processor's cores.
    """

    def __init__(self, parallel: int) -> None:
        self._parallel = parallel
        uri = os.environ.get("MLFLOW_TRACKING_URI", "")
        database = () if uri.startswith("http") else _DATABASE
        self._light = StepServer((*_RUNTIME, *database), _LIGHT)
        self._torch: StepServer | None = None
        self._lock = threading.Lock()

    def run(self, full_command: list[str], env_vars: dict[str, str] | None = None) -> int:
        """Runs a task's command and returns its exit status. Replaces `run_local_subprocess` of KFP's local runner."""
        # Imported late, so that the light server starts before this process imports KFP.
        from ..placement import GPU_STEPS, NEVER_CACHED
        from ..third_party.kfp import parts_of_command

        source, arguments = parts_of_command(full_command)
        step = arguments[arguments.index("--function_to_execute") + 1]
        with self._lock:
            if self._torch is None and step not in NEVER_CACHED:
                self._torch = StepServer(_TORCH, _TORCH_LATER, self._light)
        needs_torch = step in GPU_STEPS or step == "register"  # register imports it for a version that is new
        server = self._torch if self._torch and needs_torch else self._light
        shared = self._parallel > 1 and step in _CANDIDATE_STEPS
        threads = max(1, len(os.sched_getaffinity(0)) // self._parallel) if shared else None
        return server.run({"source": source, "arguments": arguments, "environment": env_vars or {}, "threads": threads})

    def close(self) -> None:
        """Ends the servers."""
        for server in (self._light, self._torch):
            if server is not None:
                server.close()
