"""The MLflow model registry: one version for one model."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import Task
from ..errors import RefusedError
from ..startup import quick_imports
from .connection import patience
from .mlflow_text import send_text

if TYPE_CHECKING:
    from mlflow import MlflowClient

DIGEST = "mixtune.digest"
MODEL = "model"
"""Where MLflow's flavor keeps the weights in a logged model."""
PIPELINES: dict[Task, tuple[str | None, str]] = {
    "classification": ("text-classification", "AutoModelForSequenceClassification"),
    "multi_label": ("text-classification", "AutoModelForSequenceClassification"),
    "regression": ("text-classification", "AutoModelForSequenceClassification"),
    "question_answering": (None, "AutoModelForQuestionAnswering"),
    "generation": ("text-generation", "AutoModelForCausalLM"),
}
"""Pipeline and class of transformers for each task; there is no pipeline for question answering any more."""


def register(
    client: MlflowClient,
    run_id: str,
    folder: Path,
    name: str,
    alias: str,
    kind: Task,
    tags: Mapping[str, str],
    card: str,
) -> str:
    """Makes a version of a registered model, unless the same weights, labels and tokenizer made one; sets the alias.

    The version carries the model's digest from the moment it is there, so that a kill at any point leaves either no
    version or one that the next attempt finds.

    Args:
        run_id: the MLflow run that the model is logged with.
        folder: model folder in Hugging Face format.
        name: registered model.
        alias: alias that will point to the version.
        kind: what the model is for.
        tags: lineage of the version.
        card: its model card, Markdown, for people.

    Returns:
        The version.
    """
    digest = _digest(folder)
    with patience(60, 2):
        version = _version_with(client, name, digest)
        if version is None:
            model_id, uri = _log_model(client, run_id, folder, kind, card)
            version = _make_version(client, run_id, name, model_id, uri, digest)
        # Apart from the version, since a text that MLflow does not take must not cost a model.
        for tag, value in tags.items():
            set_tag = partial(client.set_model_version_tag, name, version, tag)
            send_text(set_tag, value, f"the tag {tag} of the version")
        describe = partial(client.update_model_version, name, version)
        send_text(describe, card, "the description of the version")
        client.set_registered_model_alias(name, alias, version)
    return version


def version_behind(client: MlflowClient, uri: str) -> str | None:
    """`models:/name/version` for a `models:/name@alias` or a `models:/name/version`.

    Returns:
        None where there is no such alias (yet).

    Raises:
        RefusedError: where there is no such version.
    """
    from mlflow.exceptions import MlflowException

    name, alias, number = parse(uri)
    try:
        found = client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(name, number)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        if alias:
            return None
        raise RefusedError(f"evaluate.champion: the registry has no {uri}; correct the version") from None
    return f"models:/{name}/{found.version}"


def fetch(client: MlflowClient, uri: str, folder: Path) -> Path:
    """Brings a registered model here, in the form in which mixtune made it.

    Args:
        uri: `models:/name/version`.
        folder: where to; must be empty.

    Returns:
        The model folder.

    Raises:
        RefusedError: where mixtune did not make it.
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
    """Name, alias and version of a `models:/` URI; either an alias or a version."""
    name, _, alias = uri.removeprefix("models:/").partition("@")
    if alias:
        return name, alias, ""
    name, _, number = name.rpartition("/")
    return name, None, number


def _version_with(client: MlflowClient, name: str, digest: str) -> str | None:
    found = client.search_model_versions(f"name = '{name}'", max_results=1000)
    return next((str(version.version) for version in found if version.tags.get(DIGEST) == digest), None)


def _make_version(client: MlflowClient, run_id: str, name: str, model_id: str, uri: str, digest: str) -> str:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    # Asked once: of a request that was lost on its way back, a second one would make a second version.
    with patience(120, 0):
        made = client.create_model_version(name, source=uri, run_id=run_id, tags={DIGEST: digest}, model_id=model_id)
    return str(made.version)


def _log_model(client: MlflowClient, run_id: str, folder: Path, kind: Task, card: str) -> tuple[str, str]:
    """Logs the model with the run; its id and URI."""
    with quick_imports():
        import mlflow
        import torch
        import transformers

    pipeline, class_name = PIPELINES[kind]
    auto = getattr(transformers, class_name)
    model = auto.from_pretrained(folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    # log_model knows no client; a step is a process of its own, so this global is nobody else's.
    mlflow.set_tracking_uri(client.tracking_uri)
    with mlflow.start_run(run_id=run_id):
        info = mlflow.models.Model.log(
            artifact_path=None,
            flavor=_Whole(folder, card, predicts=pipeline is not None),
            transformers_model={"model": model, "tokenizer": tokenizer},
            name="model",
            task=pipeline or "feature-extraction",
            pip_requirements=[f"{package}=={_version(package)}" for package in ("torch", "transformers")],
        )
    return str(info.model_id), str(info.model_uri)


class _Whole:
    """MLflow's flavor for transformers, with the model folder as mixtune made it.

    MLflow would keep the class that its pipeline uses alone, and so lose the language model's head, without which nobody could
    measure later what the model still knows; and the card that says what the model is.

    Args:
        folder: the model folder.
        card: its model card, Markdown.
        predicts: whether transformers has a pipeline for the task. MLflow wants one all the same, so it is given one that takes
            any model; what that would predict by itself means nothing, so MLflow must not offer it. Model and tokenizer are
            then loaded as they are, with `return_type="components"`.
    """

    def __init__(self, folder: Path, card: str, predicts: bool) -> None:
        self._folder, self._card, self._predicts = folder, card, predicts

    def save_model(self, path: str, mlflow_model: Any, **options: Any) -> None:
        """As MLflow's flavors do."""
        import mlflow

        mlflow.transformers.save_model(path=path, mlflow_model=mlflow_model, **options)
        saved = Path(path) / MODEL
        for weights in saved.glob("*.safetensors*"):
            weights.unlink()
        for file in self._folder.iterdir():
            if file.is_file():
                shutil.copyfile(file, saved / file.name)
        (Path(path) / "README.md").write_text(self._card, encoding="utf-8")
        if not self._predicts:
            mlflow_model.flavors.pop("python_function")
            mlflow_model.signature = None
            mlflow_model.save(str(Path(path) / "MLmodel"))


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package).split("+")[0]


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    names = [*sorted(folder.glob("*.safetensors")), folder / "config.json", folder / "tokenizer.json"]
    for file in filter(Path.is_file, names):
        with file.open("rb") as content:
            hashlib.file_digest(content, lambda: digest)
    return digest.hexdigest()
