"""Connects to MLflow's tracking server and interprets its errors."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import RefusedError, TurnedAwayError, UnreachableError, cannot_be_written, first_line, without_credentials

if TYPE_CHECKING:
    from mlflow import MlflowClient

OFFLINE = "MIXTUNE_TRACKING_OFFLINE"
_OURS: set[str] = set()


@contextlib.contextmanager
def patience(seconds: int, retries: int) -> Iterator[None]:
    """Sets the request timeout and the retries of MLflow's client, except where the user set them in the environment."""
    wanted = {
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(seconds),
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": str(retries),
        # Otherwise a server that answers with a Retry-After of one hour would block the step for an hour.
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
    """Returns the timeout settings for checking whether a server answers."""
    return patience(4, 1)


def to_deliver() -> contextlib.AbstractContextManager[None]:
    """Returns the timeout settings for a server that answered before."""
    return patience(10, 1)


def connect(uri: str) -> MlflowClient:
    """Connects to a tracking server and checks that it answers.

    Raises:
        UnreachableError: if it does not answer, also if a firewall drops the requests.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    import logging

    # urllib3 warns of each retry, and MLflow logs the errors that it raises. The step reports a problem once.
    levels = {"mlflow.store": logging.WARNING, "mlflow.store.db.utils": logging.CRITICAL, "alembic": logging.WARNING}
    for name, level in {**levels, "urllib3.connectionpool": logging.ERROR}.items():
        logging.getLogger(name).setLevel(level)
    from .fitting_client import FittingClient

    try:
        if uri.startswith("sqlite:///"):
            Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        client = FittingClient(uri, registry_uri=uri)
        with to_look():
            client.search_experiments(max_results=1)
    except Exception as error:
        if _is_no_address(uri, error):
            raise RefusedError(
                f"MLFLOW_TRACKING_URI: {without_credentials(uri)} cannot be used ({first_line(error)}); give the address of an "
                "MLflow server, such as https://mlflow.example.com, or sqlite:///FILE"
            ) from None
        raise unreachable(uri, error) from None
    return client


def _is_no_address(uri: str, error: Exception) -> bool:
    """Tells whether MLflow cannot use an address at all: a scheme it does not know, a missing driver, a plain folder."""
    from mlflow.exceptions import MlflowException
    from mlflow.tracking.registry import UnsupportedModelRegistryStoreURIException

    if isinstance(error, ImportError | UnsupportedModelRegistryStoreURIException):
        return True
    if isinstance(error, OSError):  # a refused connection is an OSError, too
        return uri.startswith("sqlite:") and cannot_be_written(error) is None
    return isinstance(error, MlflowException) and ("://" not in uri or uri.startswith("file:"))


def download_artifact(uri: str, run: str, path: str, folder: Path) -> Path:
    """Downloads an artifact of a run.

    Raises:
        UnreachableError: if the server does not answer.
        RefusedError: if the run or the artifact does not exist.
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
    """Returns the error for a server that does not answer or that rejects the credentials."""
    if re.search(r"error code 40[13]\b", str(error)):
        return TurnedAwayError(
            f"MLFLOW_TRACKING_URI: the server at {without_credentials(uri)} turns these credentials away; correct "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        )
    if match := re.search(r"database or disk is full|attempt to write a readonly database", str(error)):
        return UnreachableError(
            f"MLFLOW_TRACKING_URI: {without_credentials(uri)} cannot be written ({match[0]}); free space and run again"
        )
    return UnreachableError(
        f"MLFLOW_TRACKING_URI: no MLflow server answers at {without_credentials(uri)} ({first_line(error)}); "
        "start it or correct the address"
    )


def experiment_id(client: MlflowClient, name: str, uri: str) -> str:
    """Returns the experiment's id. Creates the experiment if needed; a SQLite store keeps artifacts next to its database."""
    experiment = client.get_experiment_by_name(name)
    if experiment is not None:
        if experiment.lifecycle_stage == "deleted":
            raise RefusedError(f"tracking.experiment: {name} is deleted in MLflow; restore it or choose another name")
        return experiment.experiment_id
    location = None
    if uri.startswith("sqlite:///"):
        location = str((Path(uri.removeprefix("sqlite:///")).parent / "artifacts").absolute())
    try:
        return client.create_experiment(name, artifact_location=location)
    except Exception:
        # Another step of the same run may have created it.
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            raise
        return experiment.experiment_id


def came_from_server(error: Exception) -> bool:
    """Tells whether an error comes from MLflow or the connection to it, rather than from this program."""
    from mlflow.exceptions import MlflowException

    return isinstance(error, MlflowException | OSError)


def offline_allowed() -> bool:
    """Tells whether a step may continue if the tracking server does not answer."""
    return os.environ.get(OFFLINE) == "1"
