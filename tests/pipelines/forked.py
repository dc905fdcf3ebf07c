"""The command in processes that are forked from one that has imported what steps need, as the steps of a local run are."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path

ROOT = Path(__file__).parents[2]
STEPS = tuple(f"mixtune.components.{step}.step" for step in ("prepare", "pretrain", "mixed", "evaluate"))


def start(arguments: list[str], folder: Path, environment: Mapping[str, str], log: Path) -> BaseProcess:
    """Starts `mixtune` in a folder and a process group of its own, with its output in a file.

    Args:
        environment: added to that of the tests.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mixtune.pipelines.cli", *STEPS])
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))  # the process finds this module
    process = context.Process(target=_run, args=(arguments, folder, dict(environment), log))
    process.start()
    assert process.pid
    # Its process group, which a test may kill at once, exists when it leads a session.
    while process.is_alive() and os.getsid(process.pid) != process.pid:
        time.sleep(0.001)
    return process


def _run(arguments: list[str], folder: Path, environment: dict[str, str], log: Path) -> None:
    from mixtune.pipelines.cli import main

    os.setsid()
    os.chdir(folder)
    os.environ.update(environment)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    sys.argv = ["mixtune", *arguments]
    main()
