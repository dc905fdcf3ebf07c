"""The server process that forks a process for each step. `step_processes.py` starts it as a module."""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path

STEP, SERVER = b"f", b"s"
"""Requests: run a step, or become another server. Each comes with one end of a connection."""


def serve(control: socket.socket) -> None:
    """Imports modules and forks a process for each request, until the other end of `control` is closed.

    Args:
        control: receives the names of the modules, then a connection for each request.
    """
    order = json.loads(control.makefile("rb", buffering=0).readline())
    _import(order["modules"])
    more = list(order["more_modules"])
    while True:
        if more and not select.select([control], [], [], 0)[0]:
            _import([more.pop(0)])
            continue
        message, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if not message:
            return
        connection = socket.socket(fileno=descriptors[0])
        if os.fork() == 0:
            control.close()
            if message == SERVER:
                serve(connection)
                sys.exit()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _answer(connection)
        connection.close()


def _import(modules: Sequence[str]) -> None:
    """Imports modules. One that cannot be imported is left to the step that needs it, which reports the error."""
    gc.disable()
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception:
            traceback.print_exc()
    gc.enable()
    gc.freeze()  # the collector of a forked process would copy the pages of all imported objects


def _answer(connection: socket.socket) -> None:
    """Runs the requested step in this forked process and ends the process."""
    status = 1
    try:
        status = _run_component(**json.loads(read_all(connection)))
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    connection.sendall(str(status).encode())
    # The other end waits until this process has run its exit handlers: the connection closes when the process ends.
    sys.exit(status)


def _leave() -> None:
    """Ends the process without tearing down the interpreter, which would copy the memory that it shares with the server."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # the status of a step has been sent


def _run_component(source: str, arguments: list[str], environment: dict[str, str], threads: int | None) -> int:
    """Runs a KFP component as `python -m kfp.dsl.executor_main` would.

    Args:
        source: source code of the component.
        arguments: arguments of KFP's executor.
        environment: additional environment variables.
        threads: number of threads of torch; None does not change it.
    """
    from kfp.dsl.executor_main import executor_main

    os.environ |= environment
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)  # for the processes of a distributed training
        import torch

        torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        module = Path(folder) / "ephemeral_component.py"
        module.write_text(source, encoding="utf-8")
        sys.argv = ["executor_main", "--component_module_path", str(module), *arguments]
        executor_main()
    return 0


def read_all(connection: socket.socket) -> bytes:
    """Reads until the other end stops sending."""
    return b"".join(iter(lambda: connection.recv(65536), b""))


if __name__ == "__main__":
    atexit.register(_leave)  # as the first handler, so that it runs last
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel removes ended children; nobody waits for them
    serve(socket.socket(fileno=int(sys.argv[1])))
