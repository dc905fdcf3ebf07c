"""Refuses models and held-out data that are incompatible."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..shared.artifacts import ModelCard
from ..shared.errors import RefusedError
from ..shared.model.mixed_model import MixedModel
from .held_out import SPLITS, HeldOut

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_data(card: ModelCard, held_out: HeldOut) -> None:
    """Refuses data that the model was not trained for."""
    problems = []
    if card.has_task_head and held_out.with_head and card.labels != held_out.labelled.labels:
        problems.append(
            f"{card.id}: was trained on the labels {card.labels}, the held-out data has {held_out.labelled.labels}; "
            "prepare again"
        )
    for name, manifest in (("pretrain_heldout", held_out.text), ("finetune_heldout", held_out.labelled)):
        missing = [split for split in SPLITS if split not in manifest.splits]
        if missing:
            problems.append(f"{name}: has no split {' and '.join(missing)}")
    if problems:
        raise RefusedError(*problems)


def check_model(
    card: ModelCard,
    model: MixedModel,
    tokenizer: PreTrainedTokenizerBase,
    held_out: HeldOut,
    with_harness: bool,
    with_capabilities: bool = False,
) -> None:
    """Refuses a model that cannot be evaluated on this data."""
    problems = []
    size = model.config.get_text_config().vocab_size
    if max(held_out.text.vocabulary_size, held_out.labelled.vocabulary_size) > size:
        problems.append(f"{card.id}: has {size} words, the held-out data was made with more; prepare it again")
    if card.has_task_head and held_out.with_head and model.kind != held_out.task:
        made_for = f"made for {model.kind}" if model.kind else "without a task head"
        problems.append(f"{card.id}: is {made_for}, the held-out data is for {held_out.task}; prepare and train again")
    if model.objective == "masked_lm":
        if with_harness:
            problems.append(
                f"evaluate.lm_eval.tasks: {card.id} is a masked language model, for which lm-evaluation-harness has no tasks; "
                "leave them out"
            )
        if with_capabilities:
            problems.append(
                f"evaluate.capabilities: {card.id} is a masked language model, which answers no questions; leave it out"
            )
        if tokenizer.mask_token_id is None:
            problems.append(
                f"{card.id}: is a masked language model, but its tokenizer has no mask token, without which its loss on text "
                "cannot be measured; use the tokenizer that it was pretrained with"
            )
        if not held_out.with_head:
            problems.append(
                f"{card.id}: is a masked language model, which writes no answers; choose another task or model"
            )
    if problems:
        raise RefusedError(*problems)
