"""Compares a saved model with plain transformers on some of its labelled examples, one by one and padded in a batch.

Users of the model load it with transformers alone. Another padding token, padding side or class would change its answers
without any error. Shapes: M examples, C outputs of one example.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..errors import RefusedError
from ..model.device import pick_device
from ..model.heads import HiddenStates, on_hidden, output_logits
from ..model.mixed_model import MixedModel
from ..model.packing import Segment, collate
from ..model.probing import measuring
from ..model.quantization import is_quantized, quantizing
from ..task_kinds import TASK_KINDS
from ..third_party.transformers import attention_implementation
from .streams import FinetuneStream

EXAMPLES = 8
SEARCHED = 500
"""Number of examples among which the compared ones are chosen."""
TOLERANCES: dict[torch.dtype, tuple[float, float]] = {torch.float32: (1e-2, 1e-4), torch.float64: (1e-2, 1e-4)}
"""For each format of the saved weights, the accepted difference: a fraction of the spread of the outputs over the examples,
plus a fraction of the largest output."""
COARSE = (1e-1, 2e-2)
"""The same for bf16 and float16."""


def chosen_examples(stream: FinetuneStream, pad_id: int) -> list[Segment]:
    """Chooses examples, first those that end in the padding token or contain it, then the shortest and the longest."""
    found = [stream.item(position)[0] for position in range(min(len(stream), SEARCHED))]
    by_length = sorted(found, key=lambda segment: len(segment.tokens))
    ending = [segment for segment in found if segment.tokens[-1] == pad_id]
    holding = [segment for segment in found if pad_id in segment.tokens[:-1]]
    ordered = [*ending[:2], *holding[:2], *by_length[:1], *by_length[-1:], *found]
    return list({segment.key: segment for segment in ordered}.values())[:EXAMPLES]


@torch.no_grad()
def compare_with_transformers(
    model: MixedModel, folder: Path, tokenizer: PreTrainedTokenizerBase, stream: FinetuneStream
) -> None:
    """Checks that plain transformers gives the outputs of the model that was just saved. Frees the model's memory.

    Args:
        model: the saved model, in its training form. Afterwards its weights are on the meta device.
        folder: the saved model.
        tokenizer: the saved tokenizer.
        stream: the labelled examples of the training.

    Raises:
        RefusedError: if an output differs by more than the format of the weights explains.
    """
    device, pad_id = pick_device(), int(tokenizer.pad_token_id)
    examples = chosen_examples(stream, pad_id)
    model.to(device)
    if attention_implementation(model.config) not in ("sdpa", "eager"):  # the others need bf16 or a compiler
        model.set_attention("sdpa")
    with measuring(model):
        ours = [_ours(model, segment, pad_id).cpu() for segment in examples]
    takes_types = model.takes_token_types and model.objective == "masked_lm"
    in_bits = quantizing(device) if is_quantized(model) else {}
    model.to("meta")
    auto: Any = getattr(transformers, TASK_KINDS[stream.task].auto_class)
    plain = auto.from_pretrained(folder, use_safetensors=True, trust_remote_code=False, **in_bits).to(device).eval()
    alone = [row for segment in examples for row in _theirs(plain, tokenizer, stream, [segment], takes_types)]
    batch = _theirs(plain, tokenizer, stream, examples, takes_types)
    of_spread, of_largest = TOLERANCES.get(plain.dtype, COARSE)
    for how, theirs in (("alone", alone), ("in a padded batch", batch)):
        columns = torch.cat(theirs) if theirs else torch.zeros(1, 1)
        finite = columns[columns.isfinite().all(-1)]
        if not len(finite):
            continue  # evaluation names the examples whose output is not finite
        spread = float((finite.amax(0) - finite.amin(0)).max())
        accepted = of_spread * spread + of_largest * float(finite.abs().max()) + 1e-6
        for segment, mine, other in zip(examples, ours, theirs, strict=True):
            away = float((mine - other).abs().nan_to_num().max())
            if away > accepted:
                raise RefusedError(
                    f"model: transformers' {type(plain).__name__} gives other outputs than mixtune for the training example "
                    f"{stream.name_of(segment.key)}, read {how}: they differ by {away:.3g}, and {accepted:.3g} would be "
                    "rounding. The trained model is not saved, because it would answer differently in use; choose another "
                    "base model"
                )


def _ours(model: MixedModel, segment: Segment, pad_id: int) -> Tensor:
    """Returns the (rows, C) outputs of one example: one row, or one for each token if the head reads them all."""
    batch = collate([[segment]], pad_id, label_all=True).to(model.device)
    hidden = model.hidden(batch)
    if model.task is None:
        return model.lm_logits(hidden[batch.last_at]).float()
    return model.task_logits(hidden, batch)[0].float().reshape(-1, _width(model.task))


def _theirs(
    plain: Any, tokenizer: PreTrainedTokenizerBase, stream: FinetuneStream, segments: Sequence[Segment], types: bool
) -> list[Tensor]:
    """Returns the same from plain transformers, for each example of a batch that the tokenizer pads."""
    rows: dict[str, list[list[int]]] = {"input_ids": [segment.tokens.tolist() for segment in segments]}
    if types:
        rows["token_type_ids"] = [
            [int(0 <= segment.second_from <= at) for at in range(len(segment.tokens))] for segment in segments
        ]
    head = TASK_KINDS[stream.task].head
    # On the left, only `generate` counts positions from the mask.
    side = "right" if head is None else None
    padded = tokenizer.pad(rows, padding_side=side, return_attention_mask=True, return_tensors="pt")
    given = padded.to(plain.device)
    if head is None:
        # The LM head runs on the last token only: the logits of all tokens can be larger than the model.
        hidden = plain.base_model(**given, use_cache=False).last_hidden_state
        last = given["attention_mask"].sum(1) - 1
        states = hidden[torch.arange(len(segments), device=last.device), last][:, None]
        return list(on_hidden(plain, HiddenStates(states)).logits.float().cpu())
    logits = output_logits(stream.task, plain(**given)).float().cpu()
    if head == "sequence":
        return [row[None] for row in logits]
    return [row[real] for row, real in zip(logits, given["attention_mask"].bool().cpu(), strict=True)]


def _width(task: Any) -> int:
    return int(task.config.num_labels)
