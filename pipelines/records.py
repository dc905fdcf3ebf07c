"""What MLflow has on record about a run on a cluster, and the exit status that follows: KFP passes on none."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mixtune.components.shared.artifacts import read_json
from mixtune.components.shared.delivery import PARENT, RUN_ID, STEP
from mixtune.components.shared.errors import MixtuneError, UnreachableError, first_line, without_credentials
from mixtune.components.shared.outcome import EXIT_STATUS

GATE_NOT_MET = "gate_not_met"
_ENDED_BADLY = ("FAILED", "KILLED")


@dataclass(frozen=True)
class StepRecord:
    """The last attempt at a step: how it ended, and what it read and wrote.

    Attributes:
        title: step and what it worked on.
        step: the step alone.
        tags: the MLflow run's.
    """

    title: str
    step: str
    status: str
    run_id: str
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        ended = "done" if self.status == "FINISHED" else "failed"
        return self.tags.get("mixtune.outcome.kind", ended)

    @property
    def sentence(self) -> str:
        return self.tags.get("mixtune.outcome.sentence") or "ended without a word (killed?)"


@dataclass
class Record:
    """The parent run of a pipeline run, with its steps.

    Attributes:
        experiment: id of the MLflow experiment.
        tags: the parent run's, with verdict and gate.
        steps: by title, the last attempt of each.
        report: `report.json`, where the run got that far.
    """

    run_id: str
    experiment: str
    tags: dict[str, str]
    steps: dict[str, StepRecord]
    report: dict[str, Any] | None = None
    address: str = ""

    @property
    def gate(self) -> str | None:
        return self.tags.get("mixtune.gate")

    @property
    def link(self) -> str | None:
        """The run in MLflow's user interface, where its address is one that a browser opens."""
        if not self.address.startswith("http"):
            return None
        return f"{without_credentials(self.address).rstrip('/')}/#/experiments/{self.experiment}/runs/{self.run_id}"


