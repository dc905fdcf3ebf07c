"""Closes the run: verdict and end of the MLflow parent run, also after a failure. Never cached."""

from __future__ import annotations

import os

from ..shared.checkpoints.clearing import clear_finished
from ..shared.checkpoints.store import PLACE
from ..shared.outcome import load_outcomes
from ..shared.running.context import Context
from ..shared.tracking.verdict import StepRun, judge
from .config import FinishStep


def run(config: FinishStep, *, context: Context, state: str, error: str) -> None:
    """Ends the parent run, and the runs that other steps left open.

    Args:
        state: KFP's state of the other tasks. A run that went well is COMPLETE or RUNNING on a cluster, SUCCEEDED locally.
        error: KFP's message about the failure.
    """
    steps = _on_disk()
    for step in context.tracker.children():
        # Where a step could not reach MLflow, its own record on disk knows more.
        steps[step.title] = StepRun(step.title, step.status, step.tags | steps.get(step.title, step).tags)
    verdict = judge(steps.values(), context.tracker.parent_tags(), state, error)
    context.tracker.close_parent(verdict.status, verdict.sentence)
    context.facts["verdict"] = verdict.sentence
    context.say(verdict.sentence)
    if verdict.status == "FINISHED" and context.run_id:
        _clear_checkpoints(context)


def _clear_checkpoints(context: Context) -> None:
    """The models are safe now; until here a training that was lost on its way would have gone on from its last checkpoint."""
    place = os.environ.get(PLACE)
    if not place:
        return
    assert context.run_id is not None
    count = clear_finished(place, context.run_id)
    context.say(f"removed the checkpoints of {count} trainings")


def _on_disk() -> dict[str, StepRun]:
    """Reads the other steps' outcome records, where this process can see them, by title."""
    folder = os.environ.get("MIXTUNE_OUTCOME_DIR")
    return {outcome.title: StepRun.from_outcome(outcome) for outcome in load_outcomes(folder)} if folder else {}
