"""Configuration groups that several steps use. No heavy imports: the command reads this file to show its help.

Every option stands once, here or in a step's own `config.py`, with its default, its unit and its description. The
annotated configuration, the JSON Schema, the reference documentation and the KFP parameters are generated from them.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, ClassVar, Literal, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from .errors import RefusedError
from .task_kinds import Objective as Objective
from .task_kinds import Task as Task

Attention = Literal["auto", "sdpa", "eager", "flash_attention_2", "flex_attention"]

SCRATCH = "scratch"
EMBEDDED = "embedded"


class Section(BaseModel):
    """A group of options: immutable, and unknown keys are refused."""

    model_config: ClassVar[ConfigDict] = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _empty_section(cls, values: Any) -> Any:
        """A section whose options are all comments reads as null; it means the defaults."""
        if not isinstance(values, dict):
            return values
        sections = {
            name
            for name, field in cls.model_fields.items()
            if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
        }
        return {name: {} if value is None and name in sections else value for name, value in values.items()}

    def to_json(self) -> str:
        """Canonical JSON: equal configurations give equal strings, so that caches can compare them."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Reads what `to_json` wrote.

        Raises:
            RefusedError: naming every field that is wrong.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise RefusedError(*describe_problems(error)) from None


def describe_problems(error: ValidationError) -> list[str]:
    """One plain sentence for each problem that pydantic found: field, what was found, what would be right."""
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
    """The size of a model that is trained from nothing, used where `model.base` is `scratch`: a Llama architecture, or a BERT
    one where `model.objective` is `masked_lm`."""

    vocabulary_size: int = Field(4096, ge=300, le=1_000_000)
    """Entries of the tokenizer, which is trained on the pretraining stream."""
    hidden_size: int = Field(192, ge=8)
    """Width of the hidden states; a multiple of `heads`."""
    layers: int = Field(4, ge=1)
    """Number of transformer blocks."""
    heads: int = Field(4, ge=1)
    """Number of attention heads."""


class Model(Section):
    """What training starts from."""

    base: str = Field(min_length=1)
    """A Hugging Face hub name, a local folder in Hugging Face format (safetensors), or `scratch`."""
    revision: str | None = None
    """Hub commit, tag or branch of the base model; a commit is best, since the others can move."""
    max_length: int = Field(512, ge=8)
    """Longest training sequence, in tokens; longer text is cut into windows, longer examples are shortened."""
    objective: Objective | None = None
    """Loss on the pretraining stream: `causal_lm` (the next token) or `masked_lm` (masked tokens, for encoders such as BERT);
    null is the base model's own, and `causal_lm` for `scratch`."""
    mask_probability: float = Field(0.15, gt=0, lt=1)
    """Masked LM: share of a text's tokens that are predicted. Of these, 80 % are replaced by the mask token, 10 % by a random
    one, 10 % stay; drawn anew each time that a text is read."""
    scratch: Scratch = Scratch()


