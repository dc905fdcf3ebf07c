"""What the steps hand to each other: folders with a manifest, at a path and a URI.

A step's `run` takes and fills objects with `path`, `uri` and `metadata`: KFP's own artifacts in a pipeline, `Artifact`
in a shell and in tests.

    data folder         manifest.json and, for each split, tokens.npy, offsets.npy, records.jsonl (see data.py)
    model folder        Hugging Face format with its tokenizer; mixtune.json (`ModelCard`), training.jsonl (the curves)
    evaluation folder   evaluation.json; for each candidate <id>/<split>.documents.jsonl, <id>/<split>.examples.jsonl
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field

from .errors import RefusedError

Kind = Literal["base", "pretrained", "finetuned", "mixed", "interpolated", "champion"]


class ArtifactLike(Protocol):
    """What a step needs of an artifact; KFP's artifacts have it."""

    uri: str
    metadata: dict[str, Any]

    @property
    def path(self) -> str: ...


@dataclass
class Artifact:
    """An artifact outside KFP: a local folder or file."""

    path: str
    uri: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.path = str(self.path)
        self.uri = self.uri or self.path


class ModelCard(BaseModel):
    """`mixtune.json` in a model folder: which candidate it is and where it comes from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["mixtune-model/1"] = "mixtune-model/1"
    id: str
    kind: Kind
    start: str | None = None
    """Id of the model that training started from."""
    name: str = ""
    """The candidate in plain words, such as `mixed, λ = 0.3`; empty where its kind says all."""
    mix_weight: float | None = None
    """λ asked for; None where it is not one number (a schedule, a forgetting budget, pooled mixing)."""
    forgetting_budget: float | None = None
    """Forgetting that λ was adapted to, in bits per byte."""
    realised_mix_weight: float | None = None
    """λ that the gradients really had, averaged over the optimizer steps."""
    weights: str | None = None
    """Where the weights are, if not in this folder: the folder or the hub name of a base model that is used as it is."""
    revision: str | None = None
    """Hub revision of `weights`."""
    has_task_head: bool = False
    """Whether the model was trained on the task, so that a task score says something."""
    labels: list[str] | None = None
    params: dict[str, Any] = Field(default_factory=dict)
    """Settings of the stage that made it."""
    tokens: dict[Literal["pretrain", "finetune"], int] = Field(default_factory=dict)
    """Tokens seen in training in this stage, by stream."""
    steps: int = 0
    seconds: float = 0.0
    """Wall-clock time of the training."""
    device: str = "cpu"
    precision: str = "float32"
    data: dict[str, str] = Field(default_factory=dict)
    """Digest of each stream's training data."""
    base: str = ""
    """Base model and its revision, or `scratch`."""
    mlflow_runs: dict[str, str] = Field(default_factory=dict)
    """MLflow run of each step that led to this model: `{"prepare-pretrain": id, "pretrain": id, ...}`."""

    def save(self, folder: str | Path) -> None:
        write_json(Path(folder) / "mixtune.json", self.model_dump(mode="json"))

    @classmethod
    def load(cls, folder: str | Path) -> ModelCard:
        """Reads a model folder's card.

        Raises:
            RefusedError: where the folder holds no model made by mixtune.
        """
        return cls.model_validate(read_json(Path(folder) / "mixtune.json", "a model made by mixtune"))


def write_json(path: Path, value: Any) -> None:
    """Writes aside, then renames: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    aside.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    aside.replace(path)


def read_json(path: Path, what: str) -> Any:
    """Reads a manifest.

    Raises:
        RefusedError: where the file is missing or no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RefusedError(f"{path.parent}: has no {path.name}, so it is not {what}") from None
    except (OSError, ValueError) as error:
        raise RefusedError(f"{path}: cannot be read ({error})") from None


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """One JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Yields what `write_jsonl` wrote."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)
