"""Estimates the memory of a training on each GPU, from the shapes of the model. No torch.

docs/how-it-works.md has the formula, under "Memory of a training".
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .base_model import hub_config, looks_local
from .config import Config
from .shared.config import EMBEDDED, SCRATCH, Training
from .shared.model.expert_types import has_experts

GIGABYTE = 1e9
SIZES = (24, 48, 80, 141)
"""Memory of common GPUs, in GB."""
USABLE = 0.9
"""Share of a GPU's memory that a training can fill; CUDA and fragmentation take the rest."""
MOST_GPUS = 64
SMALL = 8 * GIGABYTE
"""Below, a configuration without GPUs gets no estimate."""
_LOGITS_AT_ONCE = 2**26
_LOGIT_BYTES = 8  # logits and softmax in float32; in bf16 both, and the softmax in float32 too
_GATED = ("silu", "swish", "gelu_pytorch_tanh", "swiglu", "geglu")
_COMPOSED = ("gelu_new", "gelu_fast")  # computed by several operations, each of which keeps its result
_NAMES = {
    "hidden": ("hidden_size", "n_embd", "d_model", "dim"),
    "layers": ("num_hidden_layers", "n_layer", "n_layers"),
    "heads": ("num_attention_heads", "n_head", "n_heads"),
    "inside": ("intermediate_size", "n_inner", "hidden_dim", "ffn_dim"),
}


