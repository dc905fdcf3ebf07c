"""The child process in which KFP's local runner runs the DAG. `run.py` starts it as a module, with a specification file."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from mixtune.components.shared.ascii_text import spell_in_output
from mixtune.components.shared.errors import MixtuneError
from mixtune.components.shared.running.context import note_cached
from mixtune.components.shared.task_name import TaskName

from .step_processes import StepServers


def run(spec_file: Path) -> None:
    """Runs the DAG from the specification. Ends when the DAG ends or the parent process does."""
    spec = json.loads(spec_file.read_text(encoding="utf-8"))
    threading.Thread(target=_end_with_parent, args=(spec["parent"],), daemon=True).start()
    servers = None
    if not spec["containers"] and sys.platform == "linux":
        # Elsewhere a process that has imported torch cannot be forked safely; there, KFP starts a process for each step.
        servers = StepServers(spec["config"]["run"]["parallel"])
    _run_pipeline(spec, servers)
    if servers is not None:
        servers.close()


def _run_pipeline(spec: dict[str, Any], servers: StepServers | None) -> None:
    from kfp import local  # after the servers have started, which import other packages meanwhile

    from mixtune.components.config import load

    from ..paths import local_folders
    from ..pipeline import make_pipeline
    from ..placement import Placer
    from ..third_party.kfp import key_cache_without, run_commands_with, tell_cache_hits

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    runner: Any = local.SubprocessRunner(use_venv=False)
    in_images = None
    if servers is not None:
        run_commands_with(servers.run)
    if spec["containers"]:
        from ..images import images
        from .containers import docker_runner

        asked = spec["containers"]
        progress, outcomes = Path(os.environ["MIXTUNE_PROGRESS_FILE"]), Path(os.environ["MIXTUNE_OUTCOME_DIR"])
        runner = docker_runner(asked, os.environ["MIXTUNE_RUN_ID"], progress, outcomes)
        in_images = images(asked["image_prefix"], asked["tag"])
    local.init(
        runner,
        pipeline_root=spec["pipeline_root"],
        raise_on_error=False,
        enable_caching=spec["cache_root"] is not None,
        cache_root=spec["cache_root"],
    )
    config = load(spec["config"])
    # Weights of a base model in a folder are not copied: results contain its path.
    has_local_base = config.model.base.startswith("/")
    key_cache_without(spec["pipeline_root"], [] if has_local_base else local_folders(config))
    tell_cache_hits(_note_cached)
    make_pipeline(config, Placer.local(in_images, config.run.parallel))()


def _note_cached(task: str, arguments: dict[str, Any]) -> None:
    from mixtune.components.shared.runtime import task_name

    known = TaskName.of_package_task(task)
    if known is not None:
        note_cached(str(task_name(known.step, arguments["config"], arguments, arguments)))


def _end_with_parent(parent: int) -> None:
    """Ends this process and the steps when the parent is gone (kill -9), so that another run can use the folder."""
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(0, signal.SIGTERM)


if __name__ == "__main__":
    spell_in_output()
    try:
        run(Path(sys.argv[1]))
    except MixtuneError as error:
        raise SystemExit("; ".join(error.problems)) from None
