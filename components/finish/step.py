"""Ends the run: determines the verdict and ends the MLflow parent run, also after a failure. Never cached."""

from __future__ import annotations

import os

from ..shared.checkpoints.clearing import clear_finished
from ..shared.checkpoints.store import CHECKPOINT_DIR
from ..shared.nodes.launcher import delete_trainjobs_of
from ..shared.nodes.manifest import POD_NAMESPACE
from ..shared.outcome import load_outcomes
from ..shared.running.context import Context
from ..shared.tracking.verdict import StepRun, judge
from .config import FinishStep


def run(config: FinishStep, *, context: Context, state: str, error: str) -> None:
    """Ends the parent run, and all runs that other steps left open.

    Args:
        state: KFP's state of the other tasks: COMPLETE or RUNNING for a successful run on a cluster, SUCCEEDED locally.
        error: KFP's message about the failure.
    """
    if POD_NAMESPACE in os.environ and context.run_id:
        delete_trainjobs_of(context.run_id, context)
    steps = _on_disk()
    for step in context.tracker.children():
        # If a step could not reach MLflow, its record on disk is more complete.
        steps[step.title] = StepRun(step.title, step.status, step.tags | steps.get(step.title, step).tags)
    verdict = judge(steps.values(), context.tracker.parent_tags(), state, error)
    context.tracker.close_parent(verdict.status, verdict.sentence)
    context.facts["verdict"] = verdict.sentence
    context.say(verdict.sentence)
    if verdict.status == "FINISHED" and context.run_id:
        _clear_checkpoints(context)


def _clear_checkpoints(context: Context) -> None:
    """Deletes the run's checkpoints. They are kept until the models are safe, so that a lost training can resume."""
    checkpoint_dir = os.environ.get(CHECKPOINT_DIR)
    if not checkpoint_dir:
        return
    assert context.run_id is not None
    count = clear_finished(checkpoint_dir, context.run_id)
    context.say(f"removed the checkpoints of {count} trainings")


def _on_disk() -> dict[str, StepRun]:
    """Reads the outcome records of the other steps by title, if this process can access them."""
    folder = os.environ.get("MIXTUNE_OUTCOME_DIR")
    return {outcome.title: StepRun.from_outcome(outcome) for outcome in load_outcomes(folder)} if folder else {}
