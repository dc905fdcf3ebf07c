"""The record of an output folder's last run, which tells whether the command was killed before it could close MLflow's run."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

from mixtune.components.shared.artifacts import read_json, write_json
from mixtune.components.shared.errors import without_credentials
from mixtune.components.shared.outcome import load_outcome

from .folder import Run

KILLED = "killed: the command ended without a verdict"


def begin_record(run: Run, uri: str, experiment: str) -> None:
    """Records a run that begins, and where MLflow has it."""
    record = {"id": run.id, "address": without_credentials(uri), "experiment": experiment, "ended": False}
    write_json(_file(run.output), record)


def end_record(output: Path) -> None:
    """Records that the last run has ended, and is closed in MLflow."""
    write_json(_file(output), {**_read(output), "ended": True})


def was_killed(output: Path) -> bool:
    """Tells whether the command of the last run was killed, if no run uses the folder now."""
    return _read(output).get("ended") is False


def close_killed_run(output: Path) -> None:
    """Ends the MLflow parent run of the last run if its command was killed. The caller holds the folder's lock.

    If MLflow does not answer, the end stays in the folder's journal.
    """
    if not was_killed(output):
        return
    last = _read(output)
    run = Run(last["id"], output)
    if load_outcome(run.outcomes, "finish") is None:
        from mixtune.components.shared.tracking.mlflow_store import store_at
        from mixtune.components.shared.tracking.tracker import close_unfinished

        uri = store_at(last["address"]).uri
        with contextlib.redirect_stdout(io.StringIO()):
            close_unfinished(uri, last["experiment"], run.id, "KILLED", KILLED, run.journal)
    end_record(output)


def _file(output: Path) -> Path:
    return output / ".mixtune" / "last_run.json"


def _read(output: Path) -> dict[str, Any]:
    return dict(read_json(_file(output), "the record of a run")) if _file(output).is_file() else {}
