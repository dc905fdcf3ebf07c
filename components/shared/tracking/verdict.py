"""The verdict of a pipeline run, from what its steps left on record. One rule for `finish` and for the command."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from ..outcome import EXIT_STATUS, Outcome

OUTCOME = "mixtune.outcome."
"""How the tags begin that hold a step's outcome record."""
GATE_NOT_MET = "gate_not_met"
FAILED_STATES = frozenset({"FAILED", "ERROR"})
STOPPED_STATES = frozenset({"CANCELLED", "CANCELED", "CANCELING"})
"""KFP spells it differently for a run and for the exit task."""
ENDED_WITHOUT_RECORD = "ended without a record of why (killed?)"

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]


@dataclass
class StepRun:
    """One attempt at a step, as MLflow or a journal has it on record.

    Attributes:
        title: the step and what it works on.
        status: MLflow's status of the run: RUNNING, FINISHED, FAILED, KILLED.
        tags: the tags of the run.
    """

    title: str
    status: str = "RUNNING"
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """The kind of the outcome record; without one `done`, `running` or `failed`, after the status."""
        without_record = {"FINISHED": "done", "RUNNING": "running"}.get(self.status, "failed")
        return self.tags.get(f"{OUTCOME}kind", without_record)

    @property
    def sentence(self) -> str:
        """What a user should read about the end of the step."""
        return self.tags.get(f"{OUTCOME}sentence") or ENDED_WITHOUT_RECORD

    @classmethod
    def from_outcome(cls, outcome: Outcome) -> StepRun:
        """Reads the record that a step left on disk, which may know what MLflow, if it is away, does not."""
        tags = {"kind": outcome.kind, "sentence": "; ".join(outcome.sentences), **outcome.facts}
        status = status_of(outcome.kind)
        return cls(outcome.title, status, {f"{OUTCOME}{name}": text for name, text in tags.items()})


@dataclass(frozen=True)
class Verdict:
    """How a pipeline run ended.

    Attributes:
        kind: the kind of an outcome (`outcome.py`), or `unknown` where nothing says whether the gate was met.
        sentence: for people; the tag `mixtune.verdict`.
        problems: a sentence for each step that failed, or for the gate.
        status: MLflow's status for the parent run.
    """

    kind: str
    sentence: str
    problems: tuple[str, ...] = ()
    status: RunStatus = "FINISHED"


def status_of(kind: str) -> RunStatus:
    """MLflow's status for the run of a step with an outcome of this kind."""
    known: dict[str, RunStatus] = {"done": "FINISHED", "interrupted": "KILLED", "terminated": "KILLED"}
    return known.get(kind, "FAILED")


def judge(steps: Iterable[StepRun], parent_tags: Mapping[str, str], state: str, error: str = "") -> Verdict:
    """Decides how a pipeline run ended.

    The recorded outcomes decide. Of KFP's states only a failure or a stop counts: the exit task is told COMPLETE or even
    RUNNING for a run that went well.

    Args:
        steps: all attempts at all steps, oldest first. Of several attempts at a step the last one counts.
        parent_tags: tags of the MLflow parent run, where `compare` puts the gate's decision.
        state: KFP's state of the run or of the exit task's `PipelineTaskFinalStatus`.
        error: KFP's message, where it has one.
    """
    last = {step.title: step for step in steps if step.title != "finish"}
    state = state.upper()
    gate, selected, reasons = (_from_compare(name, last, parent_tags) for name in ("gate", "selected", "gate_reasons"))
    if state in STOPPED_STATES:
        return Verdict("interrupted", "stopped", status="KILLED")
    failed = [step for step in last.values() if step.kind not in ("done", "running", GATE_NOT_MET)]
    ended_by_the_gate = any(step.kind == GATE_NOT_MET for step in last.values())
    if not failed and state in FAILED_STATES and not ended_by_the_gate:
        # A step whose run is still open in a run that failed was killed before it could record why.
        failed = [step for step in last.values() if step.kind == "running"]
        if not failed:
            problem = error or f"KFP says {state}"
            return Verdict("failed", f"failed: {problem}", (problem,), "FAILED")
    if failed:
        problems = tuple(f"{step.title}: {step.sentence}" for step in failed)
        kind = failed[0].kind if failed[0].kind in ("refused", "unreachable") else "failed"
        return Verdict(kind, "failed: " + "; ".join(problems), problems, "FAILED")
    if gate == "passed":
        return Verdict("done", f"gate passed: {selected}")
    if gate:
        problem = f"gate not met: {reasons}".rstrip(": ")
        return Verdict(GATE_NOT_MET, problem, (problem,), "FAILED" if ended_by_the_gate else "FINISHED")
    return Verdict("unknown", "no verdict on record")


def _from_compare(name: str, last: Mapping[str, StepRun], parent_tags: Mapping[str, str]) -> str:
    """What `compare` decided: from the parent run, or from its own run, or from its outcome record."""
    own = last["compare"].tags if "compare" in last else {}
    return parent_tags.get(f"mixtune.{name}") or own.get(f"mixtune.{name}") or own.get(f"{OUTCOME}{name}") or ""


def exit_status(kind: str) -> int:
    """The exit status of the command; a verdict that nobody knows counts as a server that was not reached."""
    return EXIT_STATUS["unreachable" if kind == "unknown" else kind]
