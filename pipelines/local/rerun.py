"""Reruns a local run: from a given step on, or one step only. See `cluster/rerun.py` for runs on a cluster.

`--from` deletes the folder's cache entries of the steps to run and continues like `mixtune run`. `--only` runs one step on the
same artifacts, separately from the run, and writes its outputs to `<folder>/only/<task>-<time>/`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from google.protobuf import json_format

from mixtune.components.config import Config
from mixtune.components.shared.errors import RefusedError
from mixtune.components.shared.outcome import Outcome, load_outcomes
from mixtune.components.shared.runtime import OUTPUTS
from mixtune.components.shared.task_name import STEPS as ALL_STEPS
from mixtune.components.shared.task_name import TaskName, file_name

from ..cluster.records import StepRecord
from ..cluster.rerun import choose, given_to, step_of, tasks_from, with_overrides
from ..configuration import read_config
from ..pipeline import make_pipeline
from ..placement import Placer
from .folder import Run, claim
from .moving import marker_of, was_moved
from .run import tracking_uri
from .unchanged import forget_results


def forget_from(folder: Path, step: str, overrides: Sequence[str]) -> Path:
    """Deletes the cache entries of a step and of the tasks that depend on it.

    Args:
        folder: output folder of an earlier run.
        step: name of the step.
        overrides: `section.option=value` for the next run; checked here.

    Returns:
        The configuration file of the earlier run.

    Raises:
        RefusedError: if the folder contains no run, there is no such step, or an override is invalid.
    """
    file = _config_of(folder)
    if step not in ALL_STEPS:
        raise RefusedError(f"--from: must be one of {', '.join(ALL_STEPS)}, found {step}")
    config = read_config(file, overrides)
    pipeline = make_pipeline(config, Placer.local())
    tasks = tasks_from(json_format.MessageToDict(pipeline.pipeline_spec), step)
    lock = claim(folder.absolute(), config.name)
    try:
        forget(Run("", folder.absolute()), tasks)
    finally:
        lock.release()
    return file


def _config_of(folder: Path) -> Path:
    file = folder / "config.yaml"
    if not file.is_file() or not marker_of(folder).is_file():
        raise RefusedError(
            f"{folder}: contains no run; give the output folder of `mixtune run`, or the id of a KFP run"
        )
    return file


def forget(run: Run, tasks: Collection[str]) -> int:
    """Deletes the cache entries of some tasks, all checkpoints, and the record of the results. Returns the number of entries.

    An entry does not name its task, but its artifacts are in the task's folder.
    """
    count = 0
    for entry in (run.state / "cache").glob("*/*.json"):
        try:
            outputs = json.loads(entry.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if any(Path(uri).parent.name in tasks for uri in _uris(outputs)):
            entry.unlink(missing_ok=True)
            count += 1
    shutil.rmtree(run.checkpoints, ignore_errors=True)
    forget_results(run.output)
    return count


def _uris(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("uri"), str):
            yield value["uri"]
        for one in value.values():
            yield from _uris(one)
    elif isinstance(value, list):
        for one in value:
            yield from _uris(one)


def run_only(folder: Path, only: str, overrides: Sequence[str]) -> int:
    """Reruns one step of the run in an output folder and returns the exit status.

    Args:
        only: a step, such as `evaluate`, or one of its tasks, such as `evaluate mixed-0.3`.

    Raises:
        RefusedError: if the folder contains no run, or if the step's inputs are not recorded.
    """
    file = _config_of(folder)
    step = step_of(only)
    if was_moved(folder):
        claim(folder.absolute(), folder.name).release()
    before, after = read_config(file), read_config(file, overrides)
    newest = _newest(folder)
    records = {
        title: StepRecord(title, "FINISHED", step=name.step) for title in newest if (name := TaskName.parse(title))
    }
    status = 0
    for one in choose(only, records, str(folder), before):
        outcome = newest[one.title]
        status = max(status, _run_task(folder, step, outcome, before, after))
    return status


def _newest(folder: Path) -> dict[str, Outcome]:
    """Returns the newest record of each task. Records of tasks that the last run took from the cache are of earlier runs."""
    runs = sorted((folder / ".mixtune" / "outcomes").glob("*"))  # their names begin with the time
    return {outcome.title: outcome for run in runs for outcome in load_outcomes(run) if outcome.kind == "done"}


def _run_task(folder: Path, step: str, outcome: Outcome, before: Config, after: Config) -> int:
    config, uris, candidate = given_to(outcome.title, outcome.given)
    config = with_overrides(outcome.title, step, config, before, after)
    place = folder.absolute() / "only" / f"{file_name(outcome.title)}-{time.strftime('%Y%m%d-%H%M%S')}"
    place.mkdir(parents=True, exist_ok=True)
    (place / "config.json").write_text(config, encoding="utf-8")
    artifacts = {name: [uri] if isinstance(uri, str) else uri for name, uri in uris.items()}
    artifacts |= {name: [str(place / name)] for name in OUTPUTS[step]}
    command = [sys.executable, "-m", "mixtune.pipelines.cli", "step", step, "--config", str(place / "config.json")]
    for name, paths in artifacts.items():
        command += [part for path in paths for part in ("--artifact", f"{name}={path}")]
    for name, value in candidate.items():
        command += ["--parameter", f"{name}={value}"]
    if step == "compare":
        command += [
            part for name in ("selected_uri", "other_uri") for part in ("--parameter", f"{name}={place / name}")
        ]
    print(f"{outcome.title}: running only this task; its outputs are in {place}", flush=True)
    tracking = {"MLFLOW_TRACKING_URI": tracking_uri(after, folder), "MLFLOW_EXPERIMENT_NAME": after.tracking.experiment}
    return subprocess.run(command, env={**os.environ, **tracking}, check=False).returncode
