"""Configuration groups that several steps use. No heavy imports: the command reads this file to show its help.

Every option stands once, here or in a step's own `config.py`, with its default, its unit and its description. The
annotated configuration, the JSON Schema, the reference documentation and the KFP parameters are generated from them.
"""

from __future__ import annotations

import json
import os
import re
from typing import Annotated, Any, ClassVar, Literal, Self, get_args
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from .errors import RefusedError
from .task_kinds import Objective as Objective
from .task_kinds import Task as Task

Attention = Literal["auto", "sdpa", "eager", "flash_attention_2", "flex_attention"]

LocalPath = Annotated[str, AfterValidator(os.path.expanduser)]
"""A path, or another name that does not begin with `~`, which stands for the home folder."""

SCRATCH = "scratch"
EMBEDDED = "embedded"
PLACEHOLDER = "{{$"
"""Beginning of the placeholders that KFP replaces in constants, file names and parameters."""


class Section(BaseModel):
    """A group of options: immutable, and unknown keys are refused."""

    model_config: ClassVar[ConfigDict] = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _empty_section(cls, values: Any) -> Any:
        """Treats a section whose options are all commented out, which YAML reads as null, as its defaults."""
        if not isinstance(values, dict):
            return values
        sections = {
            name
            for name, field in cls.model_fields.items()
            if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
        }
        return {name: {} if value is None and name in sections else value for name, value in values.items()}

    @field_validator("*", mode="before")
    @classmethod
    def _as_written(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuses values that pydantic or Kubeflow would silently change."""
        parts = value if isinstance(value, list) else [value]
        if any(isinstance(part, str) and PLACEHOLDER in part for part in parts):
            raise ValueError(f"must not contain {PLACEHOLDER}, which Kubeflow replaces")
        # Python's booleans are numbers: `learning_rate: yes` would be 1.0.
        annotation = cls.model_fields[info.field_name].annotation if info.field_name else None
        if any(isinstance(part, bool) for part in parts) and not _takes_bool(annotation):
            raise ValueError("must not be true or false (in YAML also yes, no, on, off)")
        return value

    def to_json(self) -> str:
        """Returns canonical JSON: equal configurations give equal strings, so that caches can compare them."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Reads the JSON that `to_json` returned.

        Raises:
            RefusedError: if fields are invalid; names all of them.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise RefusedError(*describe_problems(error)) from None


def _takes_bool(annotation: Any) -> bool:
    return annotation is bool or isinstance(annotation, bool) or any(map(_takes_bool, get_args(annotation)))


def describe_problems(error: ValidationError) -> list[str]:
    """Returns a sentence for each problem that pydantic found: the field, the value, and what is valid."""
    problems = []
    for item in error.errors(include_url=False):
        field = ".".join(str(part) for part in item["loc"]) or "the configuration"
        kind, message = item["type"], item["msg"]
        if kind == "extra_forbidden":
            problems.append(f"{field}: there is no such option; remove it or correct its name")
        elif kind == "missing":
            problems.append(f"{field}: is required and was not given")
        elif kind in ("json_invalid", "credentials"):
            problems.append(f"{field}: {message}")
        else:
            message = message.removeprefix("Value error, ")
            found = _shown(item["input"])
            problems.append(f"{field}: {message[0].lower()}{message[1:]}, found {found}")
    return problems


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


class Scratch(Section):
    """Size of a model that is trained from scratch, if `model.base` is `scratch`. The architecture is Llama, or BERT if
    `model.objective` is `masked_lm`."""

    vocabulary_size: int = Field(4096, ge=300, le=1_000_000)
    """Vocabulary size of the tokenizer, which is trained on the pretraining stream."""
    hidden_size: int = Field(192, ge=8)
    """Size of the hidden states; a multiple of `heads`."""
    layers: int = Field(4, ge=1)
    """Number of transformer blocks."""
    heads: int = Field(4, ge=1)
    """Number of attention heads."""


class Model(Section):
    """The base model."""

    base: LocalPath = Field(min_length=1)
    """A Hugging Face hub name, a local folder in Hugging Face format (safetensors), or `scratch`."""
    revision: str | None = None
    """Commit, tag or branch of the base model on the hub. Prefer a commit, since tags and branches can change."""
    max_length: int = Field(512, ge=8)
    """Maximum length of a training sequence, in tokens. Longer text is split into windows; longer examples are truncated."""
    objective: Objective | None = None
    """Loss on the pretraining stream: `causal_lm` (the next token) or `masked_lm` (masked tokens, for encoders such as BERT);
    null means the base model's own objective, and `causal_lm` for `scratch`."""
    mask_probability: float = Field(0.15, gt=0, lt=1)
    """Masked LM: fraction of the tokens that the model predicts. 80 % of these are replaced by the mask token, 10 % by a random
    token, 10 % are unchanged. They are drawn anew each time a text is read."""
    scratch: Scratch = Scratch()


class Training(Section):
    """Options of one training stage."""

    steps: int = Field(1000, ge=0)
    """Optimizer steps."""
    epochs: float | None = Field(None, gt=0, le=10_000)
    """Passes over the training data (over the labelled examples, if both streams are read). If set, it replaces `steps`."""
    max_tokens: int | None = Field(None, ge=1)
    """Number of training tokens, of both streams together. If set, it replaces `steps`."""
    learning_rate: float = Field(2e-5, gt=0, le=1)
    """Peak learning rate of the backbone, and of the task head unless `head_learning_rate` is set."""
    head_learning_rate: float | None = Field(None, gt=0, le=1)
    """Peak learning rate of the task head; null means `learning_rate`."""
    layer_decay: float = Field(1.0, gt=0, le=1)
    """Each layer's learning rate is that of the layer above it times this factor; the embeddings count as the lowest layer.
    With 1, all layers have the same learning rate."""
    schedule: Literal["cosine", "linear", "constant", "inverse_sqrt", "warmup_stable_decay"] = "cosine"
    """Learning rate schedule after the warm-up. `cosine` and `linear` end at zero; `warmup_stable_decay` stays at the peak and
    decays to zero in the last fifth."""
    warmup_steps: int = Field(0, ge=0)
    """Optimizer steps in which the learning rate rises from zero to its peak."""
    weight_decay: float = Field(0.01, ge=0)
    """Weight decay of AdamW, applied to matrices only (not to norms and biases)."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Maximum gradient norm; larger gradients are scaled down to it."""
    batch_size: int = Field(32, ge=1)
    """Batch size of one optimizer step, over all devices: windows of text in pretraining, labelled examples otherwise."""
    micro_batch_size: int = Field(8, ge=1)
    """Packed rows of `model.max_length` tokens in one forward pass on one device. Lower it if memory runs out."""
    precision: Literal["auto", "float32", "bf16"] = "auto"
    """Precision of the matrix products. `auto` is bf16 if the device supports it natively, else float32."""
    attention: Attention = "auto"
    """Attention implementation in training. `auto` is the choice of transformers; `flash_attention_2` needs its package and
    a GPU."""
    compile: bool = False
    """Whether to compile the backbone with torch.compile: takes minutes at the start and makes the steps faster."""
    gradient_checkpointing: bool = False
    """Whether to recompute activations in the backward pass, which saves memory and costs time."""
    log_every_steps: int = Field(10, ge=1)
    """Optimizer steps between two log entries with losses and learning rates."""
    checkpoint_minutes: float = Field(5.0, gt=0)
    """Minutes between two checkpoints. A training that is killed loses at most this much."""
    checkpoint_steps: int | None = Field(None, ge=1)
    """Optimizer steps between two checkpoints, in addition to `checkpoint_minutes`; null means by time only."""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.epochs is not None and self.max_tokens is not None:
            raise ValueError("epochs and max_tokens exclude each other; set one of them")
        return self

    @property
    def trains(self) -> bool:
        """Tells whether the stage trains at all."""
        return bool(self.steps or self.epochs or self.max_tokens)


class LambdaSchedule(Section):
    """λ as a function of the step."""

    shape: Literal["linear", "cosine", "steps"] = "linear"
    """`linear` and `cosine` move from each value to the next over equal parts of the training; `steps` keeps each value."""
    values: list[Annotated[float, Field(ge=0, le=1)]] = Field(min_length=2, max_length=10)
    """Values of λ, in order."""
    starts: list[Annotated[float, Field(ge=0, lt=1)]] = Field([])
    """Shape `steps`: start of each value, as a fraction of the training; the first is 0. Empty means equal parts."""

    @model_validator(mode="after")
    def _starts_fit(self) -> Self:
        if self.shape != "steps":
            if self.starts:
                raise ValueError("starts are for the shape steps only; remove them")
            return self
        if not self.starts:
            equal = [number / len(self.values) for number in range(len(self.values))]
            object.__setattr__(self, "starts", equal)
        if len(self.starts) != len(self.values) or self.starts[0] != 0 or sorted(set(self.starts)) != self.starts:
            raise ValueError("starts must be one for each of values, the first 0 and each above the one before")
        return self


class Budget(Section):
    """How λ is adapted to a forgetting budget. With v = (smoothed forgetting - budget) / budget, held between -1/2 and 1,
    log λ / (1 - λ) has a part that grows by gain / steps · v in every step, and a part of response · v."""

    start_lambda: float = Field(0.3, gt=0, lt=1)
    """λ of the first step."""
    min_lambda: float = Field(0.001, gt=0, lt=1)
    """Smallest λ."""
    max_lambda: float = Field(0.95, gt=0, lt=1)
    """Largest λ."""
    gain: float = Field(6.0, gt=0)
    """Change of log λ / (1 - λ) over a whole training in which forgetting is always twice the budget."""
    response: float = Field(0.7, ge=0)
    """Immediate change of log λ / (1 - λ) when forgetting is twice the budget."""
    slack: float = Field(0.5, ge=0)
    """Fraction of the budget by which forgetting may exceed it while the learning rate is at its peak. The slack shrinks
    with the learning rate, as part of the forgetting does."""
    smoothing_steps: float = Field(5.0, ge=1)
    """Optimizer steps over which the measured forgetting is averaged exponentially."""

    @model_validator(mode="after")
    def _bounds_in_order(self) -> Self:
        if not self.min_lambda <= self.start_lambda <= self.max_lambda:
            raise ValueError("min_lambda, start_lambda and max_lambda must be in that order")
        return self


class Tracking(Section):
    """Tracking of runs in MLflow."""

    uri: LocalPath | None = None
    """MLflow tracking address of local runs. Null means the environment variable MLFLOW_TRACKING_URI, else a SQLite store
    in the output folder. On a cluster, the address and the credentials come from a Kubernetes secret."""
    experiment: str = Field("mixtune", min_length=1, max_length=256)
    """MLflow experiment of local runs. On a cluster, MLFLOW_EXPERIMENT_NAME in the secret names it."""
    registered_model: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._-]*$", max_length=256)
    """Name in the MLflow model registry; null means the name of the run."""
    alias: str = Field("candidate", pattern=r"^[A-Za-z][A-Za-z0-9_-]*$")
    """Alias that `register` sets on the new version. `latest` and `v` with a number are reserved by MLflow."""

    offline_when_unreachable: bool = False
    """Whether a step continues if the MLflow server does not answer; `mixtune sync` delivers its records later. Otherwise
    the step ends with status 4. On a cluster, the value is fixed when the pipeline is compiled, and the records are lost
    unless MIXTUNE_JOURNAL_DIR names a persistent folder."""

    @field_validator("alias")
    @classmethod
    def _not_reserved(cls, alias: str) -> str:
        if re.fullmatch(r"(?i)latest|v\d+", alias):
            raise ValueError("must not be latest or v and a number, which MLflow reserves")
        return alias

    @field_validator("uri")
    @classmethod
    def _no_credentials(cls, uri: str | None) -> str | None:
        # The configuration is stored with every run, and so would be a password in it.
        if uri and urlsplit(uri).password:
            raise PydanticCustomError(
                "credentials",
                "must not carry a password; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the environment",
            )
        if uri and "://" in uri and "/~" in uri:
            raise ValueError("must hold the whole path, since ~ does not stand for the home folder in an address")
        return uri
