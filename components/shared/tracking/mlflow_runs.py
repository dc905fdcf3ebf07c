"""The MLflow runs of a pipeline run: a parent run and one nested run for each step. Finds, creates and ends them.

KFP's own MLflow plugin, if it is enabled and injects its variables into tasks, creates these runs before a step starts: a run
for the pipeline run, and nested runs for its tasks and DAG nodes. These runs are then used instead of new ones.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
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
"""Maximum depth of parents. KFP nests the runs of DAG nodes; a longer chain is a cycle."""


def injected_run() -> str | None:
    """Returns the id of the run that KFP's MLflow plugin made for this task.

    MLFLOW_RUN_ID alone, which a user can set in a shell, is not sufficient: the plugin sets the experiment too.
    """
    run, experiment = os.environ.get("MLFLOW_RUN_ID"), os.environ.get("MLFLOW_EXPERIMENT_ID")
    return run if run and experiment and os.environ.get("MIXTUNE_RUN_ID") else None


def pipeline_tags(pipeline_run: str) -> dict[str, str]:
    """Returns the tags that identify the parent run of a pipeline run."""
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
    """Returns the parent run of a pipeline run, which it finds by the pipeline run's id. Creates it if needed.

    Args:
        name: name for a new run.
        tags: further tags for a new run.
        time: start time for a new run, in milliseconds; by default now.
        child: a run that KFP's plugin created; the root of its tree becomes the parent run.
    """
    runs = client.search_runs(
        [experiment],
        filter_string=f"tags.`{RUN_ID}` = '{pipeline_run}' and tags.`{STEP}` = 'pipeline'",
        order_by=["attributes.start_time ASC"],
        max_results=1,
    )
    if runs:
        return runs[0]
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
    """Creates a run. If MLflow rejects its name or tags, they are converted to ASCII."""
    try:
        return client.create_run(experiment, start_time=time, run_name=name, tags=dict(tags))
    except Exception as error:
        plain = in_ascii({"name": name, "tags": dict(tags)})
        if not is_rejected(error) or plain == {"name": name, "tags": tags}:
            raise
        return client.create_run(experiment, start_time=time, run_name=plain["name"], tags=plain["tags"])


def adopt_run(client: MlflowClient, run_id: str, title: str, tags: Mapping[str, str]) -> None:
    """Uses the run that KFP's plugin created for this task: sets its name and its step tags."""
    client.update_run(run_id, status="RUNNING", name=title)
    for tag, value in tags.items():
        client.set_tag(run_id, tag, value)


def open_step_run(
    client: MlflowClient, experiment: str, pipeline_run: str, parent: str, title: str, tags: Mapping[str, str]
) -> str:
    """Opens the run of a step, and ends runs that killed attempts at the step left open.

    Returns:
        The id of a new run, or of the run that KFP's plugin created for this task.

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
    """Returns the runs of a pipeline run's steps, oldest first. With a title, returns only the attempts at that step."""
    query = f"tags.`{RUN_ID}` = '{pipeline_run}' and tags.`{STEP}` != 'pipeline'"
    query += f" and attributes.run_name = '{title}'" if title else ""
    return list(client.search_runs([experiment], query, order_by=["attributes.start_time ASC"], max_results=1000))


def refuse_again(attempts: list[Run]) -> None:
    """Fails a retry of a step that was refused before: with the same inputs it would be refused again.

    Raises:
        RefusedError: with the recorded message of the refusal.
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
    """Ends the parent run of a pipeline run with its verdict, and all runs that its steps left open.

    A step leaves its run open if it was killed or if MLflow did not receive its last batch.

    Args:
        status: status of the parent run. If it is FINISHED, open runs without an outcome are FINISHED too, else KILLED.
        own: run of the calling step, which stays open.
        time: end time of the pipeline run, in milliseconds; by default now.
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
    """Sets a tag. If MLflow rejects it, it is converted to ASCII; if that is rejected too, the tag is omitted."""
    send_text(partial(client.set_tag, run_id, name), value, f"the tag {name}")
