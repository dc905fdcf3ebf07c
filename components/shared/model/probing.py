"""Runs a model on a few tokens to determine its behaviour."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

MPNET_OFFSET = 2
TOLERANCE, LOW_TOLERANCE = 1e-3, 5e-2
"""Largest difference that counts as rounding, relative to the largest value: in float32, and in bf16 or less."""


@contextlib.contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Runs a model without dropout, and in float32 if it is stored in less: one module's weights are converted at a time."""
    was_training = model.training
    model.eval()
    stored: dict[int, tuple[nn.Parameter, Tensor]] = {}

    def widen(module: nn.Module, _: object) -> None:
        for weight in _weights_of(module):
            if weight.is_floating_point() and weight.element_size() < 4:
                stored[id(weight)] = weight, weight.data
                weight.data = weight.data.float()

    def narrow(module: nn.Module, *_: object) -> None:
        for weight in _weights_of(module):
            if id(weight) in stored:
                weight.data = stored.pop(id(weight))[1]

    modules = [module for module in model.modules() if any(True for _ in _weights_of(module))]
    hooks = [module.register_forward_pre_hook(widen) for module in modules]
    hooks += [module.register_forward_hook(narrow, always_call=True) for module in modules]
    try:
        with torch.no_grad():
            yield
    finally:
        for hook in hooks:
            hook.remove()
        for weight, data in stored.values():
            weight.data = data
        model.train(was_training)


def _weights_of(module: nn.Module) -> Iterator[nn.Parameter]:
    """Yields the weights of a module, and of parts of it that have no parts: their module can use these by itself."""
    yield from module.parameters(recurse=False)
    for part in module.children():
        if not any(True for _ in part.children()):
            yield from part.parameters(recurse=False)


def probe_ids(model: PreTrainedModel, start: int, count: int = 6) -> np.ndarray:
    """Returns a few token ids without the padding token."""
    config = model.config.get_text_config()
    allowed = [i for i in range(1, min(config.vocab_size, 60)) if i != config.pad_token_id]
    return np.array([allowed[(start + i) % len(allowed)] for i in range(count)])


def differ(ours: Tensor, theirs: Tensor, tolerance: float = TOLERANCE) -> bool:
    ours, theirs = ours.float(), theirs.float()
    if not theirs.isfinite().all():
        return False  # the loss computation detects and reports such weights
    return not torch.allclose(ours, theirs, rtol=10 * tolerance, atol=tolerance * float(theirs.abs().max()) + 1e-6)


def position_offset(lm: PreTrainedModel) -> int:
    """Returns the number of the first position: 0, but `padding_idx + 1` in models of the RoBERTa family."""
    ids = torch.from_numpy(probe_ids(lm, 1))[None].to(lm.device)
    pad = lm.config.get_text_config().pad_token_id
    with measuring(lm):
        theirs = lm.base_model(input_ids=ids).last_hidden_state
        for offset in (0, *([] if pad is None else [pad + 1]), MPNET_OFFSET):
            position_ids = torch.arange(ids.shape[1], device=ids.device)[None] + offset
            with contextlib.suppress(TypeError):  # the model takes no position ids
                if not differ(lm.base_model(input_ids=ids, position_ids=position_ids).last_hidden_state, theirs):
                    return offset
    return 0  # `check_model` refuses such a model
