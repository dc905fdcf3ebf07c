"""The MLflow model registry: one version for one model. This file and `delivery.py` are the only ones that import mlflow."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import Task
from .delivery import patience

if TYPE_CHECKING:
    from mlflow import MlflowClient

DIGEST = "mixtune.digest"
PIPELINES: dict[Task, tuple[str | None, str]] = {
    "classification": ("text-classification", "AutoModelForSequenceClassification"),
    "multi_label": ("text-classification", "AutoModelForSequenceClassification"),
    "regression": ("text-classification", "AutoModelForSequenceClassification"),
    "question_answering": (None, "AutoModelForQuestionAnswering"),
    "generation": ("text-generation", "AutoModelForCausalLM"),
}
"""Pipeline and class of transformers for each task; there is no pipeline for question answering any more."""


def register(
    client: MlflowClient, run_id: str, folder: Path, name: str, alias: str, kind: Task, tags: Mapping[str, str]
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

    Returns:
        The version.
    """
    digest = _digest(folder)
    with patience(60, 2):
        version = _version_with(client, name, digest)
        if version is None:
            model_id, uri = _log_model(client, run_id, folder, kind)
            version = _make_version(client, run_id, name, model_id, uri, {**tags, DIGEST: digest})
        else:
            for tag, value in tags.items():
                client.set_model_version_tag(name, version, tag, value)
        client.set_registered_model_alias(name, alias, version)
    return version


def _version_with(client: MlflowClient, name: str, digest: str) -> str | None:
    found = client.search_model_versions(f"name = '{name}'", max_results=1000)
    return next((str(version.version) for version in found if version.tags.get(DIGEST) == digest), None)


def _make_version(
    client: MlflowClient, run_id: str, name: str, model_id: str, uri: str, tags: Mapping[str, str]
) -> str:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    # Asked once: of a request that was lost on its way back, a second one would make a second version.
    with patience(120, 0):
        made = client.create_model_version(name, source=uri, run_id=run_id, tags=dict(tags), model_id=model_id)
    return str(made.version)


def _log_model(client: MlflowClient, run_id: str, folder: Path, kind: Task) -> tuple[str, str]:
    """Logs the model with the run; its id and URI."""
    import mlflow
    import torch
    import transformers

    pipeline, class_name = PIPELINES[kind]
    auto = getattr(transformers, class_name)
    model = auto.from_pretrained(folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    # log_model knows no client; a step is a process of its own, so this global is nobody else's.
    mlflow.set_tracking_uri(client.tracking_uri)
    log = mlflow.transformers.log_model
    if pipeline is None:
        log = functools.partial(mlflow.models.Model.log, artifact_path=None, flavor=_Components)
    with mlflow.start_run(run_id=run_id):
        info = log(
            transformers_model={"model": model, "tokenizer": tokenizer},
            name="model",
            task=pipeline or "feature-extraction",
            pip_requirements=[f"{package}=={_version(package)}" for package in ("torch", "transformers")],
        )
    return str(info.model_id), str(info.model_uri)


class _Components:
    """Saves a model that transformers has no pipeline for.

    MLflow wants one all the same, so it is given one that takes any model; what that would predict by itself means nothing, so
    MLflow must not offer it. The model and its tokenizer are loaded as they are, with `return_type="components"`.
    """

    @staticmethod
    def save_model(path: str, mlflow_model: Any, **options: Any) -> None:
        """As MLflow's flavors do, without the `python_function`."""
        import mlflow

        mlflow.transformers.save_model(path=path, mlflow_model=mlflow_model, **options)
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
            for block in iter(lambda: content.read(1 << 20), b""):
                digest.update(block)
    return digest.hexdigest()
