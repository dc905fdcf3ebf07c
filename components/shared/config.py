"""Configuration groups that several steps use. No heavy imports: the command reads this file to show its help.

Every option stands once, here or in a step's own `config.py`, with its default, its unit and its description. The
annotated configuration, the JSON Schema, the reference documentation and the KFP parameters are generated from them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from .section import Section, matching, rule
from .task_kinds import Objective as Objective
from .task_kinds import Task as Task

Attention = Literal["auto", "sdpa", "eager", "flash_attention_2", "flex_attention"]


@dataclass(frozen=True)
class PathOption:
    """Marks the type of an option that can be a path. Where a configuration is read, relative paths become absolute.

    Attributes:
        can_be_name: whether a text that does not begin with `.` is a name unless there is such a folder.
    """

    can_be_name: bool = False


LocalPath = Annotated[str, PathOption(), AfterValidator(os.path.expanduser)]
"""A path, an address, or another name that does not begin with `~`, which stands for the home folder."""
NameOrPath = Annotated[str, PathOption(can_be_name=True), AfterValidator(os.path.expanduser)]
"""A folder, or a name on the Hugging Face hub."""

RegisteredName = Annotated[
    str,
    matching(
        r"^[A-Za-z0-9][A-Za-z0-9 ._-]*$",
        "be letters, digits, spaces, dots, underscores and hyphens, and begin with a letter or a digit",
    ),
]
RegistryAddress = Annotated[
    str,
    matching(
        r"^https?://[^/?#@\s]+(/[^?#\s]*)?$", "be an address such as https://registry.example, without a password"
    ),
]
Alias = Annotated[
    str, matching(r"^[A-Za-z][A-Za-z0-9_-]*$", "be letters, digits, underscores and hyphens, and begin with a letter")
]

SCRATCH = "scratch"
EMBEDDED = "embedded"


class Scratch(Section):
    """Size of a model that is trained from scratch, if `model.base` is `scratch`. The architecture is Llama, or BERT if
    `model.objective` is `masked_lm`."""

    vocabulary_size: int = Field(4096, ge=300, le=1_000_000)
    """Vocabulary size of the tokenizer, which is trained on the pretraining stream."""
    hidden_size: int = Field(192, ge=8, le=100_000)
    """Size of the hidden states; a multiple of `heads`."""
    layers: int = Field(4, ge=1, le=1000)
    """Number of transformer blocks."""
    heads: int = Field(4, ge=1, le=1000)
    """Number of attention heads."""


class Model(Section):
    """The base model."""

    base: NameOrPath = Field(min_length=1)
    """A Hugging Face hub name, a local folder in Hugging Face format (safetensors), or `scratch`."""
    revision: str | None = None
    """Commit, tag or branch of the base model on the hub. Prefer a commit, since tags and branches can change."""
    max_length: int = Field(512, ge=8, le=10_000_000)
    """Maximum length of a training sequence, in tokens. Longer text is split into windows; longer examples are truncated."""
    chat_template: LocalPath | None = Field(None, min_length=1)
    """Jinja file with the chat template, by which chats become text. Null means the template of the base model's tokenizer."""
    objective: Objective | None = None
    """Loss on the pretraining stream: `causal_lm` (the next token) or `masked_lm` (masked tokens, for encoders such as BERT);
    null means the base model's own objective, and `causal_lm` for `scratch`."""
    mask_probability: float = Field(0.15, gt=0, lt=1)
    """Masked LM: fraction of the tokens that the model predicts. 80 % of these are replaced by the mask token, 10 % by a random
    token, 10 % are unchanged. They are drawn anew each time a text is read."""
    scratch: Scratch = Scratch()


class Training(Section):
    """Options of one training stage."""

    steps: int = Field(1000, ge=0, le=100_000_000)
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
    weight_decay: float = Field(0.01, ge=0, le=100)
    """Weight decay of AdamW, applied to matrices only (not to norms and biases)."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Maximum gradient norm; larger gradients are scaled down to it."""
    batch_size: int = Field(32, ge=1, le=1_000_000)
    """Batch size of one optimizer step, over all devices: windows of text in pretraining, labelled examples otherwise."""
    micro_batch_size: int = Field(8, ge=1, le=1_000_000)
    """Packed rows of `model.max_length` tokens in one forward pass on one device. Lower it if memory runs out."""
    precision: Literal["auto", "float32", "bf16"] = "auto"
    """Precision of the matrix products. `auto` is bf16 if the device supports it natively, else float32."""
    parallelism: Literal["auto", "ddp", "fsdp"] = "auto"
    """How several GPUs share a training. `ddp`: each holds the model, its gradients and the optimizer's state. `fsdp`: each
    holds a part of them, which needs less memory and more communication. `auto` is `fsdp` if these would fill more than 70 % of
    a GPU's memory, else `ddp`."""
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

    @rule
    def _one_length(self) -> Iterator[str]:
        if self.epochs is not None and self.max_tokens is not None:
            yield "epochs and max_tokens exclude each other; set one of them"

    @rule
    def _compiles(self) -> Iterator[str]:
        if self.compile and self.parallelism == "fsdp":
            yield "compile does not work with parallelism: fsdp; leave out one of them"

    @rule
    def _flash_attention_is_for_bf16(self) -> Iterator[str]:
        if self.attention == "flash_attention_2" and self.precision == "float32":
            yield "attention flash_attention_2 does not compute in float32; set precision to bf16, or attention to sdpa"

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
    def _equal_parts(self) -> Self:
        if self.shape == "steps" and not self.starts:
            object.__setattr__(self, "starts", [number / len(self.values) for number in range(len(self.values))])
        return self

    @rule
    def _starts_fit(self) -> Iterator[str]:
        if self.starts and self.shape != "steps":
            yield "starts are for the shape steps only; remove them"
        elif self.starts and (
            len(self.starts) != len(self.values) or self.starts[0] != 0 or sorted(set(self.starts)) != self.starts
        ):
            yield "starts must be one for each of values, the first 0 and each above the one before"


