"""Task heads: transformers' own head modules, run on precomputed hidden states.

A head is a complete task class of transformers (`BertForSequenceClassification`, ...) without its backbone, so that a saved
model loads with plain `AutoModelFor...`. Shapes: M labelled segments, L tokens in the longest of them, H hidden size, C
classes.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_QUESTION_ANSWERING_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    PretrainedConfig,
    PreTrainedModel,
)

from ..config import Task
from ..errors import RefusedError
from ..task_kinds import TASK_KINDS, Head, Target
from ..third_party.transformers import initialize
from .packing import Batch
from .refusals import NO_HEAD, OTHER_PREFIX


class HiddenStates:
    """Stands in for a backbone's output in a head, by attribute or by index. All other attributes are None."""

    def __init__(self, last_hidden_state: Tensor, pooler_output: Tensor | None = None) -> None:
        self.last_hidden_state, self.pooler_output = last_hidden_state, pooler_output

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state, self.pooler_output)[index]


class _PrecomputedBackbone(nn.Module):
    """Stands in for the backbone and returns given hidden states."""

    def __init__(self, states: HiddenStates | None = None) -> None:
        super().__init__()
        self.states = states

    def forward(self, *_: Any, **__: Any) -> HiddenStates | None:
        return self.states


@contextlib.contextmanager
def instead_of_backbone(model: PreTrainedModel, module: nn.Module) -> Iterator[None]:
    """Temporarily replaces a model's backbone with another module."""
    prefix = model.base_model_prefix
    backbone = model.get_submodule(prefix)
    setattr(model, prefix, module)
    try:
        yield
    finally:
        setattr(model, prefix, backbone)


def on_hidden(model: PreTrainedModel, states: HiddenStates) -> Any:
    """Runs only the head of a model and returns its output.

    Args:
        model: any model class with a head.
        states: `last_hidden_state` of shape (rows, tokens, H).
    """
    # Some heads look for padding in the token ids. With one token per row they select that token whatever its id is.
    ids = torch.zeros(states.last_hidden_state.shape[:2], dtype=torch.int64, device=states.last_hidden_state.device)
    with instead_of_backbone(model, _PrecomputedBackbone(states)):
        return model(input_ids=ids)


def task_class(config: PretrainedConfig, kind: Task) -> Any:
    """Returns the transformers class for a task on a model of this type.

    Raises:
        RefusedError: if there is none.
    """
    head = TASK_KINDS[kind].head
    assert head is not None
    try:
        return _CLASSES[head][type(config)]
    except KeyError:
        raise RefusedError(NO_HEAD.format(task=kind, type=config.model_type)) from None


def make_head(lm: PreTrainedModel, kind: Task, labels: list[str] | None, seed: int) -> PreTrainedModel:
    """Creates a new head. Adds a pooler to the language model if the task's backbone has one and the language model has none.

    Args:
        lm: the language model whose backbone the head uses.
        kind: the task.
        labels: names of the classes; None for regression and question answering.
        seed: seed of the initial weights.

    Raises:
        RefusedError: if models of this type have no such head, or if the saved model would not load as both classes.
    """
    chosen = task_class(lm.config, kind)
    if chosen.base_model_prefix != lm.base_model_prefix:
        raise RefusedError(OTHER_PREFIX.format(task=kind, head=chosen.__name__, lm=type(lm).__name__))
    config = copy.deepcopy(lm.config)
    describe_head(config, kind, labels)
    if config.get_text_config().pad_token_id is None:
        config.get_text_config().pad_token_id = 0  # heads that look for padding require a padding token
    with torch.device("meta"):
        task: PreTrainedModel = chosen(config)
    theirs, ours = task.base_model, lm.base_model
    missing = {name: module for name, module in theirs.named_children() if name not in dict(ours.named_children())}
    setattr(task, task.base_model_prefix, _PrecomputedBackbone())
    shared = dict(lm.named_children())
    fresh = list(missing.values())
    for name, module in task.named_children():
        if name == task.base_model_prefix:
            continue
        if name in shared:  # ModernBERT's task classes share the LM head's projection by name
            setattr(task, name, shared[name])
        else:
            fresh.append(module)
    weight = next(lm.parameters())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in fresh:
            module.to_empty(device="cpu")
            for part in module.modules():
                initialize(task, part)
            # Heads are trained and run in float32 at least.
            module.to(device=weight.device, dtype=torch.promote_types(weight.dtype, torch.float32))
    for name, module in missing.items():
        setattr(ours, name, module)
    return task


