"""Checks of a loaded model before training: packed rows and separate heads must give the same results as transformers.

mixtune runs the backbone on packed rows and the heads on selected positions only, both outside of the model's own `forward`.
The checks compare the two on a few tokens. An architecture that mixtune does not reproduce is refused instead of being
trained incorrectly.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from ..errors import RefusedError
from .heads import instead_of_backbone, output_logits
from .mixed_model import MixedModel
from .packing import Segment, collate
from .probing import LOW_TOLERANCE, TOLERANCE, differ, measuring, probe_ids


@contextlib.contextmanager
def _computing(model: MixedModel) -> Iterator[float]:
    """Runs the model for measurements. Yields the difference that counts as rounding."""
    low = not model.attention_takes_a_mask  # FlashAttention computes in half precision only
    with measuring(model), torch.autocast(model.device.type, torch.bfloat16, enabled=low):
        yield LOW_TOLERANCE if low else TOLERANCE


def check_model(model: MixedModel, name: str) -> None:
    """Refuses an architecture in which packed documents attend to each other or whose logits mixtune does not reproduce."""
    kind = model.config.model_type
    first, second = (probe_ids(model.lm, start) for start in (1, 3))
    with _computing(model) as tolerance:
        try:
            rows = [[Segment(first), Segment(second)], [Segment(second), Segment(first)]]
            packed = model.hidden(collate(rows, 0).to(model.device))[len(first) : len(first) + 2 * len(second)]
            alone = model.hidden(collate([[Segment(second)]], 0).to(model.device))
        except (TypeError, RuntimeError) as error:
            reason = str(error).splitlines()[0][:120]
            raise RefusedError(
                f"model.base: {name} is of type {kind}, which cannot be given packed documents ({reason}); use another "
                "architecture"
            ) from None
        ids = torch.from_numpy(second)[None].to(model.device)
        theirs = model.lm(input_ids=ids).logits[0]
        if differ(packed, alone.repeat(2, 1), tolerance):
            raise RefusedError(
                f"model.base: {name} is of type {kind}, in which packed documents see each other; use another architecture"
            )
        if differ(model.lm_logits(alone), theirs, tolerance):
            raise RefusedError(
                f"model.base: {name} is of type {kind}, whose output layer mixtune cannot reproduce exactly; use another "
                "architecture"
            )


def check_task_head(model: MixedModel) -> None:
    """Refuses a head that does not read the first token only (encoders), the last token only, or every token on its own."""
    assert model.task is not None
    assert model.kind is not None
    kind = model.config.model_type
    tokens = probe_ids(model.lm, 2)
    with _computing(model) as tolerance, measuring(model.task):
        batch = collate([[Segment(probe_ids(model.lm, 1)), Segment(tokens)]], 0, label_all=True).to(model.device)
        try:
            ours = model.task_logits(model.hidden(batch), batch)[1]
            with instead_of_backbone(model.task, model.lm.base_model):
                output: Any = model.task(input_ids=torch.from_numpy(tokens)[None].to(model.device))
        except Exception as error:  # some heads need more than the hidden state of one token
            raise RefusedError(
                f"data.finetune.task: is {model.kind}, whose head on models of type {kind} cannot be run by itself "
                f"({type(error).__name__}); use another architecture"
            ) from None
        if differ(ours, output_logits(model.kind, output)[0], tolerance):
            raise RefusedError(
                f"data.finetune.task: is {model.kind}, whose head on models of type {kind} mixtune cannot reproduce exactly; "
                "use another architecture"
            )