class Training(Section):
    """Options of one training stage."""

    steps: int = Field(1000, ge=0)
    """Optimizer steps."""
    epochs: float | None = Field(None, gt=0)
    """Passes over the training data (over the labelled examples, where both streams are read); where given, it takes the place
    of `steps`."""
    max_tokens: int | None = Field(None, ge=1)
    """Tokens to train on, of both streams together; where given, it takes the place of `steps`."""
    learning_rate: float = Field(2e-5, gt=0)
    """Peak learning rate of the backbone (and of the head, unless `head_learning_rate` is given)."""
    head_learning_rate: float | None = Field(None, gt=0)
    """Peak learning rate of a task head; null means `learning_rate`."""
    layer_decay: float = Field(1.0, gt=0, le=1)
    """Factor by which each layer's learning rate is below that of the layer above it; embeddings stand below the first layer.
    1 gives all layers the same."""
    schedule: Literal["cosine", "linear", "constant", "inverse_sqrt", "warmup_stable_decay"] = "cosine"
    """Shape of the learning rate after warm-up. Cosine and linear end at zero; `warmup_stable_decay` stays at its peak and
    falls to zero in the last fifth."""
    warmup_steps: int = Field(0, ge=0)
    """Optimizer steps over which the learning rate rises from zero to its peak."""
    weight_decay: float = Field(0.01, ge=0)
    """AdamW weight decay, on matrices only (not on norms and biases)."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are scaled down to this norm where theirs is larger."""
    batch_size: int = Field(32, ge=1)
    """Size of one optimizer step over all devices: windows of text in pretraining, labelled examples otherwise."""
    micro_batch_size: int = Field(8, ge=1)
    """Packed rows of `model.max_length` tokens in one forward pass on one device; lower it when memory runs out."""
    precision: Literal["auto", "float32", "bf16"] = "auto"
    """Number format of the matrix products; `auto` is bf16 where the device computes it natively, else float32."""
    attention: Attention = "auto"
    """Implementation of attention in training; `auto` is what transformers chooses, `flash_attention_2` needs its package and a
    GPU."""
    compile: bool = False
    """Compile the backbone with torch.compile: some minutes at the start, faster steps after that."""
    gradient_checkpointing: bool = False
    """Trade time for memory: recompute activations in the backward pass."""
    log_every_steps: int = Field(10, ge=1)
    """How often losses and learning rates go on record, in optimizer steps."""
    checkpoint_minutes: float = Field(5.0, gt=0)
    """Time between two checkpoints, in minutes; a training that is killed loses at most that."""
    checkpoint_steps: int | None = Field(None, ge=1)
    """Optimizer steps between two checkpoints, beside those by time; null is by time alone."""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.epochs is not None and self.max_tokens is not None:
            raise ValueError("epochs and max_tokens exclude each other; give one of them")
        return self

    @property
    def trains(self) -> bool:
        """Whether there is anything to train."""
        return bool(self.steps or self.epochs or self.max_tokens)


class LambdaSchedule(Section):
    """λ as a function of the step."""

    shape: Literal["linear", "cosine", "steps"] = "linear"
    """`linear` and `cosine` go from each value to the next over equal parts of the training; `steps` holds each value."""
    values: list[Annotated[float, Field(ge=0, le=1)]] = Field(min_length=2, max_length=10)
    """Values of λ, in order."""
    starts: list[Annotated[float, Field(ge=0, lt=1)]] = Field([])
    """Shape `steps`: where each value begins, as a share of the training, the first at 0; empty gives all equal parts."""

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
    """What log λ / (1 - λ) would change by over the whole training, were forgetting at twice the budget all the time."""
    response: float = Field(0.7, ge=0)
    """What log λ / (1 - λ) changes by at once where forgetting is at twice the budget."""
    slack: float = Field(0.5, ge=0)
    """Share of the budget by which forgetting may be above it while the learning rate is at its peak; the slack shrinks with
    the learning rate, as does a part of the forgetting."""
    smoothing_steps: float = Field(5.0, ge=1)
    """Optimizer steps over which measured forgetting is averaged (exponentially)."""

    @model_validator(mode="after")
    def _bounds_in_order(self) -> Self:
        if not self.min_lambda <= self.start_lambda <= self.max_lambda:
            raise ValueError("min_lambda, start_lambda and max_lambda must be in that order")
        return self


class Tracking(Section):
    """Where runs go on record."""

    uri: str | None = None
    """MLflow tracking address for local runs; null is the environment variable MLFLOW_TRACKING_URI, else a SQLite store
    in the output folder. On a cluster the address and the credentials come from a Kubernetes secret."""
    experiment: str = Field("mixtune", min_length=1)
    """MLflow experiment of local runs; on a cluster MLFLOW_EXPERIMENT_NAME in the secret names it."""
    registered_model: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._-]*$")
    """Name in the MLflow model registry; null is the name of the run."""
    alias: str = Field("candidate", pattern=r"^[A-Za-z][A-Za-z0-9_-]*$")
    """Alias that `register` sets on the version it makes; not `latest`, and not `v` with a number: MLflow keeps those."""

    offline_when_unreachable: bool = False
    """Whether a step whose MLflow server does not answer goes on without it, and `mixtune sync` delivers later. Otherwise the
    step ends with status 4. On a cluster this is fixed when the pipeline is compiled, and nothing is kept unless
    MIXTUNE_JOURNAL_DIR names a folder that lasts."""

    @field_validator("alias")
    @classmethod
    def _not_reserved(cls, alias: str) -> str:
        if re.fullmatch(r"(?i)latest|v\d+", alias):
            raise ValueError("must not be latest or v and a number, which MLflow keeps for itself")
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
        return uri
