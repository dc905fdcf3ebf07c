"""The artifacts that steps pass to each other: folders with a manifest, each with a local path and a URI.

A step's `run` reads and fills objects with `path`, `uri` and `metadata`: KFP's own artifacts in a pipeline, `Artifact`
in a shell and in tests.

    data folder         manifest.json and, for each split, tokens.npy, offsets.npy, records.jsonl (see data/prepared.py)
    model folder        Hugging Face format with its tokenizer; mixtune.json (`ModelCard`), training.jsonl (the curves)
    evaluation folder   evaluation.json; for each candidate <id>/<split>.documents.jsonl, <id>/<split>.examples.jsonl and the
                        curves of its training, since `compare` draws them and reads no model
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
    """The attributes of an artifact that a step uses. KFP's artifacts have them."""

    uri: str
    metadata: dict[str, Any]

    @property
    def path(self) -> str: ...


@dataclass
class Artifact:
    """An artifact outside of KFP: a local folder or file."""

    path: str
    uri: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.path = str(self.path)
        self.uri = self.uri or self.path


class Utilisation(BaseModel):
    """What a training made of its machine. A value that was not measured is None."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens_per_second: float | None = None
    """Tokens over the wall-clock time of the whole training."""
    flops_per_second: float | None = None
    """Model FLOPs over the same time, of all processes."""
    mfu: float | None = None
    """`flops_per_second` as a share of the peak of the devices; None where the peak is not known."""
    peak_memory_bytes: int | None = None
    """Memory of the GPU that torch reserved at most; on a CPU the most memory that the process held, in its whole life."""
    gpu_utilisation: float | None = None
    """Share of the time in which the GPU ran anything, the mean of samples by NVML."""


class Stopped(BaseModel):
    """A training that was stopped early, since its forgetting on the watched text was above a limit for good."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: int
    """The step after which it stopped. The model is that of this step."""
    planned_steps: int
    limit: float
    """Bits per byte."""
    forgetting: list[float]
    """The measurements that were above the limit, in order; bits per byte."""

    @property
    def sentence(self) -> str:
        """Says when it was stopped and why."""
        found = ", ".join(f"{value:.3f}" for value in self.forgetting)
        return (
            f"training was stopped early, after step {self.step:,} of {self.planned_steps:,}: forgetting on the watched text "
            f"was above watch.max_forgetting = {self.limit:g} bits per byte in {len(self.forgetting)} measurements in a row "
            f"and did not fall ({found}); the model is that of step {self.step:,}"
        )


class Generation(BaseModel):
    """What it took to generate training data with the start model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens: int
    """Generated tokens."""
    documents: int
    """Texts, or labelled examples."""
    kept: int | None = None
    """Self-distillation: examples whose answer is the start model's own."""
    seconds: float
    """Wall-clock time. It is part of the time of the training."""


class Tried(BaseModel):
    """One of the trainings of a candidate with a forgetting budget."""

    mix_weight: float
    """λ."""
    forgetting: float
    """Of control text, in bits per byte, before any pull back."""


class ModelCard(BaseModel):
    """The contents of `mixtune.json` in a model folder: the candidate, its settings and its origin."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["mixtune-model/1"] = "mixtune-model/1"
    id: str
    kind: Kind
    start: str | None = None
    """Id of the model that training started from."""
    name: str = ""
    """The candidate's name for people, such as `mixed, λ = 0.3`; empty if the kind alone identifies it."""
    mix_weight: float | None = None
    """The configured λ; None if it is not a constant (a schedule, a forgetting budget, pooled mixing)."""
    forgetting_budget: float | None = None
    """The forgetting budget that λ was found for, in bits per byte."""
    pull_back: float | None = None
    """α of the pull back toward the pretrained weights that a forgetting budget needed at the end; 1 if it needed none."""
    tried: list[Tried] = Field(default_factory=list)
    """The trainings with which λ was found for a forgetting budget. The last one is the candidate."""
    stopped: Stopped | None = None
    """When and why the training was stopped early; None if it was not."""
    realised_mix_weight: float | None = None
    """The λ that the gradients had in effect, averaged over the optimizer steps."""
    weights: str | None = None
    """The location of the weights if they are not in this folder: folder or hub name of a base model that is used unchanged."""
    revision: str | None = None
    """Hub revision of `weights`."""
    quantized: bool = False
    """Whether the weights under its adapter are quantised to 4 bits whenever they are loaded."""
    has_task_head: bool = False
    """Whether the model was trained on the task. Task scores are only meaningful if it was."""
    labels: list[str] | None = None
    chat: bool = False
    """Whether the model was trained on chats, so that a prompt is a message of the user."""
    params: dict[str, Any] = Field(default_factory=dict)
    """Settings of the stage that trained the model."""
    tokens: dict[Literal["pretrain", "finetune"], int] = Field(default_factory=dict)
    """Tokens processed in this stage's training, by stream."""
    steps: int = 0
    seconds: float = 0.0
    """Wall-clock time of the training."""
    utilisation: Utilisation = Utilisation()
    generation: Generation | None = None
    """Set if the start model wrote training data."""
    device: str = "cpu"
    precision: str = "float32"
    data: dict[str, str] = Field(default_factory=dict)
    """Digest of each stream's training data."""
    base: str = ""
    """Base model and its revision, or `scratch`."""
    mlflow_runs: dict[str, str] = Field(default_factory=dict)
    """MLflow run of each step that contributed to this model: `{"prepare-pretrain": id, "pretrain": id, ...}`."""

    def save(self, folder: str | Path) -> None:
        write_json(Path(folder) / "mixtune.json", self.model_dump(mode="json"))

    @classmethod
    def load(cls, folder: str | Path) -> ModelCard:
        """Reads the card of a model folder.

        Raises:
            RefusedError: if the folder holds no model made by mixtune.
        """
        return cls.model_validate(read_json(Path(folder) / "mixtune.json", "a model made by mixtune"))


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file atomically (temporary file, then rename), so that readers never see a partial file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    aside.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    aside.replace(path)


def read_json(path: Path, what: str) -> Any:
    """Reads a manifest.

    Raises:
        RefusedError: if the file is missing or is not valid JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RefusedError(f"{path.parent}: has no {path.name}, so it is not {what}") from None
    except (OSError, ValueError) as error:
        raise RefusedError(f"{path}: cannot be read ({error})") from None


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes one JSON object per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the rows of a file written by `write_jsonl`."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)
