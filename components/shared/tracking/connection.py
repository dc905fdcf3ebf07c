"""Connects to MLflow's tracking server, and tells what its errors mean."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import MixtuneError, RefusedError, TurnedAwayError, UnreachableError, first_line, without_credentials

if TYPE_CHECKING:
    from mlflow import MlflowClient

OFFLINE = "MIXTUNE_TRACKING_OFFLINE"
_OURS: set[str] = set()


@contextlib.contextmanager
def patience(seconds: int, retries: int) -> Iterator[None]:
    """How long MLflow's client waits for an answer, and how often it asks again; what the user set in the environment holds."""
    wanted = {
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(seconds),
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": str(retries),
        # Or a server that says "come back in an hour" would hold up the step for that hour.
        "MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER": "false",
    }
    ours = {name: value for name, value in wanted.items() if name not in os.environ or name in _OURS}
    before = {name: os.environ.get(name) for name in ours}
    _OURS.update(ours)
    os.environ.update(ours)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                _OURS.discard(name)
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def to_look() -> contextlib.AbstractContextManager[None]:
    """Patience for finding out whether a server answers."""
    return patience(4, 1)


def to_deliver() -> contextlib.AbstractContextManager[None]:
    """Patience for a server that answered before."""
    return patience(10, 1)


def connect(uri: str) -> MlflowClient:
    """A client for a tracking address whose server answers.

    Raises:
        UnreachableError: if nothing answers, also where an address swallows what is sent to it.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    import logging

    # urllib3 warns of every try of its own, and MLflow prints what it raises as well; what matters is said once, in words.
    levels = {"mlflow.store": logging.WARNING, "mlflow.store.db.utils": logging.CRITICAL, "alembic": logging.WARNING}
    for name, level in {**levels, "urllib3.connectionpool": logging.ERROR}.items():
        logging.getLogger(name).setLevel(level)
    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    from mlflow import MlflowClient

    client = MlflowClient(uri, registry_uri=uri)
    try:
        with to_look():
            client.search_experiments(max_results=1)
    except Exception as error:
        raise unreachable(uri, error) from None
    return client


def download_artifact(uri: str, run: str, path: str, folder: Path) -> Path:
    """Downloads a file that a run has on record.

    Raises:
        UnreachableError: if nothing answers.
        RefusedError: if there is no such run, or it has no such file.
    """
    client = connect(uri)
    from mlflow.exceptions import MlflowException

    try:
        return Path(client.download_artifacts(run, path, str(folder)))
    except (MlflowException, OSError) as error:
        raise RefusedError(
            f"{run}: has no {path} in MLflow at {without_credentials(uri)} ({first_line(error)})"
        ) from None


def unreachable(uri: str, error: Exception) -> UnreachableError:
    """The sentence for a server that does not answer, or not to these credentials."""
    if re.search(r"error code 40[13]\b", str(error)):
        return TurnedAwayError(
            f"MLFLOW_TRACKING_URI: the server at {without_credentials(uri)} turns these credentials away; correct "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        )
    if found := re.search(r"database or disk is full|attempt to write a readonly database", str(error)):
        return UnreachableError(
            f"MLFLOW_TRACKING_URI: {without_credentials(uri)} cannot be written ({found[0]}); make room and run again"
        )
    return UnreachableError(
        f"MLFLOW_TRACKING_URI: no MLflow server answers at {without_credentials(uri)} ({first_line(error)}); "
        "start it or correct the address"
    )


def experiment_id(client: MlflowClient, name: str, uri: str) -> str:
    """Finds or makes the experiment; a SQLite store keeps its artifacts next to the database."""
    found = client.get_experiment_by_name(name)
    if found is not None:
        if found.lifecycle_stage == "deleted":
            raise MixtuneError(f"tracking.experiment: {name} is deleted in MLflow; restore it or choose another name")
        return found.experiment_id
    location = None
    if uri.startswith("sqlite:///"):
        location = str((Path(uri.removeprefix("sqlite:///")).parent / "artifacts").absolute())
    try:
        return client.create_experiment(name, artifact_location=location)
    except Exception:
        # Another step of the same run can have been faster.
        found = client.get_experiment_by_name(name)
        if found is None:
            raise
        return found.experiment_id


def came_from_server(error: Exception) -> bool:
    """Tells whether an error is of MLflow's or of the way to it, and not of this program's making."""
    from mlflow.exceptions import MlflowException

    return isinstance(error, MlflowException | OSError)


def offline_allowed() -> bool:
    """Tells whether a step may go on without a tracking server that does not answer."""
    return os.environ.get(OFFLINE) == "1"