@dataclass(frozen=True)
class Shape:
    """Shape of a model, of which some thousand weights (norms, biases, positions) are left out.

    Attributes:
        keys: width of all keys of a token.
        inside: width inside the feed-forward layer.
        gated: whether the feed-forward layer has three matrices.
        composed: whether the activation function is computed by several operations.
        tied: whether the LM head shares the embeddings.
    """

    hidden: int
    layers: int
    keys: int
    inside: int
    vocabulary: int
    gated: bool
    composed: bool
    tied: bool

    @classmethod
    def of(cls, config: dict[str, Any]) -> Shape | None:
        """Reads a config.json; None if its names are unknown, or if a token takes some of several experts."""
        found = {key: next((config[name] for name in names if config.get(name)), None) for key, names in _NAMES.items()}
        vocabulary = config.get("vocab_size")
        if not (found["hidden"] and found["layers"] and found["heads"] and vocabulary) or has_experts(config):
            return None
        hidden, heads = int(found["hidden"]), int(found["heads"])
        width = config.get("head_dim") or hidden // heads
        activation = str(config.get("hidden_act") or config.get("activation_function") or "gelu")
        gated = "rms_norm_eps" in config or activation in _GATED
        return cls(
            hidden=hidden,
            layers=int(found["layers"]),
            keys=int(config.get("num_key_value_heads") or heads) * int(width),
            inside=int(found["inside"] or 4 * hidden),
            vocabulary=int(vocabulary),
            gated=gated,
            composed=activation in _COMPOSED,
            tied=bool(config.get("tie_word_embeddings", not gated)),
        )

    @property
    def block(self) -> int:
        """Returns the weights of one transformer block."""
        matrices = 3 if self.gated else 2
        return 2 * self.hidden * (self.hidden + self.keys) + matrices * self.hidden * self.inside

    @property
    def outside(self) -> int:
        """Returns the weights outside of the blocks."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def weights(self) -> int:
        """Returns the number of all weights."""
        return self.layers * self.block + self.outside

    def kept(self, bf16: bool) -> int:
        """Returns the bytes that one block keeps of each token for the backward pass."""
        of_hidden = 8 if self.gated else 7
        of_inside = 4 if self.gated else 5 if self.composed else 2
        if not bf16:
            return 4 * (of_hidden * self.hidden + 2 * self.keys + of_inside * self.inside)
        # The residual stream and what the norms keep stay in float32, the rest is in bf16.
        return 4 * (of_hidden - 4) * self.hidden + 2 * (5 * self.hidden + 2 * self.keys + of_inside * self.inside)


@dataclass(frozen=True)
class Memory:
    """Bytes on each GPU at the moment of a training step at which most are in use.

    Attributes:
        weights: those of the trained model and of models that are only read; with FSDP also those gathered for a pass.
        gradients: float32; in a step with many activations they do not exist yet.
        optimizer: two moments of AdamW, float32.
        activations: what the backward pass needs, and its temporary results.
        logits: those computed at once, and the gradient of the LM head.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        """Returns the sum."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits

    def __str__(self) -> str:
        parts = {name: value for name, value in vars(self).items() if value}
        return ", ".join(f"{name} {_gb(value)}" for name, value in parts.items())


def estimate(
    shape: Shape, tokens: int, bf16: bool, recomputed: bool, gpus: int = 1, sharded: bool = False, read: int = 0
) -> Memory:
    """Estimates the memory of a training that trains all weights with AdamW.

    Args:
        tokens: of a micro-batch.
        recomputed: whether activations are recomputed (gradient checkpointing).
        gpus: number of GPUs.
        sharded: FSDP instead of DDP.
        read: further models that are only read.
    """
    parts = gpus if sharded else 1
    weights = 4 * shape.weights * (1 + read) / parts
    if sharded:  # the outside in float32; a block that runs and the next one
        weights += (1 + read) * 4 * shape.outside + 2 * shape.block * (2 if bf16 else 4)
    elif bf16:
        weights += 2 * shape.layers * shape.block  # autocast keeps its copies until the end of the pass
    gradients = 4 * shape.weights / parts
    if gpus > 1 and not sharded:
        gradients *= 2  # DDP exchanges them in buckets of its own
    layer = tokens * shape.kept(bf16)
    activations = shape.layers * layer
    if recomputed:
        activations = shape.layers * tokens * shape.hidden * 4 + layer
    # Outside of the blocks: embeddings, final norm, hidden states at the predicted tokens; in a backward pass, gradients.
    activations += tokens * (14 * shape.hidden + (5 * shape.inside * (2 if bf16 else 4)))
    logits = 4 * shape.vocabulary * shape.hidden + _LOGIT_BYTES * min(_LOGITS_AT_ONCE, tokens * shape.vocabulary)
    moments = 8 * shape.weights / parts
    if activations + logits > gradients:
        return Memory(weights, 0.0, moments, activations, logits)
    return Memory(weights, gradients, moments, 0.0, 0.0)


def memory_note(config: Config) -> str | None:
    """Returns one sentence about the memory that the most demanding stage needs and the GPUs that have it.

    None if the model's shape is not known, and for a small model that is not to be trained on GPUs.
    """
    shape = _shape(config)
    if shape is None:
        return None
    stages = {name: stage for name, stage in _stages(config) if stage.trains}
    gpus = max(1, config.placement.gpus * config.placement.nodes)
    found = {name: _best(shape, config, stage, gpus) for name, stage in stages.items()}
    if not found:
        return None
    name = max(found, key=lambda one: found[one].total)
    if found[name].total < SMALL and not config.placement.gpus:
        return None
    enough = [
        f"{count} of {size} GB" for size in SIZES if (count := _gpus_for(shape, config, stages[name], size * GIGABYTE))
    ]
    return (
        f"memory: {name} needs about {_gb(found[name].total)} GB on {'one GPU' if gpus == 1 else f'each of {gpus} GPUs'} "
        f"({found[name]}); enough GPUs would be {' or '.join(enough) or f'none of up to {MOST_GPUS}'}"
    )


def _stages(config: Config) -> Iterable[tuple[str, Training]]:
    return (("pretrain", config.pretrain), ("finetune", config.finetune), ("mixed", config.mixed))


def _best(shape: Shape, config: Config, stage: Training, gpus: int, available: float = 80 * GIGABYTE) -> Memory:
    """Returns the estimate for a stage, sharded if its option says so, or with `auto` if it would not fit otherwise."""
    controls = config.mixed.controls
    read = int(stage is config.mixed and bool(controls.kl_weights or controls.l2sp_weights))
    given = (shape, stage.micro_batch_size * config.model.max_length, stage.precision != "float32")
    whole = estimate(*given, stage.gradient_checkpointing, gpus, read=read)
    if gpus == 1 or stage.parallelism == "ddp" or (stage.parallelism == "auto" and whole.total <= USABLE * available):
        return whole
    return estimate(*given, stage.gradient_checkpointing, gpus, sharded=True, read=read)


def _gpus_for(shape: Shape, config: Config, stage: Training, available: float) -> int | None:
    counts = (count for count in range(1, MOST_GPUS + 1) if count in (1, 2, 4) or count % 8 == 0)
    return next(
        (count for count in counts if _best(shape, config, stage, count, available).total <= USABLE * available), None
    )


def _shape(config: Config) -> Shape | None:
    base = config.model.base
    if base in (SCRATCH, EMBEDDED):
        scratch = config.model.scratch
        masked = config.model.objective == "masked_lm"
        return Shape(
            hidden=scratch.hidden_size,
            layers=scratch.layers,
            keys=scratch.hidden_size,
            inside=4 * scratch.hidden_size if masked else -(-scratch.hidden_size * 8 // 3 // 16) * 16,
            vocabulary=scratch.vocabulary_size,
            gated=not masked,
            composed=False,
            tied=True,
        )
    if not looks_local(base):
        found, _ = hub_config(base, config.model.revision)
        return Shape.of(found) if found else None
    try:
        return Shape.of(json.loads((Path(base) / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None


def _gb(value: float) -> str:
    return f"{value / GIGABYTE:.1f}"
