"""Finds registered models for those who serve them: the version that a run registered, its task and where its files are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..config import Task
from ..errors import GateNotMetError, RefusedError
from ..task_kinds import TASK_KINDS
from .mlflow_runs import RUN_ID, STEP
from .registry import parse

if TYPE_CHECKING:
    from mlflow import MlflowClient

REGISTERED = "mixtune.registered_version"
"""Tag of a pipeline's run: the URI of the version that it registered."""


@dataclass(frozen=True)
class RegisteredVersion:
    """A version that mixtune registered.

    Attributes:
        uri: `models:/name/version`.
        name: name of the registered model.
        task: its task.
        location: address of its files in MLflow's artifact store.
        tags: its lineage.
    """

    uri: str
    name: str
    task: Task
    location: str
    tags: Mapping[str, str]


def registered_by(client: MlflowClient, pipeline_run: str) -> str:
    """Returns the URI of the version that a pipeline run registered.

    Args:
        pipeline_run: id of a KFP run or of a local run.

    Raises:
        RefusedError: if MLflow has no such run.
        GateNotMetError: if it registered nothing.
    """
    experiments = [one.experiment_id for one in client.search_experiments()]
    query = f"tags.`{RUN_ID}` = '{pipeline_run}' and tags.`{STEP}` = 'pipeline'"
    runs = client.search_runs(experiments, query, max_results=1)
    if not runs:
        raise RefusedError(f"{pipeline_run}: MLflow has no such run; give the id of a run, or models:/name@alias")
    tags = runs[0].data.tags
    if REGISTERED not in tags:
        why = tags.get("mixtune.verdict") or "it has not ended"
        raise GateNotMetError(f"{pipeline_run}: registered no model, so there is nothing to deploy: {why}")
    return str(tags[REGISTERED])


def registered_version(client: MlflowClient, uri: str) -> RegisteredVersion:
    """Returns what is known of a registered version.

    Args:
        uri: `models:/name@alias` or `models:/name/version`.

    Raises:
        RefusedError: if the registry has no such version, or if another program than mixtune registered it.
    """
    from mlflow.exceptions import MlflowException

    name, alias, number = parse(uri)
    try:
        found = client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(name, number)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        raise RefusedError(f"{uri}: the registry has no such version; correct the name") from None
    kind = found.tags.get("mixtune.task")
    if kind not in TASK_KINDS:
        raise RefusedError(f"{uri}: was not registered by mixtune, so no gate has let it pass")
    location = client.get_model_version_download_uri(name, found.version)
    return RegisteredVersion(f"models:/{name}/{found.version}", name, kind, location, dict(found.tags))
