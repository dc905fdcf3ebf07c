"""The loss that balances a mixture of experts, over all tokens of an optimizer step.

With K of E experts chosen for each token by the largest routing probabilities p_te, c_e the number of choices of expert e, and
R the number of tokens times the number of layers with experts, the loss is that of the Switch Transformer (arXiv:2101.03961,
eq. 4 to 6) as transformers computes it,

    aux = E · Σ_e (c_e / R) · (Σ_t p_te / R)

with sums over layers, too. transformers takes it over the tokens of one pass. Here they are all tokens of both streams in an
optimizer step (global-batch balance, arXiv:2501.11873), without padding: with c_e and R known before the backward pass, the
loss is a sum over tokens, and does not depend on how they are divided among micro-batches and processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .packing import Batch


@dataclass(frozen=True)
class Routing:
    """How tokens were routed.

    Attributes:
        choices: (E,) float32, choices of each expert, over layers and tokens.
        rows: scalar, number of tokens times layers.
    """

    choices: Tensor
    rows: Tensor

    def __add__(self, other: Routing) -> Routing:
        return Routing(self.choices + other.choices, self.rows + other.rows)


def route(router_logits: Sequence[Tensor], batch: Batch, chosen: int) -> tuple[Routing, Tensor]:
    """Counts the choices of a batch, without padding.

    Args:
        router_logits: (B·L, E) of each layer with experts.
        chosen: experts that a token takes.

    Returns:
        The counts, and the (E,) routing probabilities summed over layers and tokens, which can be differentiated.
    """
    width = batch.input_ids.shape[1]
    real = torch.arange(width, device=batch.input_ids.device)[None] < batch.row_tokens[:, None]
    real_T = real.flatten().float()
    probabilities = torch.zeros(router_logits[0].shape[-1], device=real_T.device)
    choices = torch.zeros_like(probabilities)
    for logits in router_logits:
        shares_TE = logits.float().softmax(-1)
        probabilities = probabilities + (shares_TE * real_T[:, None]).sum(0)
        top_TK = shares_TE.topk(chosen, -1).indices
        choices = choices.index_add(0, top_TK.flatten(), real_T.repeat_interleave(chosen))
    return Routing(choices, real_T.sum() * len(router_logits)), probabilities


def balancing_loss(routing: Routing, probabilities: Tensor) -> Tensor:
    """Returns the part of the loss of those tokens whose summed probabilities are given.

    Args:
        routing: of all tokens of the step.
        probabilities: (E,), see `route`.
    """
    return len(probabilities) * (routing.choices * probabilities).sum() / routing.rows.square()
