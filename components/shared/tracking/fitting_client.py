"""MLflow's client, which cuts every text to the length that the server's database stores.

MLflow declares the lengths as columns of its tables. SQLite ignores them; PostgreSQL and MySQL refuse longer text, and the
operation fails.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, Param, RunTag

from .mlflow_text import TAG_CHARACTERS

NAME_CHARACTERS = 250
PARAMETER_CHARACTERS = 6000
DESCRIPTION_CHARACTERS = 5000
DATASET_NAME_CHARACTERS = 500
DATASET_DIGEST_CHARACTERS = 36
DATASET_SOURCE_CHARACTERS = 65535


def cut(text: Any, characters: int) -> str:
    """Returns the text, or its beginning and three dots if it is longer than `characters`."""
    whole = str(text)
    return whole if len(whole) <= characters else f"{whole[: characters - 3]}..."


def _cut_values(values: Mapping[str, Any] | None) -> dict[str, str]:
    return {name: cut(value, TAG_CHARACTERS) for name, value in (values or {}).items()}


class FittingClient(MlflowClient):  # type: ignore[misc]  # MLflow has no types
    """MLflow's client with the methods that send text of any length. Names that identify something are never cut."""

    def create_run(
        self, experiment_id: str, start_time: int | None = None, tags: Any = None, run_name: str | None = None
    ) -> Any:
        """Creates a run."""
        name = None if run_name is None else cut(run_name, NAME_CHARACTERS)
        return super().create_run(experiment_id, start_time, _cut_values(tags), name)

    def update_run(self, run_id: str, status: str | None = None, name: str | None = None) -> None:
        """Sets the status and the name of a run."""
        super().update_run(run_id, status, None if name is None else cut(name, NAME_CHARACTERS))

    def set_tag(self, run_id: str, key: str, value: Any, synchronous: bool | None = None) -> Any:
        """Sets a tag of a run."""
        return super().set_tag(run_id, key, cut(value, TAG_CHARACTERS), synchronous)

    def log_param(self, run_id: str, key: str, value: Any, synchronous: bool | None = None) -> Any:
        """Logs a parameter of a run."""
        return super().log_param(run_id, key, cut(value, PARAMETER_CHARACTERS), synchronous)

    def log_batch(
        self,
        run_id: str,
        metrics: Sequence[Any] = (),
        params: Sequence[Param] = (),
        tags: Sequence[RunTag] = (),
        synchronous: bool | None = None,
    ) -> Any:
        """Logs metrics, parameters and tags of a run."""
        params = [Param(one.key, cut(one.value, PARAMETER_CHARACTERS)) for one in params]
        tags = [RunTag(one.key, cut(one.value, TAG_CHARACTERS)) for one in tags]
        return super().log_batch(run_id, metrics, params, tags, synchronous)

    def log_inputs(
        self, run_id: str, datasets: Sequence[DatasetInput] | None = None, models: Sequence[Any] | None = None
    ) -> None:
        """Logs the data sets that a run read."""
        super().log_inputs(run_id, [_cut_input(one) for one in datasets or []], models)

    def set_model_version_tag(
        self, name: str, version: Any = None, key: Any = None, value: Any = None, *rest: Any
    ) -> None:
        """Sets a tag of a model version."""
        super().set_model_version_tag(name, version, key, cut(value, TAG_CHARACTERS), *rest)

    def update_model_version(self, name: str, version: str, description: str | None = None) -> Any:
        """Sets the description of a model version."""
        text = None if description is None else cut(description, DESCRIPTION_CHARACTERS)
        return super().update_model_version(name, version, text)


def _cut_input(one: DatasetInput) -> DatasetInput:
    data = one.dataset
    fitting = Dataset(
        name=cut(data.name, DATASET_NAME_CHARACTERS),
        digest=data.digest[:DATASET_DIGEST_CHARACTERS],
        source_type=data.source_type,
        source=cut(data.source, DATASET_SOURCE_CHARACTERS),
    )
    return DatasetInput(fitting, one.tags)