class Budget(Section):
    """How a candidate keeps to a forgetting budget: it is trained with a constant λ, then again with another λ that follows
    from how much was forgotten, until forgetting is near the budget. The last of these trainings is the candidate."""

    start_lambda: float = Field(0.1, ge=0, lt=1)
    """λ of the first training."""
    max_lambda: float = Field(0.5, ge=0, lt=1)
    """Largest λ. What a tight budget needs beyond that, pulling the weights back at the end does better than a larger λ."""
    max_trainings: int = Field(3, ge=1, le=10)
    """Trainings at most, and so the cost of the candidate in trainings of one λ. With 1, `start_lambda` is the only λ, and the
    pull back does the rest."""
    cost: float = Field(0.05, gt=0, le=1)
    """Cost of measuring forgetting on control text, as a fraction of the cost of a training. At least 65,536 tokens of it are
    read twice, if there are as many, which costs more than this fraction if the training is very short."""

    @rule
    def _bounds_in_order(self) -> Iterator[str]:
        if self.start_lambda > self.max_lambda:
            yield "start_lambda must be at most max_lambda"


class Watching(Section):
    """Which sample is read, and how often."""

    every_steps: int | None = Field(None, ge=1)
    """Optimizer steps between two measurements; the first is before the first step. Null measures nothing."""
    max_tokens: int = Field(8192, ge=16, le=65_536)
    """Tokens of held-out pretraining text that are read each time. They come from the control text."""
    max_examples: int = Field(128, ge=1, le=1000)
    """Labelled examples of the dev split that are read each time."""


class Watch(Watching):
    """Measurements of forgetting and of the task's loss during fine-tuning and mixed fine-tuning, on a small fixed sample of
    held-out data. They change nothing in the training, unless `max_forgetting` stops it."""

    max_forgetting: float | None = Field(None, ge=0)
    """Forgetting, in bits per byte, that stops the training of a mixed candidate early: `patience` measurements in a row were
    above it, and none of them was below the one before. The model is then that of the step at which the training stopped.
    Fine-tuning alone, which all others are compared with, and candidates with a forgetting budget are never stopped. Choose a
    value of several times the gate's limit, since forgetting falls as the learning rate decays. Null stops nothing."""
    patience: int = Field(3, ge=1, le=1000)
    """Measurements in a row that stop a training; see `max_forgetting`."""

    @rule
    def _stops_by_measurements(self) -> Iterator[str]:
        if self.max_forgetting is not None and self.every_steps is None:
            yield "max_forgetting stops a training by measurements, and there are none; set every_steps"


class Tracking(Section):
    """Tracking of runs in MLflow."""

    uri: LocalPath | None = None
    """MLflow tracking address of local runs. Null means the environment variable MLFLOW_TRACKING_URI, else a SQLite store
    in the output folder. On a cluster, the address and the credentials come from a Kubernetes secret."""
    experiment: str = Field("mixtune", min_length=1, max_length=256)
    """MLflow experiment of local runs. On a cluster, MLFLOW_EXPERIMENT_NAME in the secret names it."""
    registered_model: RegisteredName | None = Field(None, max_length=256)
    """Name in the MLflow model registry; null means the name of the run."""
    alias: Alias = "candidate"
    """Alias that `register` sets on the new version. `latest` and `v` with a number are reserved by MLflow."""

    kubeflow_registry: RegistryAddress | None = None
    """Address of Kubeflow's model registry, such as `https://registry.example`. `register` makes the version there, too, with
    the address of its files and the run that made it; its image needs `mixtune[kubeflow-registry]`. Null makes none."""

    tensorboard: bool = False
    """Whether trainings also write TensorBoard event files with the metrics that they log to MLflow: into `tensorboard/` in the
    output folder, and at their end as artifacts of their MLflow runs. A training from the cache writes none. On a cluster, they
    are artifacts only, and the value is fixed when the pipeline is compiled. To show them, `pip install tensorboard`."""
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
