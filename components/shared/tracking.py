"""MLflow: one parent run for each pipeline run, one nested run for each step that ran. The only file that imports mlflow.

The parent is found by the pipeline run's id or made, by whichever step comes first, so that retries and single steps
need no order. Everything goes through `MlflowClient` with explicit run ids: no global state, and `MLFLOW_RUN_ID` in
the environment cannot redirect a nested run.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .config import Task
from .errors import MixtuneError, UnreachableError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

PARENT = "mlflow.parentRunId"
RUN_ID = "mixtune.run_id"
STEP = "mixtune.step"
FLUSH_METRICS = 500
PIPELINES: dict[Task, tuple[str | None, str]] = {
    "classification": ("text-classification", "AutoModelForSequenceClassification"),
    "multi_label": ("text-classification", "AutoModelForSequenceClassification"),
    "regression": ("text-classification", "AutoModelForSequenceClassification"),
    "question_answering": (None, "AutoModelForQuestionAnswering"),
    "generation": ("text-generation", "AutoModelForCausalLM"),
}
"""Pipeline and class of transformers for each task; there is no pipeline for question answering any more."""

Status = Literal["FINISHED", "FAILED", "KILLED"]


def without_credentials(address: str) -> str:
    """A tracking address that may be shown: user and password removed."""
    return re.sub(r"//[^/@]*@", "//", address)


def connect(uri: str) -> MlflowClient:
    """A client for a tracking address, with time limits that a person would wait for.

    Raises:
        UnreachableError: where nothing answers.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    import logging

    for name in ("mlflow.store", "mlflow.store.db.utils", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    from mlflow import MlflowClient

    client = MlflowClient(uri, registry_uri=uri)
    try:
        client.search_experiments(max_results=1)
    except Exception as error:
        raise UnreachableError(
            f"MLFLOW_TRACKING_URI: no MLflow server answers at {without_credentials(uri)} ({_first_line(error)}); "
            "start it or correct the address"
        ) from None
    return client


def _first_line(error: BaseException) -> str:
    text = without_credentials(str(error)).strip().splitlines()
    return text[0][:200] if text else type(error).__name__


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


def parent_run(client: MlflowClient, experiment: str, run_id: str) -> Run:
    """Gets or makes the parent run of a pipeline run, by its id."""
    found = client.search_runs(
        [experiment],
        filter_string=f"tags.`{RUN_ID}` = '{run_id}' and tags.`{STEP}` = 'pipeline'",
        order_by=["attributes.start_time ASC"],
        max_results=1,
    )
    if found:
        return found[0]
    tags = {RUN_ID: run_id, STEP: "pipeline", "mixtune.kfp_run": run_id, **_git_tags()}
    return client.create_run(experiment, run_name=os.environ.get("MIXTUNE_RUN_NAME", run_id), tags=tags)


def close_interrupted(uri: str, experiment: str, run_id: str) -> None:
    """Ends the parent run of a pipeline run that the user interrupted, and the steps that could not do so themselves.

    Raises:
        UnreachableError: where the tracking server does not answer.
    """
    client = connect(uri)
    parent = parent_run(client, experiment_id(client, experiment, uri), run_id)
    tracker = Tracker(client, None, parent.info.run_id)
    for child in tracker.children():
        if child.info.status == "RUNNING":
            client.set_terminated(child.info.run_id, "KILLED")
    tracker.close_parent("KILLED", {"mixtune.verdict": "interrupted"})


def _git_tags() -> dict[str, str]:
    commit = os.environ.get("MIXTUNE_GIT_COMMIT")
    return {"mlflow.source.git.commit": commit, "mixtune.git_commit": commit} if commit else {}


def _tolerant(method: Callable[..., None]) -> Callable[..., None]:
    """A server that goes away does not cost a finished training: what cannot be delivered is said once and left out."""

    @functools.wraps(method)
    def attempt(self: Tracker, *arguments: Any, **options: Any) -> None:
        try:
            method(self, *arguments, **options)
        except Exception as error:
            self._tell_undelivered(error)

    return attempt


class Tracker:
    """One MLflow run. With no client it does nothing, so that steps need not ask.

    Attributes:
        run_id: the nested run of this step; None where nothing is tracked.
        parent_id: the parent run of the pipeline run, where there is one.
    """

    def __init__(self, client: MlflowClient | None, run_id: str | None, parent_id: str | None = None) -> None:
        self.client, self.run_id, self.parent_id = client, run_id, parent_id
        self._metrics: list[Metric] = []
        self._undelivered = False

    @classmethod
    def off(cls) -> Tracker:
        """Tracks nothing."""
        return cls(None, None)

    @classmethod
    def open(cls, step: str, title: str, pipeline_run_id: str | None) -> Tracker:
        """Starts the nested run of one step, as the environment says.

        Raises:
            UnreachableError: where the tracking server does not answer.
        """
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            return cls.off()
        client = connect(uri)
        experiment = experiment_id(client, os.environ.get("MLFLOW_EXPERIMENT_NAME", "mixtune"), uri)
        tags = {STEP: step, **_git_tags()}
        parent_id = None
        if pipeline_run_id:
            parent_id = parent_run(client, experiment, pipeline_run_id).info.run_id
            tags |= {PARENT: parent_id, RUN_ID: pipeline_run_id, "mixtune.kfp_run": pipeline_run_id}
        run = client.create_run(experiment, run_name=title, tags=tags)
        return cls(client, run.info.run_id, parent_id)

    @classmethod
    def attach(cls, run_id: str | None, parent_id: str | None) -> Tracker:
        """Goes on with a run that another process of the same step opened and will close."""
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        return cls(connect(uri), run_id, parent_id) if uri and run_id else cls.off()

    def detach(self) -> None:
        """Delivers what is left, without ending the run."""
        self._flush()

    @_tolerant
    def log_params(self, params: Mapping[str, Any]) -> None:
        """Settings; nested mappings become dotted names, long values are cut."""
        if self.client and self.run_id:
            from mlflow.entities import Param

            flat = [Param(name, str(value)[:6000]) for name, value in _flatten(params)]
            for start in range(0, len(flat), 100):
                self.client.log_batch(self.run_id, params=flat[start : start + 100])

    @_tolerant
    def log_parent_params(self, params: Mapping[str, Any]) -> None:
        """Settings of the whole pipeline run. A retry finds them there already and leaves them."""
        if self.client and self.parent_id:
            from mlflow.entities import Param

            known = self.client.get_run(self.parent_id).data.params
            new = [Param(name, str(value)[:6000]) for name, value in _flatten(params) if name not in known]
            for start in range(0, len(new), 100):
                self.client.log_batch(self.parent_id, params=new[start : start + 100])

    def log_metrics(self, metrics: Mapping[str, float | None], step: int | None = None) -> None:
        """Numbers, sent in batches. A server that goes away meanwhile does not stop the step."""
        if not (self.client and self.run_id):
            return
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        for name, value in metrics.items():
            if value is not None and math.isfinite(value):
                self._metrics.append(Metric(name, float(value), now, step or 0))
        if len(self._metrics) >= FLUSH_METRICS:
            self._flush()

    def _flush(self) -> None:
        if not (self.client and self.run_id):
            return
        try:
            while self._metrics:
                self.client.log_batch(self.run_id, metrics=self._metrics[:FLUSH_METRICS])
                self._metrics = self._metrics[FLUSH_METRICS:]
        except Exception as error:
            self._tell_undelivered(error)

    def _tell_undelivered(self, error: Exception) -> None:
        if not self._undelivered:
            print(f"tracking: something could not be delivered ({_first_line(error)}); going on")  # noqa: T201
        self._undelivered = True

    @_tolerant
    def set_tags(self, tags: Mapping[str, str], parent: bool = False) -> None:
        """Labels of this run, or of the pipeline's parent run."""
        target = self.parent_id if parent else self.run_id
        if self.client and target:
            for name, value in tags.items():
                self.client.set_tag(target, name, value[:5000])

    @_tolerant
    def log_artifact(self, path: str | Path, folder: str | None = None, parent: bool = False) -> None:
        """A file, kept with this run or with the pipeline's parent run."""
        target = self.parent_id if parent else self.run_id
        if self.client and target:
            self.client.log_artifact(target, str(path), folder)

    @_tolerant
    def log_input(self, name: str, digest: str, source: str, context: str) -> None:
        """A data set that this run read, by its digest."""
        if self.client and self.run_id:
            from mlflow.entities import Dataset, DatasetInput, InputTag

            data = Dataset(name=name, digest=digest[:36], source_type="mixtune", source=source)
            self.client.log_inputs(self.run_id, [DatasetInput(data, [InputTag("mlflow.data.context", context)])])

    @_tolerant
    def log_parent_metrics(self, metrics: Mapping[str, float]) -> None:
        """Numbers of the whole pipeline run."""
        if self.client and self.parent_id:
            for name, value in metrics.items():
                if math.isfinite(value):
                    self.client.log_metric(self.parent_id, name, value)

    @_tolerant
    def link(self, runs: Mapping[str, str]) -> None:
        """Notes on the parent run which earlier runs made what came from the cache.

        Args:
            runs: title of a step -> MLflow run that made its outputs.
        """
        if not (self.client and self.parent_id):
            return
        for title, run_id in runs.items():
            try:
                made_by = self.client.get_run(run_id)
            except Exception:
                # Made under another tracking store; the id alone still says which run it was.
                self.set_tags({f"mixtune.cached.{_tag_name(title)}": run_id}, parent=True)
                continue
            if made_by.data.tags.get(PARENT) != self.parent_id:
                self.set_tags({f"mixtune.cached.{_tag_name(title)}": run_id}, parent=True)

    def close(self, status: Status, outcome: Mapping[str, str] | None = None) -> None:
        """Ends the step's run with its outcome."""
        if not (self.client and self.run_id):
            return
        self._flush()
        try:
            if outcome:
                self.set_tags({f"mixtune.outcome.{name}": value for name, value in outcome.items()})
            self.client.set_terminated(self.run_id, status)
        except Exception as error:
            self._undelivered = True
            print(f"tracking: the end of the run could not be delivered ({_first_line(error)})")  # noqa: T201

    def close_parent(self, status: Status, tags: Mapping[str, str]) -> None:
        """Ends the pipeline's parent run with its verdict."""
        if self.client and self.parent_id:
            self.set_tags(tags, parent=True)
            self.client.set_terminated(self.parent_id, status)

    def children(self) -> list[Run]:
        """The nested runs of this pipeline run, oldest first."""
        if not (self.client and self.parent_id):
            return []
        parent = self.client.get_run(self.parent_id)
        return list(
            self.client.search_runs(
                [parent.info.experiment_id],
                filter_string=f"tags.`{PARENT}` = '{self.parent_id}'",
                order_by=["attributes.start_time ASC"],
                max_results=1000,
            )
        )

    def parent_tags(self) -> dict[str, str]:
        """Tags of the pipeline's parent run."""
        if not (self.client and self.parent_id):
            return {}
        return dict(self.client.get_run(self.parent_id).data.tags)

    def register_model(
        self, folder: Path, name: str, alias: str, kind: Task, tags: Mapping[str, str], files: Iterable[Path]
    ) -> str | None:
        """Makes a version of a registered model, unless the same weights, labels and tokenizer made one; sets the alias.

        Args:
            folder: model folder in Hugging Face format.
            name: registered model.
            alias: alias that will point to the version.
            kind: what the model is for.
            tags: lineage of the version.
            files: what goes along with the model on this run, such as the report.

        Returns:
            The version, or None where nothing is tracked.
        """
        if not (self.client and self.run_id):
            return None
        for file in files:
            self.log_artifact(file, "report")
        digest = _model_digest(folder)
        version = self._version_with(name, digest)
        if version is None:
            version = self._log_and_register(folder, name, kind)
        for tag, value in {**tags, "mixtune.digest": digest}.items():
            self.client.set_model_version_tag(name, version, tag, value)
        self.client.set_registered_model_alias(name, alias, version)
        return version

    def _version_with(self, name: str, digest: str) -> str | None:
        assert self.client is not None
        found = self.client.search_model_versions(f"name = '{name}'", max_results=1000)
        return next((str(v.version) for v in found if v.tags.get("mixtune.digest") == digest), None)

    def _log_and_register(self, folder: Path, name: str, kind: Task) -> str:
        import mlflow
        import torch
        import transformers

        pipeline, class_name = PIPELINES[kind]
        auto = getattr(transformers, class_name)
        model = auto.from_pretrained(folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        assert self.client is not None
        # log_model knows no client; a step is a process of its own, so this global is nobody else's.
        mlflow.set_tracking_uri(self.client.tracking_uri)
        log = mlflow.transformers.log_model
        if pipeline is None:
            log = functools.partial(mlflow.models.Model.log, artifact_path=None, flavor=_Components)
        with mlflow.start_run(run_id=self.run_id):
            info = log(
                transformers_model={"model": model, "tokenizer": tokenizer},
                name="model",
                task=pipeline or "feature-extraction",
                registered_model_name=name,
                pip_requirements=[f"{package}=={_version(package)}" for package in ("torch", "transformers")],
            )
        return str(info.registered_model_version)


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


def _model_digest(folder: Path) -> str:
    digest = hashlib.sha256()
    names = [*sorted(folder.glob("*.safetensors")), folder / "config.json", folder / "tokenizer.json"]
    for file in filter(Path.is_file, names):
        with file.open("rb") as content:
            for block in iter(lambda: content.read(1 << 20), b""):
                digest.update(block)
    return digest.hexdigest()


def _tag_name(title: str) -> str:
    return re.sub(r"[^A-Za-z0-9_. /-]", "_", title).replace(" ", ".")


def _flatten(params: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in params.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
