"""Closes the run: verdict and end of the MLflow parent run, also after a failure. Never cached."""

from __future__ import annotations

import os

from ..shared.checkpoints import PLACE, clear_finished
from ..shared.context import Context
from ..shared.outcome import Outcome, load_outcomes
from .config import FinishStep


def run(config: FinishStep, *, context: Context, state: str, error: str) -> None:
    """Ends the parent run.

    Args:
        state: how the other tasks ended, as KFP says it: SUCCEEDED, FAILED, CANCELLED.
        error: KFP's message about the failure.
    """
    succeeded = state.upper() == "SUCCEEDED"
    outcomes = _outcomes()
    tags = _verdict_tags(outcomes) | context.tracker.parent_tags()
    # Of several attempts at a step the last one counts.
    last = {run.title: run for run in context.tracker.children()}
    failures = [
        f"{run.title}: {run.tags.get('mixtune.outcome.sentence', 'ended without a word')}"
        for run in last.values()
        if run.status in ("FAILED", "KILLED")
    ] or [f"{one.title}: {'; '.join(one.sentences)}" for one in outcomes if one.kind != "done"]
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
    place = os.environ.get(PLACE)
    if not place:
        return
    assert context.run_id is not None
    count = clear_finished(place, context.run_id)
    context.say(f"removed the checkpoints of {count} trainings")


def _outcomes() -> list[Outcome]:
    """The other steps' records, where this process can see them; they know what MLflow, if it is away, cannot tell."""
    folder = os.environ.get("MIXTUNE_OUTCOME_DIR")
    return load_outcomes(folder) if folder else []


def _verdict_tags(outcomes: list[Outcome]) -> dict[str, str]:
    facts = next((one.facts for one in outcomes if one.title == "compare" and one.kind == "done"), {})
    return {f"mixtune.{name}": value for name, value in facts.items()}