def read_record(run_id: str, with_report: bool = True) -> Record | None:
    """What MLflow knows of a pipeline run; None where it knows nothing, or MLFLOW_TRACKING_URI is not set.

    Raises:
        UnreachableError: where MLflow does not answer.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        return None
    from mixtune.components.shared.tracking import connect

    client = connect(uri)
    try:
        experiments = [one.experiment_id for one in client.search_experiments()]
        ask = f"tags.`{RUN_ID}` = '{run_id}' and tags.`{STEP}` = 'pipeline'"
        found = client.search_runs(experiments, ask, order_by=["attributes.start_time ASC"], max_results=1)
        if not found:
            return None
        parent = found[0]
        experiment = parent.info.experiment_id
        record = Record(parent.info.run_id, experiment, dict(parent.data.tags), {}, address=uri)
        record.steps = {step.title: step for step in _steps(client, experiment, parent.info.run_id)}
        if with_report and record.gate is not None:
            record.report = _report(client, parent.info.run_id)
        return record
    except MixtuneError:
        raise
    except Exception as error:
        raise UnreachableError(
            f"MLFLOW_TRACKING_URI: what MLflow at {without_credentials(uri)} has on record of the run cannot be read "
            f"({first_line(error)})"
        ) from None


def _steps(client: Any, experiment: str, parent: str) -> list[StepRecord]:
    ask = f"tags.`{PARENT}` = '{parent}'"
    found = client.search_runs([experiment], ask, order_by=["attributes.start_time ASC"], max_results=1000)
    return [
        StepRecord(
            one.info.run_name, one.data.tags.get(STEP, ""), one.info.status, one.info.run_id, dict(one.data.tags)
        )
        for one in found
    ]


def _report(client: Any, run_id: str) -> dict[str, Any] | None:
    with tempfile.TemporaryDirectory() as folder:
        try:
            file = Path(client.download_artifacts(run_id, "report/report.json", folder))
        except Exception:  # the verdict stands on the tags; the table is missing then
            return None
        return dict(read_json(file, "a report of a mixtune run"))


def steps_behind(record: Record) -> dict[str, StepRecord]:
    """The steps of a run, also those that it took from the cache: these ran in an earlier run, which is linked.

    Raises:
        UnreachableError: where MLflow does not answer.
    """
    from mixtune.components.shared.tracking import connect

    client = connect(record.address)
    steps: dict[str, StepRecord] = {}
    for name, run_id in record.tags.items():
        if name.startswith("mixtune.cached."):
            try:
                one = client.get_run(run_id)
            except Exception:  # deleted since; then its artifacts are not on record
                continue
            tags = dict(one.data.tags)
            steps[one.info.run_name] = StepRecord(
                one.info.run_name, tags.get(STEP, ""), one.info.status, one.info.run_id, tags
            )
    return steps | record.steps


@dataclass
class Ended:
    """How a run on a cluster ended, for people and for programs.

    Attributes:
        status: exit status of design.
        outcome: its name: `done`, `failed`, `refused`, `gate_not_met`, `unreachable`, `interrupted`.
        verdict: one sentence.
        problems: a sentence for each step that did not end well.
    """

    run_id: str
    state: str
    outcome: str
    verdict: str
    problems: list[str] = field(default_factory=list)
    report: dict[str, Any] | None = None
    links: dict[str, str] = field(default_factory=dict)

    @property
    def status(self) -> int:
        return EXIT_STATUS[self.outcome]

    def to_json(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {
            "run_id": self.run_id, "state": self.state, "exit_status": self.status, "outcome": self.outcome,
            "verdict": self.verdict, "problems": self.problems, "links": self.links, "report": self.report,
        }  # fmt: skip


def conclude(
    run_id: str,
    state: str,
    record: Record | None,
    failed_tasks: list[str],
    why_no_record: str = "",
    alone: bool = False,
) -> Ended:
    """What came of a run that has ended.

    Args:
        state: KFP's: SUCCEEDED, FAILED, CANCELED, SKIPPED.
        record: MLflow's, where there is one.
        failed_tasks: a sentence for each task that KFP says failed.
        why_no_record: why there is none, in words.
        alone: whether it was one step alone, which has no verdict, except `compare`.
    """
    if state in ("CANCELED", "CANCELING"):
        return Ended(run_id, state, "interrupted", "stopped", report=record.report if record else None)
    if alone and state == "SUCCEEDED" and (record is None or record.gate is None):
        return Ended(run_id, state, "done", "the step has ended well")
    if record is None:
        if state == "SUCCEEDED":
            told = f"KFP says that the run has ended well, but whether the gate was met cannot be told: {why_no_record}"
            return Ended(run_id, state, "unreachable", "not known", [told])
        return Ended(run_id, state, "failed", "failed", [*(failed_tasks or ["KFP names no task that failed"])])
    bad = [one for one in record.steps.values() if one.status in _ENDED_BADLY and one.kind != GATE_NOT_MET]
    verdict = record.tags.get("mixtune.verdict", "no verdict on record")
    if state == "SUCCEEDED" or (not bad and any(one.kind == GATE_NOT_MET for one in record.steps.values())):
        if record.gate == "passed":
            outcome, problems = "done", []
        elif record.gate is not None:
            outcome = GATE_NOT_MET
            problems = [f"gate not met: {record.tags.get('mixtune.gate_reasons', '')}".rstrip(": ")]
        else:
            outcome, problems = "unreachable", ["the run has ended well, but MLflow has no verdict of it on record"]
        return Ended(run_id, state, outcome, verdict, problems, record.report)
    first = bad[0].kind if bad else "failed"
    outcome = first if first in ("refused", "unreachable") else "failed"
    problems = [f"{one.title}: {one.sentence}" for one in bad] or failed_tasks or [verdict]
    return Ended(run_id, state, outcome, verdict, problems, record.report)
