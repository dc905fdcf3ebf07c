"""Reads MLflow's records of a run on a cluster and determines the exit status, which KFP does not pass on.

`finish` writes the verdict of a run. KFP does not run `finish` again if a retry repairs a failed run, and not at all if a run
is stopped, so the recorded verdict can be outdated. Commands that wait for the run correct it.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixtune.components.shared.artifacts import read_json
from mixtune.components.shared.errors import MixtuneError, UnreachableError, first_line, without_credentials
from mixtune.components.shared.tracking.mlflow_runs import RUN_ID, STEP, close_pipeline_run, step_runs_of
from mixtune.components.shared.tracking.verdict import ENDED_WITHOUT_RECORD, STOPPED_STATES, StepRun, judge

from ..ended import Ended


@dataclass
class StepRecord(StepRun):
    """The last attempt at a step, with its MLflow run.

    Attributes:
        step: name of the step, without its subject.
        run_id: id of the MLflow run.
    """

    step: str = ""
    run_id: str = ""


@dataclass
class Record:
    """The parent run of a pipeline run and its steps.

    Attributes:
        experiment: id of the MLflow experiment.
        status: MLflow's status of the parent run.
        tags: tags of the parent run, including verdict and gate.
        steps: last attempt at each step, by title.
        report: content of `report.json`, if the run got that far.
    """

    run_id: str
    experiment: str
    status: str
    tags: dict[str, str]
    steps: dict[str, StepRecord]
    report: dict[str, Any] | None = None
    address: str = ""

    @property
    def link(self) -> str | None:
        """Returns the run's URL in MLflow's user interface, if its address can be opened in a browser."""
        if not self.address.startswith("http"):
            return None
        return f"{without_credentials(self.address).rstrip('/')}/#/experiments/{self.experiment}/runs/{self.run_id}"


def read_record(run_id: str, with_report: bool = True) -> Record | None:
    """Reads MLflow's records of a pipeline run; None if there are none, or if MLFLOW_TRACKING_URI is not set.

    Raises:
        UnreachableError: if MLflow does not answer.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        return None
    from mixtune.components.shared.tracking.connection import connect

    client = connect(uri)
    try:
        experiments = [one.experiment_id for one in client.search_experiments()]
        ask = f"tags.`{RUN_ID}` = '{run_id}' and tags.`{STEP}` = 'pipeline'"
        found = client.search_runs(experiments, ask, order_by=["attributes.start_time ASC"], max_results=1)
        if not found:
            return None
        parent = found[0]
        experiment = parent.info.experiment_id
        record = Record(parent.info.run_id, experiment, parent.info.status, dict(parent.data.tags), {}, address=uri)
        steps = (_as_step(run) for run in step_runs_of(client, experiment, run_id))
        record.steps = {step.title: step for step in steps}
        if with_report and "compare" in record.steps:
            record.report = _report(client, parent.info.run_id)
        return record
    except MixtuneError:
        raise
    except Exception as error:
        raise UnreachableError(
            f"MLFLOW_TRACKING_URI: the run's records in MLflow at {without_credentials(uri)} cannot be read "
            f"({first_line(error)})"
        ) from None


def _as_step(run: Any) -> StepRecord:
    tags = dict(run.data.tags)
    return StepRecord(run.info.run_name, run.info.status, tags, tags.get(STEP, ""), run.info.run_id)


def _report(client: Any, run_id: str) -> dict[str, Any] | None:
    with tempfile.TemporaryDirectory() as folder:
        try:
            file = Path(client.download_artifacts(run_id, "report/report.json", folder))
        except Exception:  # the verdict needs only the tags; the table is omitted
            return None
        return dict(read_json(file, "a report of a mixtune run"))


def steps_behind(record: Record) -> dict[str, StepRecord]:
    """Returns the steps of a run, including cached steps, which ran in a linked earlier run.

    Raises:
        UnreachableError: if MLflow does not answer.
    """
    from mixtune.components.shared.tracking.connection import connect

    client = connect(record.address)
    steps: dict[str, StepRecord] = {}
    for name, run_id in record.tags.items():
        if name.startswith("mixtune.cached."):
            try:
                step = _as_step(client.get_run(run_id))
            except Exception:  # deleted since; its artifacts are unknown
                continue
            steps[step.title] = step
    return steps | record.steps


def conclude(
    run_id: str,
    state: str,
    record: Record | None,
    failed_tasks: Mapping[str, str],
    why_no_record: str = "",
    alone: bool = False,
) -> Ended:
    """Determines the result of a run that has ended.

    Args:
        state: KFP's state: SUCCEEDED, FAILED, CANCELED, SKIPPED.
        record: MLflow's record, if there is one.
        failed_tasks: sentences about failed tasks, from the platform, by the title of the task.
        why_no_record: reason why there is no record.
        alone: whether the run consists of one step. Such runs have no verdict, except for `compare`.
    """
    verdict = judge(record.steps.values(), record.tags, state) if record else None
    report = record.report if record else None
    if state in STOPPED_STATES:
        return Ended(run_id, state, "interrupted", "stopped", report=report)
    if alone and state == "SUCCEEDED" and (verdict is None or verdict.kind == "unknown"):
        return Ended(run_id, state, "done", "the step succeeded")
    if verdict is None:
        if state == "SUCCEEDED":
            problem = (
                f"KFP reports that the run succeeded, but it is not known whether the gate was met: {why_no_record}"
            )
            return Ended(run_id, state, "unknown", "not known", [problem])
        return Ended(run_id, state, "failed", "failed", list(failed_tasks.values()) or ["KFP reports no failed task"])
    if verdict.kind == "unknown":
        problem = "the run succeeded, but MLflow has no record of its verdict"
        return Ended(run_id, state, verdict.kind, verdict.sentence, [problem], report)
    problems = list(verdict.problems)
    recorded = record.steps.values() if record else ()
    if verdict.kind == "failed" and all(step.kind in ("done", "running") for step in recorded):
        problems = list(failed_tasks.values()) or problems  # no step recorded a failure
    else:
        # The platform knows why a step without a record was killed.
        for index, step in enumerate(verdict.failed):
            if step.sentence == ENDED_WITHOUT_RECORD:
                problems[index] = failed_tasks.get(step.title, problems[index])
    return Ended(run_id, state, verdict.kind, verdict.sentence, problems, report)


def correct_verdict(record: Record, state: str) -> None:
    """Writes the verdict of a run that has ended to MLflow, if the recorded verdict is missing or different.

    Args:
        state: KFP's state of the run.

    Raises:
        UnreachableError: if MLflow does not answer or denies write access.
    """
    from mixtune.components.shared.tracking.connection import connect

    verdict = judge(record.steps.values(), record.tags, state)
    left_open = any(step.status == "RUNNING" for step in record.steps.values())
    if (record.tags.get("mixtune.verdict"), record.status, left_open) == (verdict.sentence, verdict.status, False):
        return
    client = connect(record.address)
    try:
        close_pipeline_run(client, record.run_id, verdict.status, verdict.sentence)
    except Exception as error:
        raise UnreachableError(
            f"MLFLOW_TRACKING_URI: the verdict of the run could not be written to MLflow at "
            f"{without_credentials(record.address)} ({first_line(error)}); run `mixtune wait` again"
        ) from None
