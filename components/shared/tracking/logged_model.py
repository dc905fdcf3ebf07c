"""Logs a model folder as an MLflow logged model, without loading it, and links what was measured of it.

MLflow's own flavor for transformers loads the weights to save them, and would store only the class that its pipeline uses,
without the model card and the LM head, which is needed to measure forgetting. Its predictions are those of the pipeline: of
several labels the most likely one alone, and none for question answering. Here the files are copied as they are. Of the model
only its configuration and its tokenizer are read, so that the memory does not grow with the weights.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import serving
from ..artifacts import write_json
from ..config import Task
from ..startup import quick_imports
from ..task_kinds import TASK_KINDS

if TYPE_CHECKING:
    from mlflow import MlflowClient

SERVING = "mixtune_serving"
"""Name of the copy of `shared/serving` in a logged model."""
SETTINGS = "mixtune_serving.json"
"""Settings of the predictions, in the model folder."""
MODEL = "model"
"""Subfolder of a logged model with the model folder."""
PIPELINES = {
    "text-classification": "TextClassificationPipeline",
    "text-generation": "TextGenerationPipeline",
    "feature-extraction": "FeatureExtractionPipeline",
}
"""The class of each pipeline of transformers."""


@dataclass(frozen=True)
class Measurement:
    """A value that was measured of a model.

    Attributes:
        metric: name of the metric.
        value: measured value.
        dataset: name of the data; it is linked to the model and to the metric.
        digest: digest of the data.
        source: where the data is from.
    """

    metric: str
    value: float
    dataset: str
    digest: str
    source: str


def log_model(
    client: MlflowClient, run_id: str, folder: Path, kind: Task, card: str, served: Mapping[str, Any]
) -> tuple[str, str]:
    """Logs a model folder to a run.

    Args:
        run_id: MLflow run that the model is logged to.
        folder: model folder in Hugging Face format.
        kind: the model's task.
        card: model card in Markdown.
        served: settings of the predictions.

    Returns:
        Id and URI of the logged model.
    """
    with quick_imports():
        import mlflow

    # `Model.log` takes no client. The tracking URI is global, but a step runs in its own process.
    mlflow.set_tracking_uri(client.tracking_uri)
    with mlflow.start_run(run_id=run_id):
        info = mlflow.models.Model.log(
            artifact_path=None,
            flavor=_FolderFlavor(folder, card, kind, served),
            flavor_name="transformers",
            name="model",
        )
    return str(info.model_id), str(info.model_uri)


def link_measurements(client: MlflowClient, run_id: str, model_id: str, measurements: Sequence[Measurement]) -> None:
    """Links measured values and their data to a logged model."""
    from mlflow.entities import Dataset, DatasetInput, InputTag, Metric

    from .fitting_client import DATASET_DIGEST_CHARACTERS as LONGEST

    if not measurements:
        return
    data = {
        one.dataset: Dataset(one.dataset, one.digest, source_type="mixtune", source=one.source) for one in measurements
    }
    use = [InputTag("mlflow.data.context", "evaluation")]
    client.log_inputs(run_id, [DatasetInput(one, use) for one in data.values()])
    now = int(time.time() * 1000)
    client.log_batch(
        run_id,
        metrics=[
            Metric(one.metric, one.value, now, 0, model_id, one.dataset, one.digest[:LONGEST], run_id)
            for one in measurements
        ],
    )


class _FolderFlavor:
    """A flavor that writes an MLflow model from a folder. See `log_model` for the arguments."""

    def __init__(self, folder: Path, card: str, kind: Task, served: Mapping[str, Any]) -> None:
        self._folder, self._card, self._kind, self._served = folder, card, kind, served

    def save_model(self, path: str, mlflow_model: Any, **_: Any) -> None:
        """Writes the model. Called by MLflow."""
        import mlflow

        mlflow.pyfunc.save_model(
            path=path,
            loader_module=f"{SERVING}.predictor",
            mlflow_model=mlflow_model,
            pip_requirements=[f"{package}=={_version(package)}" for package in self._packages()],
        )
        to = Path(path)
        tokenizer = to / "components" / "tokenizer"  # MLflow's loader wants one there
        for part in (to / MODEL, tokenizer):
            part.mkdir(parents=True)
        for file in filter(Path.is_file, self._folder.iterdir()):
            _link_or_copy(file, to / MODEL / file.name)
            if file.suffix not in (".safetensors", ".jsonl"):  # weights and the curve of the training
                shutil.copyfile(file, tokenizer / file.name)
        write_json(to / MODEL / SETTINGS, dict(self._served))
        (to / "README.md").write_text(self._card, encoding="utf-8")
        package = Path(serving.__file__).parent
        shutil.copytree(package, to / "code" / SERVING, ignore=shutil.ignore_patterns("__pycache__"))
        mlflow_model.flavors["python_function"] |= {"code": "code", "data": MODEL}
        mlflow_model.add_flavor("transformers", **self._transformers_flavor())
        mlflow_model.signature = _signature(self._kind, self._served)
        mlflow_model.model_size_bytes = sum(file.stat().st_size for file in to.rglob("*") if file.is_file())
        mlflow_model.save(str(to / "MLmodel"))

    def _packages(self) -> list[str]:
        has_adapter = (self._folder / "adapter_config.json").is_file()
        quantized = ["accelerate", "bitsandbytes"] if self._served.get("quantized") else []
        return ["torch", "transformers", *(["peft"] if has_adapter else []), *quantized]

    def _transformers_flavor(self) -> dict[str, Any]:
        """Returns what `mlflow.transformers.load_model` needs to know of the folder."""
        from transformers import AutoTokenizer

        config = json.loads((self._folder / "config.json").read_text(encoding="utf-8"))
        task = TASK_KINDS[self._kind].pipeline or "feature-extraction"
        return {
            "transformers_version": _version("transformers"),
            "code": "code",
            "task": task,
            "instance_type": PIPELINES[task],
            "torch_dtype": "torch.float32",
            "pipeline_model_type": config["architectures"][0],
            "source_model_name": self._folder.name,
            "model_binary": MODEL,
            "tokenizer_type": type(AutoTokenizer.from_pretrained(self._folder, trust_remote_code=False)).__name__,
            "components": ["tokenizer"],
        }


def _link_or_copy(file: Path, to: Path) -> None:
    """Makes a hard link, which takes no space; a copy where the file systems differ."""
    try:
        to.hardlink_to(file.resolve())
    except OSError:
        shutil.copyfile(file, to)


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
    return version(package).split("+")[0]
