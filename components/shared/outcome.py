"""The outcome record that a step writes when it ends. KFP does not pass on a step's exit status."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from .artifacts import read_json, write_json
from .task_name import file_name

EXIT_STATUS = {
    "done": 0, "failed": 1, "refused": 2, "gate_not_met": 3, "unreachable": 4, "pending": 5, "timed_out": 6,
    "interrupted": 130, "terminated": 143,
}  # fmt: skip


class Outcome(BaseModel):
    """How one step ended.

    Attributes:
        title: title of the task, as in `TaskName`.
        kind: how it ended. `refused` is refused again unless something changes; with `gate_not_met` all outputs are written.
        sentences: messages for the user.
        log: file with the step's whole output, if the step has its own log file.
        facts: results that other steps and the command read, such as the gate's verdict.
        artifacts: URI of each input and output.
        given: what a rerun of this step alone needs: `config`, `artifacts` (URIs, as JSON), `candidate`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str
    kind: Literal["done", "failed", "refused", "gate_not_met", "unreachable", "interrupted", "terminated"]
    sentences: list[str] = Field(default_factory=list)
    log: str | None = None
    seconds: float = 0.0
    mlflow_run: str | None = None
    facts: dict[str, str] = Field(default_factory=dict)
    artifacts: dict[str, str] = Field(default_factory=dict)
    given: dict[str, str] = Field(default_factory=dict)

    @property
    def exit_status(self) -> int:
        """Returns the exit status: 0 done, 1 failed, 2 refused, 3 gate not met, 4 unreachable, 130/143 interrupted."""
        return EXIT_STATUS[self.kind]

    def save(self, folder: str | Path) -> None:
        """Writes the record into the folder, one file for each step of the run."""
        write_json(_file(folder, self.title), self.model_dump(mode="json"))


def _file(folder: str | Path, title: str) -> Path:
    return Path(folder) / f"{file_name(title)}.json"


def load_outcome(folder: str | Path, title: str) -> Outcome | None:
    """Reads the record of a step; None if the step wrote none."""
    file = _file(folder, title)
    return Outcome.model_validate(read_json(file, "an outcome record")) if file.is_file() else None


def load_outcomes(folder: str | Path) -> list[Outcome]:
    """Reads the records of a run, in the order in which the steps ended."""
    files = sorted(Path(folder).glob("*.json"), key=lambda file: file.stat().st_mtime_ns)
    return [Outcome.model_validate(read_json(file, "an outcome record")) for file in files]
