"""Task heads: the modules that transformers itself puts on a backbone, run on hidden states that were computed before.

A head is a whole task class of transformers (`BertForSequenceClassification`, ...) without its backbone, so that what is saved
loads with plain `AutoModelFor...`. Shapes: M labelled segments, L tokens in the longest of them, H hidden size, C classes.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
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
from .packing import Batch

PROBLEM_TYPES: dict[Task, str] = {
    "classification": "single_label_classification",
    "multi_label": "multi_label_classification",
    "regression": "regression",
}
"""Kinds of heads that read one hidden state -> what transformers calls them."""


class HiddenStates:
    """What a head reads of a backbone's output, by name or by index. Whatever else it asks for is not there."""

    def __init__(self, last_hidden_state: Tensor, pooler_output: Tensor | None = None) -> None:
        self.last_hidden_state, self.pooler_output = last_hidden_state, pooler_output

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state, self.pooler_output)[index]


class _Given(nn.Module):
    """Stands where the backbone would."""

    def __init__(self, states: HiddenStates | None = None) -> None:
        super().__init__()
        self.states = states

    def forward(self, *_: Any, **__: Any) -> HiddenStates | None:
        return self.states


@contextlib.contextmanager
def instead_of_backbone(model: PreTrainedModel, module: nn.Module) -> Iterator[None]:
    """Puts something else in the place of a model's backbone."""
    prefix = model.base_model_prefix
    backbone = model._modules[prefix]
    model._modules[prefix] = module
    try:
        yield
    finally:
        model._modules[prefix] = backbone


def on_hidden(model: PreTrainedModel, states: HiddenStates) -> Any:
    """The output of a model's head alone.

    Args:
        model: any model class with a head.
        states: `last_hidden_state` of shape (rows, tokens, H).
    """
    # Some heads look for padding in the token ids; in rows of one token they find that one whatever it is.
    ids = torch.zeros(states.last_hidden_state.shape[:2], dtype=torch.int64, device=states.last_hidden_state.device)
    with instead_of_backbone(model, _Given(states)):
        return model(input_ids=ids)


def task_class(config: PretrainedConfig, kind: Task) -> Any:
    """The class of transformers for a task on a model of this type.

    Raises:
        RefusedError: if there is none.
    """
    mapping = (
        MODEL_FOR_QUESTION_ANSWERING_MAPPING
        if kind == "question_answering"
        else MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    )
    try:
        return mapping[type(config)]
    except KeyError:
        raise RefusedError(
            f"data.finetune.task: is {kind}, for which transformers has no head on models of type {config.model_type}; "
            "choose another base model or task"
        ) from None


def make_head(lm: PreTrainedModel, kind: Task, labels: list[str] | None, seed: int) -> PreTrainedModel:
    """A fresh head. What the task's backbone has and the language model's has not (a pooler) is put on the latter.

    Args:
        lm: the language model whose backbone it stands on.
        kind: the task.
        labels: names of the classes; None for regression and question answering.
        seed: of the initial weights.

    Raises:
        RefusedError: if models of this type have no such head, or one whose saved model would not load as both.
    """
    chosen = task_class(lm.config, kind)
    if chosen.base_model_prefix != lm.base_model_prefix:
        raise RefusedError(
            f"data.finetune.task: is {kind}, but transformers names the weights of {chosen.__name__} otherwise than those of "
            f"{type(lm).__name__}, so that one folder cannot be loaded as both; choose an encoder such as BERT"
        )
    config = copy.deepcopy(lm.config)
    describe_head(config, kind, labels)
    if config.get_text_config().pad_token_id is None:
        config.get_text_config().pad_token_id = 0  # heads that look for padding insist on one
    with torch.device("meta"):
        task: PreTrainedModel = chosen(config)
    theirs, ours = task.base_model, lm.base_model
    missing = {name: module for name, module in theirs.named_children() if name not in dict(ours.named_children())}
    task._modules[task.base_model_prefix] = _Given()
    shared = dict(lm.named_children())
    fresh = list(missing.values())
    for name, module in task.named_children():
        if name == task.base_model_prefix:
            continue
        if name in shared:  # ModernBERT's task classes start from the LM head's projection, by its name
            task._modules[name] = shared[name]
        else:
            fresh.append(module)
    weight = next(lm.parameters())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in fresh:
            module.to_empty(device="cpu")
            for part in module.modules():
                task._init_weights(part)
            module.to(device=weight.device, dtype=weight.dtype)
    for name, module in missing.items():
        setattr(ours, name, module)
    return task


def describe_head(config: Any, kind: Task, labels: list[str] | None) -> None:
    """Notes in a model's configuration what its head is for."""
    if kind == "question_answering":
        config.num_labels = 2  # logits of start and end, however many classes a head before it had
        return
    names = labels or ["value"]
    config.id2label = dict(enumerate(names))
    config.label2id = {label: index for index, label in enumerate(names)}
    config.problem_type = PROBLEM_TYPES[kind]
    if hasattr(config, "classifier_pooling"):
        config.classifier_pooling = "cls"  # one token's state, which is what a packed row can give


def task_logits(
    task: PreTrainedModel, kind: Task, backbone: nn.Module, hidden: Tensor, batch: Batch, first: bool
) -> Tensor:
    """What the head says of each labelled segment.

    Args:
        hidden: (B·L, H).
        first: whether it reads a segment's first token (encoders) or its last.

    Returns:
        (M, C) logits; (M, 1) for regression; (M, L, 2) logits of start and end for question answering, -inf beyond a
        segment's end.
    """
    if kind == "question_answering":
        lengths = batch.last_at - batch.first_at + 1
        offsets = torch.arange(int(lengths.max()) if len(lengths) else 1, device=hidden.device)
        inside = offsets[None] < lengths[:, None]
        at = torch.where(inside, batch.first_at[:, None] + offsets[None], 0)
        found = on_hidden(task, HiddenStates(hidden[at]))
        both = torch.stack([found.start_logits, found.end_logits], dim=-1)
        return both.masked_fill(~inside[..., None], float("-inf"))
    states = hidden[batch.first_at if first else batch.last_at][:, None]
    pooler = getattr(backbone, "pooler", None)
    pooled = pooler(states) if isinstance(pooler, nn.Module) else None
    return on_hidden(task, HiddenStates(states, pooled)).logits


def task_losses(kind: Task, logits: Tensor, batch: Batch) -> Tensor:
    """(M,) loss of each labelled segment, as the task classes of transformers define it for one example."""
    if not len(logits):  # a micro-batch of text alone; the head still takes part in the backward pass
        return logits.flatten(1).sum(1)
    if kind == "classification":
        return F.cross_entropy(logits, batch.label, reduction="none")
    targets = batch.targets.to(logits.dtype)
    if kind == "multi_label":
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(-1)
    if kind == "regression":
        return (logits[:, 0] - targets[:, 0]).square()
    start, end = (
        F.cross_entropy(logits[..., side], batch.targets[:, side].long(), reduction="none") for side in (0, 1)
    )
    return (start + end) / 2
