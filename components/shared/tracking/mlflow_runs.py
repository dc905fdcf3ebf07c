"""The runs of one pipeline run in MLflow: a parent run, and one nested run for each step. Finds, makes and ends them.

KFP's own MLflow plugin, where it is switched on and injects its variables into tasks, has made these runs before a step
starts: a run for the pipeline run, and nested runs for its tasks and DAG nodes. Then they are used, and none is made.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ..errors import RefusedError
from .mlflow_text import in_ascii, is_rejected, send_text
from .verdict import OUTCOME, status_of

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

PARENT = "mlflow.parentRunId"
RUN_ID = "mixtune.run_id"
STEP = "mixtune.step"
REPLACED_BY = "mixtune.replaced_by"
_DEEPEST = 20
"""KFP nests the runs of DAG nodes; a chain of parents that is longer than this is a loop."""


def injected_run() -> str | None:
    """Returns the id of the run that KFP's MLflow plugin made for this task.

    A lone MLFLOW_RUN_ID, as a user may have set it in a shell, is not enough: the plugin names the experiment too.
    """
    run, experiment = os.environ.get("MLFLOW_RUN_ID"), os.environ.get("MLFLOW_EXPERIMENT_ID")
    return run if run and experiment and os.environ.get("MIXTUNE_RUN_ID") else None


def pipeline_tags(pipeline_run: str) -> dict[str, str]:
    """Returns the tags that the parent run of a pipeline run is found by."""
    return {RUN_ID: pipeline_run, STEP: "pipeline", "mixtune.kfp_run": pipeline_run}


def parent_run(
    client: MlflowClient,
    experiment: str,
    pipeline_run: str,
    name: str,
    tags: Mapping[str, str],
    time: int | None = None,
    child: str | None = None,
) -> Run:
    """Gets or makes the parent run of a pipeline run, by the pipeline run's id.

    Args:
        name: name of the run, if it has to be made.
        tags: its further tags, if it has to be made.
        time: when it began, in milliseconds; now without it.
        child: a run that KFP's plugin made; the root of its tree then is the parent run.
    """
    found = client.search_runs(
        [experiment],
        filter_string=f"tags.`{RUN_ID}` = '{pipeline_run}' and tags.`{STEP}` = 'pipeline'",
        order_by=["attributes.start_time ASC"],
        max_results=1,
    )
    if found:
        return found[0]
    wanted = {**pipeline_tags(pipeline_run), **tags}
    if child is None:
        return create_run(client, experiment, name, wanted, time)
    root = _root_of(client, child)
    for tag, value in wanted.items():
        client.set_tag(root.info.run_id, tag, value)
    return root


def _root_of(client: MlflowClient, run_id: str) -> Run:
    run = client.get_run(run_id)
    for _ in range(_DEEPEST):
        above = run.data.tags.get(PARENT)
        if not above:
            break
        run = client.get_run(above)
    return run


def create_run(
    client: MlflowClient, experiment: str, name: str, tags: Mapping[str, Any], time: int | None = None
) -> Run:
    """Makes a run, with a name and tags in ASCII where MLflow does not take them as they are."""
    try:
        return client.create_run(experiment, start_time=time, run_name=name, tags=dict(tags))
    except Exception as error:
        plain = in_ascii({"name": name, "tags": dict(tags)})
        if not is_rejected(error) or plain == {"name": name, "tags": tags}:
            raise
        return client.create_run(experiment, start_time=time, run_name=plain["name"], tags=plain["tags"])


def adopt_run(client: MlflowClient, run_id: str, title: str, tags: Mapping[str, str]) -> None:
    """Takes the run that KFP's plugin made for this task: names it and marks it as the run of a step."""
    client.update_run(run_id, status="RUNNING", name=title)
    for tag, value in tags.items():
        client.set_tag(run_id, tag, value)


def open_step_run(
    client: MlflowClient, experiment: str, pipeline_run: str, parent: str, title: str, tags: Mapping[str, str]
) -> str:
    """Opens the run of a step of a pipeline run, and ends the runs that killed attempts at the step left open.

    Returns:
        The run's id: of a new run, or of the one that KFP's plugin made for this task.

    Raises:
        RefusedError: if this step of this pipeline run was refused before.
    """
    attempts = step_runs_of(client, experiment, pipeline_run, title)
    refuse_again(attempts)
    tags = {**tags, RUN_ID: pipeline_run, "mixtune.kfp_run": pipeline_run}
    if injected := injected_run():
        adopt_run(client, injected, title, tags)
        run = client.get_run(injected)
    else:
        run = create_run(client, experiment, title, {**tags, PARENT: parent})
    replace_earlier(client, run, attempts)
    return str(run.info.run_id)


def step_runs_of(client: MlflowClient, experiment: str, pipeline_run: str, title: str | None = None) -> list[Run]:
    """Returns the runs of a pipeline run's steps, oldest first; only the attempts at one step where a title is given."""
    query = f"tags.`{RUN_ID}` = '{pipeline_run}' and tags.`{STEP}` != 'pipeline'"
    query += f" and attributes.run_name = '{title}'" if title else ""
    return list(client.search_runs([experiment], query, order_by=["attributes.start_time ASC"], max_results=1000))


def refuse_again(attempts: list[Run]) -> None:
    """Ends a retry of a step that was refused, before it does anything: its inputs are the same, and so is the answer.

    Raises:
        RefusedError: with the sentence of the refusal on record.
    """
    for attempt in reversed(attempts):
        if attempt.data.tags.get(f"{OUTCOME}kind") == "refused":
            raise RefusedError(attempt.data.tags.get(f"{OUTCOME}sentence", "was refused before"))


def replace_earlier(client: MlflowClient, run: Run, attempts: list[Run]) -> None:
    """Ends the runs that killed attempts at the same step left open."""
    for attempt in attempts:
        earlier = attempt.info.start_time <= run.info.start_time and attempt.info.run_id != run.info.run_id
        if earlier and attempt.info.status == "RUNNING":
            client.set_tag(attempt.info.run_id, REPLACED_BY, run.info.run_id)
            client.set_terminated(attempt.info.run_id, "KILLED")


def close_pipeline_run(
    client: MlflowClient, parent: str, status: str, verdict: str, own: str | None = None, time: int | None = None
) -> None:
    """Ends the parent run of a pipeline run with its verdict, and every run that a step of it left open.

    A step leaves its run open where it was killed, or where MLflow did not take its last batch.

    Args:
        status: of the parent run. Where it is FINISHED, so is a step that left no record of its end; else it was killed.
        own: run of the step that does this, which goes on.
        time: when the pipeline run ended, in milliseconds; now without it.
    """
    of_parent = client.get_run(parent)
    pipeline_run = of_parent.data.tags.get(RUN_ID, "")
    for step in step_runs_of(client, of_parent.info.experiment_id, pipeline_run):
        if step.info.status == "RUNNING" and step.info.run_id != own:
            kind = step.data.tags.get(f"{OUTCOME}kind")
            left_open = "FINISHED" if status == "FINISHED" else "KILLED"
            client.set_terminated(step.info.run_id, status_of(kind) if kind else left_open, end_time=time)
    set_tag(client, parent, "mixtune.verdict", verdict)
    client.set_terminated(parent, status, end_time=time)


def set_tag(client: MlflowClient, run_id: str, name: str, value: str) -> None:
    """Sets a tag, in ASCII or not at all where MLflow does not take it."""
    send: Callable[[str], object] = lambda text: client.set_tag(run_id, name, text[:5000])  # noqa: E731
    send_text(send, value, f"the tag {name}")
