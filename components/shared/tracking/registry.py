"""The MLflow model registry. The same model is registered once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..artifacts import ModelCard
from ..config import Task
from ..errors import RefusedError
from ..task_kinds import TASK_KINDS
from .connection import patience
from .logged_model import MODEL, Measurement, link_measurements, log_model
from .mlflow_text import send_text

if TYPE_CHECKING:
    from mlflow import MlflowClient

DIGEST = "mixtune.digest"


def register(
    client: MlflowClient,
    run_id: str,
    folder: Path,
    name: str,
    alias: str,
    kind: Task,
    tags: Mapping[str, str],
    source: Mapping[str, str],
    measurements: Sequence[Measurement],
    card: str,
    max_length: int,
    max_new_tokens: int | None,
) -> str:
    """Registers a version of a model, unless one with the same weights, labels and tokenizer exists. Then sets the alias.

    The model's digest is set when the version is created, so that an interrupted attempt leaves either no version or one that
    the next attempt finds.

    Args:
        run_id: MLflow run that the model is logged to.
        folder: model folder in Hugging Face format.
        name: name of the registered model.
        alias: alias to set on the version.
        kind: the model's task.
        tags: lineage of the version.
        source: the run that made the model, as tags of the logged model.
        measurements: what was measured of the model, and on which data.
        card: model card in Markdown.
        max_length: maximum length of an input, in tokens.
        max_new_tokens: maximum length of a generated answer, in tokens; None for tasks with a head.

    Returns:
        The version.
    """
    served = {
        "auto_class": TASK_KINDS[kind].auto_class,
        "target": TASK_KINDS[kind].target,
        "max_length": max_length,
        "max_new_tokens": max_new_tokens,
    }
    model_card = ModelCard.load(folder)
    served |= {name: True for name in ("chat", "quantized") if getattr(model_card, name)}
    digest = _digest(folder, served)
    with patience(60, 2):
        version = _version_with(client, name, digest)
        if version is None:
            model_id, uri = log_model(client, run_id, folder, kind, card, served)
            for tag, value in {**tags, **source}.items():
                set_one = partial(_set_model_tag, client, model_id, tag)
                send_text(set_one, value, f"the tag {tag} of the model")
            link_measurements(client, run_id, model_id, measurements)
            version = _make_version(client, run_id, name, model_id, uri, digest)
        # Set separately from the version: a text that MLflow rejects must not prevent the registration.
        for tag, value in tags.items():
            set_tag = partial(client.set_model_version_tag, name, version, tag)
            send_text(set_tag, value, f"the tag {tag} of the version")
        describe = partial(client.update_model_version, name, version)
        send_text(describe, card, "the description of the version")
        client.set_registered_model_alias(name, alias, version)
    return version


def version_behind(client: MlflowClient, uri: str) -> str | None:
    """Resolves a `models:/name@alias` or `models:/name/version` URI to `models:/name/version`.

    Returns:
        The resolved URI; None if there is no such alias (yet).

    Raises:
        RefusedError: if there is no such version.
    """
    from mlflow.exceptions import MlflowException

    name, alias, number = parse(uri)
    try:
        version = client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(name, number)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        if alias:
            return None
        raise RefusedError(f"evaluate.champion: the registry has no {uri}; correct the version") from None
    return f"models:/{name}/{version.version}"


def fetch(client: MlflowClient, uri: str, folder: Path) -> Path:
    """Downloads a registered model in the format that mixtune writes.

    Args:
        uri: `models:/name/version`.
        folder: destination; must be empty.

    Returns:
        The model folder.

    Raises:
        RefusedError: if mixtune did not register the model.
    """
    import mlflow

    with patience(120, 2):
        mlflow.artifacts.download_artifacts(uri, dst_path=str(folder), tracking_uri=client.tracking_uri)
    if not (folder / MODEL / "mixtune.json").is_file():
        raise RefusedError(
            f"evaluate.champion: {uri} was not registered by mixtune, so it cannot be measured like the others"
        )
    return folder / MODEL


def parse(uri: str) -> tuple[str, str | None, str]:
    """Splits a `models:/` URI into name, alias and version. Either the alias or the version is set."""
    name, _, alias = uri.removeprefix("models:/").partition("@")
    if alias:
        return name, alias, ""
    name, _, number = name.rpartition("/")
    return name, None, number


def _version_with(client: MlflowClient, name: str, digest: str) -> str | None:
    versions = client.search_model_versions(f"name = '{name}'", max_results=1000)
    return next((str(version.version) for version in versions if version.tags.get(DIGEST) == digest), None)


def _set_model_tag(client: MlflowClient, model_id: str, tag: str, value: str) -> None:
    client.set_logged_model_tags(model_id, {tag: value})


def _make_version(client: MlflowClient, run_id: str, name: str, model_id: str, uri: str, digest: str) -> str:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    # Without retries: if only the response was lost, a second request would create a second version.
    with patience(120, 0):
        made = client.create_model_version(name, source=uri, run_id=run_id, tags={DIGEST: digest}, model_id=model_id)
    return str(made.version)


def _digest(folder: Path, served: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(served, sort_keys=True).encode())
    names = [*sorted(folder.glob("*.safetensors")), folder / "config.json", folder / "tokenizer.json"]
    names += [folder / "chat_template.jinja", folder / "adapter_config.json"]
    for file in filter(Path.is_file, names):
        with file.open("rb") as content:
            hashlib.file_digest(content, lambda: digest)
    return digest.hexdigest()
