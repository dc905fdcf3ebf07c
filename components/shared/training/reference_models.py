"""Frozen reference models of a training: to measure forgetting, or to penalise distance from the start."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from ..model.mixed_model import MixedModel
from ..model.packing import Batch
from .optimizer import is_task_head


class ReferenceModel:
    """A frozen copy of a model.

    Args:
        model: copied, not changed.
        dropout: whether the copy uses dropout like the trained model. A measure of forgetting needs it, since dropout alone
            would otherwise look like forgetting. A target of penalties is better without.
    """

    def __init__(self, model: MixedModel, dropout: bool = False) -> None:
        self.model = copy.deepcopy(model).train(dropout).requires_grad_(False)

    def to(self, device: torch.device) -> ReferenceModel:
        """Moves the copy to a device."""
        self.model.to(device)
        return self

    @torch.no_grad()
    def pretrain_loss(self, batch: Batch) -> Tensor:
        """Returns Σ ce of the batch's pretraining tokens, in nats."""
        of_text = batch.lm_pretrain
        hidden = self.model.hidden(batch)
        logits = self.model.lm_logits(hidden[batch.lm_at[of_text]])
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return torch.nn.functional.cross_entropy(logits, batch.lm_target[of_text], reduction="sum")

    @torch.no_grad()
    def finetune_logits(self, batch: Batch) -> Tensor:
        """Returns the (T, V) logits of the copy's language model at every token of the fine-tuning stream."""
        return self.model.lm_logits(self.model.hidden(batch)[batch.finetune_at])

    @torch.no_grad()
    def pull(self, model: MixedModel, weight: float) -> float:
        """Adds the gradient of weight / 2 · ||w - w_start||² over the backbone and the LM head (L2-SP, arXiv:1802.01483).

        Returns:
            The penalty.
        """
        total = 0.0
        before = dict(self.model.named_parameters())
        for name, parameter in model.named_parameters():
            if parameter.grad is not None and not is_task_head(name):
                away = parameter - before[name].to(parameter.device)
                parameter.grad.add_(away, alpha=weight)
                total += weight / 2 * float(away.square().sum())
        return total