def describe_head(config: Any, kind: Task, labels: list[str] | None) -> None:
    """Records the head's task and labels in a model's configuration."""
    if TASK_KINDS[kind].head == "span":
        config.num_labels = 2  # logits of start and end, regardless of the classes of an earlier head
        return
    names = labels or ["value"]
    config.id2label = dict(enumerate(names))
    config.label2id = {label: index for index, label in enumerate(names)}
    config.problem_type = TASK_KINDS[kind].problem_type
    if hasattr(config, "classifier_pooling"):
        config.classifier_pooling = "cls"  # one token's state; mean pooling would mix a row's documents


def task_logits(
    task: PreTrainedModel, kind: Task, backbone: nn.Module, hidden: Tensor, batch: Batch, first: bool
) -> Tensor:
    """Returns the head's output for each labelled segment.

    Heads compute in the format of their weights, float32, also where the backbone computes in bf16: with its 8 bits, nearby
    scores would become equal, and numbers near 1,000 would be multiples of 4.

    Args:
        hidden: (B·L, H).
        first: whether the head reads a segment's first token (encoders) instead of its last that is not padding.

    Returns:
        (M, C) logits; (M, 1) for regression; (M, L, 2) logits of start and end for question answering, -inf after a
        segment's end.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        wide = torch.promote_types(next(task.parameters()).dtype, torch.float32)
        return _logits(task, kind, backbone, hidden.to(wide), batch, first)


def _logits(
    task: PreTrainedModel, kind: Task, backbone: nn.Module, hidden: Tensor, batch: Batch, first: bool
) -> Tensor:
    if TASK_KINDS[kind].head == "span":
        lengths = batch.last_at - batch.first_at + 1
        offsets = torch.arange(max(batch.longest_labelled, 1), device=hidden.device)
        inside = offsets[None] < lengths[:, None]
        at = torch.where(inside, batch.first_at[:, None] + offsets[None], 0)
        both = output_logits(kind, on_hidden(task, HiddenStates(hidden[at])))
        return both.masked_fill(~inside[..., None], float("-inf"))
    states = hidden[batch.first_at if first else batch.read_at][:, None]
    pooler = getattr(backbone, "pooler", None)
    pooled = pooler(states) if isinstance(pooler, nn.Module) else None
    return output_logits(kind, on_hidden(task, HiddenStates(states, pooled)))


def output_logits(kind: Task, output: Any) -> Tensor:
    """Returns the logits in the output of a task class; those of start and end, (..., 2), for heads that read every token."""
    if TASK_KINDS[kind].head == "span":
        return torch.stack([output.start_logits, output.end_logits], dim=-1)
    logits: Tensor = output.logits
    return logits


def task_losses(kind: Task, logits: Tensor, batch: Batch) -> Tensor:
    """Returns the (M,) loss of each labelled segment, as transformers' task classes define it for one example."""
    if not len(logits):  # a micro-batch of text only; the head still takes part in the backward pass
        return logits.flatten(1).sum(1)
    return _LOSSES[TASK_KINDS[kind].target](logits, batch)


def _label_losses(logits: Tensor, batch: Batch) -> Tensor:
    return F.cross_entropy(logits, batch.label, reduction="none")


def _labels_losses(logits: Tensor, batch: Batch) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, batch.targets.to(logits.dtype), reduction="none").mean(-1)


def _number_losses(logits: Tensor, batch: Batch) -> Tensor:
    return (logits[:, 0] - batch.targets.to(logits.dtype)[:, 0]).square()


def _answer_losses(logits: Tensor, batch: Batch) -> Tensor:
    start, end = (
        F.cross_entropy(logits[..., side], batch.targets[:, side].long(), reduction="none") for side in (0, 1)
    )
    return (start + end) / 2


_CLASSES: dict[Head, Any] = {
    "sequence": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    "span": MODEL_FOR_QUESTION_ANSWERING_MAPPING,
}
_LOSSES: dict[Target, Callable[[Tensor, Batch], Tensor]] = {
    "label": _label_losses,
    "labels": _labels_losses,
    "number": _number_losses,
    "answers": _answer_losses,
}
