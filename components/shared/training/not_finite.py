"""Determines which stream and documents cause a loss or gradient that is not finite."""

from __future__ import annotations

import torch

from ..errors import MixtuneError
from ..model.mixed_model import MixedModel
from ..model.packing import Segment, collate
from ..model.sharding import local, sum_over_shards
from .streams import Mix, StepData

SHOWN = 5


def explain_not_finite(model: MixedModel, mix: Mix, data: StepData, step: int, pad_id: int) -> MixtuneError:
    """Returns an error that names the stream and the documents whose loss or gradient is not finite.

    Evaluates the step's segments one by one, since values that are not finite spread to other segments of a packed row.

    Args:
        model: with the weights before the step.
        mix: used to name the documents.
        data: the data of the step.
    """
    segments = [segment for row in data.rows for segment in row]
    with torch.no_grad():
        wrong = [segment for segment in segments if not _finite(model, segment, pad_id)]
    what = "loss"
    if not wrong:
        wrong, what = [segment for segment in segments if not _finite_gradient(model, segment, pad_id)], "gradient"
    model.zero_grad(set_to_none=True)
    if not wrong:
        text = "the gradient of the step as a whole is not finite, though no document's is"
    else:
        streams = {True: "pretraining", False: "fine-tuning"}
        parts = []
        for is_text, name in streams.items():
            of_stream = [segment for segment in wrong if segment.pretrain is is_text]
            if of_stream:
                names = list(dict.fromkeys(mix.name_of(segment) for segment in of_stream))
                more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
                all_of_it = len(of_stream) == sum(segment.pretrain is is_text for segment in segments)
                which = "all its documents" if all_of_it else "the documents"
                parts.append(f"of the {name} stream ({which}: {', '.join(names[:SHOWN])}{more})")
        text = f"the {what} {' and '.join(parts)} is not finite"
    return MixtuneError(
        f"step {step + 1}: {text}; the weights are those before the step. Lower the learning rate, or set precision to "
        "float32, and look at these documents"
    )


def _losses(model: MixedModel, segment: Segment, pad_id: int) -> torch.Tensor:
    batch = collate([[segment]], pad_id).to(model.device)
    losses: dict[str, torch.Tensor] = model(batch, float(segment.pretrain), float(not segment.pretrain))
    return losses["weighted"]


def _finite(model: MixedModel, segment: Segment, pad_id: int) -> bool:
    return bool(torch.isfinite(_losses(model, segment, pad_id)))


def _finite_gradient(model: MixedModel, segment: Segment, pad_id: int) -> bool:
    model.zero_grad(set_to_none=True)
    torch.autograd.backward(_losses(model, segment, pad_id))
    wrong = torch.zeros((), device=model.device)
    for parameter in model.parameters():
        if parameter.grad is not None:
            wrong += (~local(parameter.grad).isfinite()).sum()
    return not bool(sum_over_shards(model, wrong))
