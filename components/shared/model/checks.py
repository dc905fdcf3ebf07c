"""What a loaded model is tried for before anything is trained: that packed rows and heads give what transformers gives.

The backbone is run on packed rows, the heads on selected positions only, both outside the model's own `forward`. Here the
two are held together on a few tokens, so that an architecture that does more than mixtune reproduces is refused, not
trained wrongly.
"""

from __future__ import annotations

from typing import Any

import torch

from ..errors import RefusedError
from .heads import instead_of_backbone
from .mixed_model import MixedModel
from .packing import Segment, collate
from .probing import differ, measuring, probe_ids


def check_model(model: MixedModel, name: str) -> None:
    """Refuses an architecture in which packed documents see each other, or whose logits are not reproduced."""
    kind = model.config.model_type
    first, second = (probe_ids(model.lm, start) for start in (1, 3))
    with measuring(model):
        try:
            packed = model.hidden(collate([[Segment(first), Segment(second)]], 0).to(model.device))[len(first) :]
            alone = model.hidden(collate([[Segment(second)]], 0).to(model.device))
        except (TypeError, RuntimeError) as error:
            reason = str(error).splitlines()[0][:120]
            raise RefusedError(
                f"model.base: {name} is of type {kind}, which cannot be given packed documents ({reason}); use another "
                "architecture"
            ) from None
        ids = torch.from_numpy(second)[None].to(model.device)
        theirs = model.lm(input_ids=ids).logits[0]
        if differ(packed, alone):
            raise RefusedError(
                f"model.base: {name} is of type {kind}, in which packed documents see each other; use another architecture"
            )
        if differ(model.lm_logits(alone), theirs):
            raise RefusedError(
                f"model.base: {name} is of type {kind}, whose output layer mixtune cannot reproduce exactly; use another "
                "architecture"
            )


def check_task_head(model: MixedModel) -> None:
    """Refuses a head that does more with a text than read its first token (encoders), its last, or every one by itself."""
    assert model.task is not None
    kind = model.config.model_type
    tokens = probe_ids(model.lm, 2)
    with measuring(model), measuring(model.task):
        batch = collate([[Segment(probe_ids(model.lm, 1)), Segment(tokens)]], 0, label_all=True).to(model.device)
        try:
            ours = model.task_logits(model.hidden(batch), batch)[1]
            with instead_of_backbone(model.task, model.lm.base_model):
                found: Any = model.task(input_ids=torch.from_numpy(tokens)[None].to(model.device))
        except Exception as error:  # heads of some types ask for what one token's state cannot give
            raise RefusedError(
                f"data.finetune.task: is {model.kind}, whose head on models of type {kind} cannot be run by itself "
                f"({type(error).__name__}); use another architecture"
            ) from None
        both = model.kind == "question_answering"
        theirs = torch.stack([found.start_logits[0], found.end_logits[0]], -1) if both else found.logits[0]
        if differ(ours, theirs):
            raise RefusedError(
                f"data.finetune.task: is {model.kind}, whose head on models of type {kind} mixtune cannot reproduce exactly; "
                "use another architecture"
            )
