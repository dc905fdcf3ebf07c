"""Derives the verdict of a pipeline run from the recorded outcomes of its steps. `finish` and the command share it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from ..outcome import EXIT_STATUS, Outcome

OUTCOME = "mixtune.outcome."
"""Prefix of the tags that store a step's outcome record."""
GATE_NOT_MET = "gate_not_met"
FAILED_STATES = frozenset({"FAILED", "ERROR"})
STOPPED_STATES = frozenset({"CANCELLED", "CANCELED", "CANCELING"})
"""KFP uses different spellings for a run and for the exit task."""
ENDED_WITHOUT_RECORD = "ended without an outcome record (probably killed)"

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]


@dataclass
class StepRun:
    """One attempt at a step, as recorded by MLflow or a journal.

    Attributes:
        title: the step and its subject.
        status: MLflow's status of the run: RUNNING, FINISHED, FAILED, KILLED.
        tags: the tags of the run.
    """

    title: str
    status: str = "RUNNING"
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """Returns the kind of the outcome record; without a record, `done`, `running` or `failed`, derived from the status."""
        without_record = {"FINISHED": "done", "RUNNING": "running"}.get(self.status, "failed")
        return self.tags.get(f"{OUTCOME}kind", without_record)

    @property
    def sentence(self) -> str:
        """Returns the message about the end of the step."""
        return self.tags.get(f"{OUTCOME}sentence") or ENDED_WITHOUT_RECORD

    @classmethod
    def from_outcome(cls, outcome: Outcome) -> StepRun:
        """Converts an outcome record from disk. While MLflow is down, it can be more recent than MLflow's record."""
        tags = {"kind": outcome.kind, "sentence": "; ".join(outcome.sentences), **outcome.facts}
        status = status_of(outcome.kind)
        return cls(outcome.title, status, {f"{OUTCOME}{name}": text for name, text in tags.items()})


@dataclass(frozen=True)
class Verdict:
    """The result of a pipeline run.

    Attributes:
        kind: the kind of an outcome (`outcome.py`), or `unknown` if it is not known whether the gate was met.
        sentence: the verdict for people; the tag `mixtune.verdict`.
        problems: a sentence for each step that failed, or for the gate.
        status: MLflow's status for the parent run.
        failed: steps that failed.
    """

    kind: str
    sentence: str
    problems: tuple[str, ...] = ()
    status: RunStatus = "FINISHED"
    failed: tuple[StepRun, ...] = ()


def status_of(kind: str) -> RunStatus:
    """Returns MLflow's status for a step's run with an outcome of this kind."""
    known: dict[str, RunStatus] = {"done": "FINISHED", "interrupted": "KILLED", "terminated": "KILLED"}
    return known.get(kind, "FAILED")


def judge(steps: Iterable[StepRun], parent_tags: Mapping[str, str], state: str, error: str = "") -> Verdict:
    """Decides how a pipeline run ended, on this machine or on a cluster.

    The recorded outcomes decide. KFP's state only counts if it is a failure or a stop: the exit task gets COMPLETE or even
    RUNNING for a successful run. The step `finish`, which itself asks for the verdict, only counts if the state is a failure.

    Args:
        steps: all attempts at all steps, oldest first. Of several attempts at a step the last one counts.
        parent_tags: tags of the MLflow parent run, where `compare` puts the gate's decision.
        state: KFP's state of the run or of the exit task's `PipelineTaskFinalStatus`.
        error: KFP's message, if there is one.
    """
    last = {step.title: step for step in steps}
    finish = last.pop("finish", None)
    state = state.upper()
    gate, selected, reasons = (_from_compare(name, last, parent_tags) for name in ("gate", "selected", "gate_reasons"))
    failed = [step for step in last.values() if step.kind not in ("done", "running", GATE_NOT_MET)]
    if state in STOPPED_STATES:
        return Verdict("interrupted", "stopped", status="KILLED", failed=tuple(failed))
    ended_by_the_gate = any(step.kind == GATE_NOT_MET for step in last.values())
    if state in FAILED_STATES:
        if not failed and not ended_by_the_gate:
            # An open run of a step in a failed pipeline run means that the step was killed before it could record why.
            failed = [step for step in last.values() if step.kind == "running"]
        if finish is not None and finish.kind not in ("done", "running"):
            failed.append(finish)
        if not failed and not ended_by_the_gate:
            problem = error or f"KFP says {state}"
            return Verdict("failed", f"failed: {problem}", (problem,), "FAILED")
    if failed:
        problems = tuple(f"{step.title}: {step.sentence}" for step in failed)
        kind = failed[0].kind if failed[0].kind in ("refused", "unreachable") else "failed"
        return Verdict(kind, "failed: " + "; ".join(problems), problems, "FAILED", tuple(failed))
    if gate == "passed":
        return Verdict("done", f"gate passed: {selected}")
    if gate:
        problem = f"gate not met: {reasons}".rstrip(": ")
        return Verdict(GATE_NOT_MET, problem, (problem,), "FAILED" if ended_by_the_gate else "FINISHED")
    return Verdict("unknown", "no verdict is recorded")


def _from_compare(name: str, last: Mapping[str, StepRun], parent_tags: Mapping[str, str]) -> str:
    """Returns a decision of `compare`, from the parent run, from its own run or from its outcome record."""
    own = last["compare"].tags if "compare" in last else {}
    return parent_tags.get(f"mixtune.{name}") or own.get(f"mixtune.{name}") or own.get(f"{OUTCOME}{name}") or ""


def exit_status(kind: str) -> int:
    """Returns the exit status of the command. An unknown verdict counts as an unreachable server."""
    return EXIT_STATUS["unreachable" if kind == "unknown" else kind]
