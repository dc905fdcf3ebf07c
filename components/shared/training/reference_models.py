"""A frozen copy of a training's start model, for penalties on the distance from it."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ..model.mixed_model import MixedModel
from ..model.packing import Batch
from ..model.sharding import local, release, sum_over_shards
from .optimizer import is_task_head


class ReferenceModel:
    """A frozen copy of a model.

    Args:
        model: copied, not changed. The copy is without dropout. It shares the weights until `own_weights` copies them.
    """

    def __init__(self, model: MixedModel) -> None:
        shared = {id(weight): nn.Parameter(weight.data, requires_grad=False) for weight in model.parameters()}
        self.model = copy.deepcopy(model, shared).eval()

    @torch.no_grad()
    def own_weights(self) -> None:
        """Copies the weights, which a training would otherwise change. A sharded training does not change the whole ones."""
        for weight in self.model.parameters():
            weight.data = weight.data.clone()

    @torch.no_grad()
    def finetune_logits(self, batch: Batch) -> Tensor:
        """Returns the (T, V) logits of the copy's language model at every token of the fine-tuning stream."""
        logits = self.model.finetune_logits(batch)
        release(self.model)
        return logits

    @torch.no_grad()
    def pull(self, model: MixedModel, weight: float) -> Tensor:
        """Adds the gradient of weight / 2 · ||w - w_start||² over the backbone and the LM head (L2-SP, arXiv:1802.01483).

        Returns:
            The penalty: a scalar, float64, on the model's device.
        """
        squares = torch.zeros((), dtype=torch.float64, device=model.device)
        before = dict(self.model.named_parameters())
        for name, parameter in model.named_parameters():
            if parameter.grad is not None and not is_task_head(name):
                away = local(parameter) - local(before[name]).to(parameter.device)
                local(parameter.grad).add_(away, alpha=weight)
                squares += away.square().sum().double()
        return weight / 2 * sum_over_shards(model, squares)
