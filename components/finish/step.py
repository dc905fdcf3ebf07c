"""Closes the run: verdict and end of the MLflow parent run, also after a failure. Never cached."""

from __future__ import annotations

import os
from pathlib import Path

from ..shared.checkpoints import PLACE, clear_finished
from ..shared.context import Context
from .config import FinishStep


def run(config: FinishStep, *, context: Context, state: str, error: str) -> None:
    """Ends the parent run.

    Args:
        state: how the other tasks ended, as KFP says it: SUCCEEDED, FAILED, CANCELLED.
        error: KFP's message about the failure.
    """
    succeeded = state.upper() == "SUCCEEDED"
    tags = context.tracker.parent_tags()
    failures = [
        f"{run.info.run_name}: {run.data.tags.get('mixtune.outcome.sentence', 'ended without a word')}"
        for run in context.tracker.children()
        if run.info.status in ("FAILED", "KILLED")
    ]
    if not succeeded:
        verdict = "failed: " + ("; ".join(failures) or error or f"KFP says {state}")
    elif tags.get("mixtune.gate") == "passed":
        verdict = f"gate passed: {tags.get('mixtune.selected', '')}"
    elif "mixtune.gate" in tags:
        verdict = f"gate not met: {tags.get('mixtune.gate_reasons', '')}"
    else:
        verdict = "no verdict on record"
    context.tracker.close_parent("FINISHED" if succeeded else "FAILED", {"mixtune.verdict": verdict})
    context.facts["verdict"] = verdict
    context.say(verdict)
    if succeeded and context.run_id:
        _clear_checkpoints(context)


def _clear_checkpoints(context: Context) -> None:
    """The models are safe now; until here a training that was lost on its way would have gone on from its last checkpoint."""
    root = os.environ.get(PLACE, "")
    assert context.run_id is not None
    if "://" in root and not root.startswith("file://"):
        from ..shared.remote_checkpoints import clear_finished_at

        count = clear_finished_at(root, context.run_id)
    elif root:
        count = clear_finished(Path(root.removeprefix("file://")), context.run_id)
    else:
        return
    context.say(f"removed the checkpoints of {count} trainings")
