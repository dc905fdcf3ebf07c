"""The MLflow model registry. The same model is registered once."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import serving
from ..artifacts import ModelCard, write_json
from ..config import Task
from ..errors import RefusedError
from ..startup import quick_imports
from ..task_kinds import TASK_KINDS
from .connection import patience
from .mlflow_text import send_text

if TYPE_CHECKING:
    from mlflow import MlflowClient

DIGEST = "mixtune.digest"
SERVING = "mixtune_serving"
"""Name of the copy of `shared/serving` in a logged model."""
SETTINGS = "mixtune_serving.json"
"""Settings of the predictions, in the model folder."""
MODEL = "model"
"""Subfolder of a logged model in which MLflow's flavor stores the weights."""


def register(
    client: MlflowClient,
    run_id: str,
    folder: Path,
    name: str,
    alias: str,
    kind: Task,
    tags: Mapping[str, str],
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
    if ModelCard.load(folder).chat:
        served["chat"] = True
    digest = _digest(folder, served)
    with patience(60, 2):
        version = _version_with(client, name, digest)
        if version is None:
            model_id, uri = _log_model(client, run_id, folder, kind, card, served)
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


def _log_model(
    client: MlflowClient, run_id: str, folder: Path, kind: Task, card: str, served: Mapping[str, Any]
) -> tuple[str, str]:
    """Logs the model to the run and returns its id and URI."""
    with quick_imports():
        import mlflow
        import torch
        import transformers

    pipeline, class_name = TASK_KINDS[kind].pipeline, TASK_KINDS[kind].auto_class
    auto = getattr(transformers, class_name)
    model = auto.from_pretrained(folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    # log_model takes no client. The tracking URI is global, but a step runs in its own process.
    mlflow.set_tracking_uri(client.tracking_uri)
    with mlflow.start_run(run_id=run_id):
        info = mlflow.models.Model.log(
            artifact_path=None,
            flavor=_CompleteFlavor(folder, card, kind, served),
            transformers_model={"model": model, "tokenizer": tokenizer},
            name="model",
            task=pipeline or "feature-extraction",
            pip_requirements=[f"{package}=={_version(package)}" for package in ("torch", "transformers")],
        )
    return str(info.model_id), str(info.model_uri)


class _CompleteFlavor:
    """MLflow's flavor for transformers, but with mixtune's complete model folder, and with predictions as in the report.

    MLflow would store only the class that its pipeline uses. It would drop the model card and the LM head, which is needed to
    measure forgetting. Its predictions are those of the pipeline: of several labels the most likely one alone, and none for
    question answering. The python_function flavor is therefore `serving.predictor`, of which the model holds a copy.

    Args:
        folder: the model folder.
        card: model card in Markdown.
        kind: the model's task.
        served: settings of the predictions.
    """

    def __init__(self, folder: Path, card: str, kind: Task, served: Mapping[str, Any]) -> None:
        self._folder, self._card, self._kind, self._served = folder, card, kind, served

    def save_model(self, path: str, mlflow_model: Any, **options: Any) -> None:
        """Saves the model. Called by MLflow."""
        import mlflow

        mlflow.transformers.save_model(path=path, mlflow_model=mlflow_model, **options)
        saved = Path(path) / MODEL
        for weights in saved.glob("*.safetensors*"):
            weights.unlink()
        for file in self._folder.iterdir():
            if file.is_file():
                shutil.copyfile(file, saved / file.name)
        write_json(saved / SETTINGS, dict(self._served))
        (Path(path) / "README.md").write_text(self._card, encoding="utf-8")
        package = Path(serving.__file__).parent
        shutil.copytree(package, Path(path) / "code" / SERVING, ignore=shutil.ignore_patterns("__pycache__"))
        predictor = {"loader_module": f"{SERVING}.predictor", "code": "code", "data": MODEL}
        mlflow_model.flavors["python_function"] |= predictor
        mlflow_model.signature = _signature(self._kind, self._served)
        mlflow_model.save(str(Path(path) / "MLmodel"))


def _signature(kind: Task, served: Mapping[str, Any]) -> Any:
    """Returns the input of the predictions: one unnamed column of texts, or questions with their contexts."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    roles = TASK_KINDS[kind].inputs
    columns = [ColSpec("string")] if len(roles) == 1 else [ColSpec("string", role) for role in roles]
    limit = served["max_new_tokens"]
    params = None if limit is None else ParamSchema([ParamSpec("max_new_tokens", "long", limit)])
    return ModelSignature(inputs=Schema(columns), params=params)


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package).split("+")[0]


def _digest(folder: Path, served: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(served, sort_keys=True).encode())
    names = [*sorted(folder.glob("*.safetensors")), folder / "config.json", folder / "tokenizer.json"]
    names.append(folder / "chat_template.jinja")
    for file in filter(Path.is_file, names):
        with file.open("rb") as content:
            hashlib.file_digest(content, lambda: digest)
    return digest.hexdigest()
