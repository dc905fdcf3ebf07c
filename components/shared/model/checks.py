"""What a loaded model is tried for before anything is trained: that packed rows and heads give what transformers gives.

The backbone is run on packed rows, the heads on selected positions only, both outside the model's own `forward`. Here the
two are held together on a few tokens, so that an architecture that does more than mixtune reproduces is refused, not
trained wrongly.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import RefusedError
from .heads import instead_of_backbone
from .packing import Segment, collate

if TYPE_CHECKING:
    from .mixed_model import MixedModel


MPNET_OFFSET = 2


@contextlib.contextmanager
def _measuring(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def _ids(model: PreTrainedModel, start: int, count: int = 6) -> np.ndarray:
    """A few tokens, none of them the padding token."""
    config = model.config.get_text_config()
    allowed = [i for i in range(1, min(config.vocab_size, 60)) if i != config.pad_token_id]
    return np.array([allowed[(start + i) % len(allowed)] for i in range(count)])


def _differ(ours: Tensor, theirs: Tensor) -> bool:
    ours, theirs = ours.float(), theirs.float()
    if not theirs.isfinite().all():
        return False  # such weights are found, and named, where a loss is computed
    return not torch.allclose(ours, theirs, rtol=1e-2, atol=1e-3 * float(theirs.abs().max()) + 1e-6)


def position_offset(lm: PreTrainedModel) -> int:
    """Number of the first position: 0, but `padding_idx + 1` in models of the RoBERTa family."""
    ids = torch.from_numpy(_ids(lm, 1))[None].to(lm.device)
    pad = lm.config.get_text_config().pad_token_id
    with _measuring(lm):
        theirs = lm.base_model(input_ids=ids).last_hidden_state
        for offset in (0, *([] if pad is None else [pad + 1]), MPNET_OFFSET):
            places = torch.arange(ids.shape[1], device=ids.device)[None] + offset
            with contextlib.suppress(TypeError):  # it takes no position ids
                if not _differ(lm.base_model(input_ids=ids, position_ids=places).last_hidden_state, theirs):
                    return offset
    return 0  # whatever it is, `check_model` will not let it pass


def check_model(model: MixedModel, name: str) -> None:
    """Refuses an architecture in which packed documents see each other, or whose logits are not reproduced."""
    kind = model.config.model_type
    first, second = (_ids(model.lm, start) for start in (1, 3))
    with _measuring(model):
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
        if _differ(packed, alone):
            raise RefusedError(
                f"model.base: {name} is of type {kind}, in which packed documents see each other; use another architecture"
            )
        if _differ(model.lm_logits(alone), theirs):
            raise RefusedError(
                f"model.base: {name} is of type {kind}, whose output layer mixtune cannot reproduce exactly; use another "
                "architecture"
            )


def check_task_head(model: MixedModel) -> None:
    """Refuses a head that does more with a text than read its first token (encoders), its last, or every one by itself."""
    assert model.task is not None
    kind = model.config.model_type
    tokens = _ids(model.lm, 2)
    with _measuring(model), _measuring(model.task):
        batch = collate([[Segment(_ids(model.lm, 1)), Segment(tokens)]], 0, label_all=True).to(model.device)
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
        if _differ(ours, theirs):
            raise RefusedError(
                f"data.finetune.task: is {model.kind}, whose head on models of type {kind} mixtune cannot reproduce exactly; "
                "use another architecture"
            )
