"""How a run ended, on this machine or on a cluster. `judge` decides it from the records of the steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mixtune.components.shared.tracking.verdict import exit_status

SHOWN_ADVICE = 2
"""Sentences of the report's advice that the command prints; the report has all of them."""


@dataclass
class Ended:
    """The result of a run or of waiting for one, for people and programs.

    Attributes:
        run_id: id of the run.
        state: state of the run, in KFP's terms.
        outcome: kind of the result: `done`, `failed`, `refused`, `gate_not_met`, `unreachable`, `interrupted`, `terminated`,
            `unknown`. If the command stopped waiting, `timed_out` or `pending`: the run continues, and no step has failed.
        verdict: one sentence.
        problems: a sentence for each problem.
        report: content of `report.json`, if the run got that far.
        links: URLs of the run by name.
        notes: further messages for the user.
        kept: whether results of finished steps, or checkpoints, are kept for a next run with the same command.
    """

    run_id: str
    state: str
    outcome: str
    verdict: str
    problems: list[str] = field(default_factory=list)
    report: dict[str, Any] | None = None
    links: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    kept: bool = False

    @property
    def warnings(self) -> list[str]:
        """Returns what the report warns of, such as data that was lost."""
        return [f"warning: {line}" for line in (self.report or {}).get("warnings", [])]

    @property
    def advice(self) -> list[str]:
        """Returns the most important advice of the report."""
        return [f"next: {sentence}" for sentence in (self.report or {}).get("advice", [])[:SHOWN_ADVICE]]

    @property
    def status(self) -> int:
        """Returns the exit status of the command."""
        return exit_status(self.outcome)

    def to_json(self) -> dict[str, Any]:
        """Returns the object that `--json` prints."""
        return {
            "run_id": self.run_id, "state": self.state, "exit_status": self.status, "outcome": self.outcome,
            "verdict": self.verdict, "problems": self.problems, "links": self.links, "report": self.report,
            "warnings": self.warnings,
        }  # fmt: skip
