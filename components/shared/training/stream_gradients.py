"""The gradients of the two streams: how large each is, whether they agree, and how much of the step each makes.

With L = λ · L_p + (1 - λ) · L_f and g = g_p + g_f the gradients of the step and of its two weighted parts, before clipping,

    share of the pretraining stream = <g_p, g> / ||g||²,   share of the fine-tuning stream = <g_f, g> / ||g||²

These shares add up to 1. Where the streams pull in opposite directions, one of them can be below 0 and the other above 1. The
share in the norm, ||g_p|| / (||g_p|| + ||g_f||), leaves directions aside. Clipping multiplies g_p, g_f and g by the same
factor, so all shares are those of the clipped gradient, too.

A measurement repeats the step's pass with the weight of the fine-tuning stream at 0, with the same dropout, which gives g_p;
the step itself gives g. It costs about as much as a step and does not change the step in any bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..model.packing import Batch
from ..model.sharding import is_sharded, local, sum_over_shards
from .mix_weight import MixWeight, Weights, split
from .streams import StepData

COST = 0.03
"""Share of the steps that are measured, at most; at least one is."""
MEASUREMENTS = 40
"""Maximum number of measurements of a training, if λ does not depend on them."""
SCALED_EVERY = 10
"""Optimizer steps between two measurements, if λ depends on them."""
SCALED_MEASUREMENTS = 200
"""Approximate maximum number of measurements of a training, if λ depends on them."""
KEPT = 2 / 3
"""Weight of the earlier measurements in the smoothed norms."""

Batches = Callable[[], Iterable[Batch]]
"""Returns this rank's micro-batches of a step."""


@dataclass
class GradientScaled(MixWeight):
    """λ as the share in the norm of the step: with n_p and n_f the smoothed gradient norms of the two mean losses,

        λ_t = (λ / n_p) / (λ / n_p + (1 - λ) / n_f)

    is the λ of the loss for which the gradients of the two parts have norms in the ratio λ : (1 - λ). The weights of the two
    losses still add up to 1. The norms are constants in the loss: no gradient passes through them. This is the loss balancing
    of EnCodec (A. Défossez et al., High Fidelity Neural Audio Compression, arXiv:2210.13438), with that normalisation.

    Attributes:
        norm_share: λ, a constant or a schedule.
        pretrain: n_p; 0 before the first measurement.
        finetune: n_f; 0 before the first measurement.
    """

    norm_share: MixWeight
    pretrain: float = 0.0
    finetune: float = 0.0

    def at(self, step: int) -> float | None:
        """Returns λ_t; λ before the first measurement."""
        share = self.norm_share.at(step)
        if share is None or not self.pretrain or not self.finetune:
            return share
        of_text, of_labels = share / self.pretrain, (1 - share) / self.finetune
        return of_text / (of_text + of_labels)

    def weights(self, step: int, num_pretrain: int, num_finetune: float) -> Weights:
        """Returns the token weights for λ_t."""
        mix_weight = self.at(step) or 0.0
        return split(mix_weight, num_pretrain, num_finetune)

    def observe_norms(self, pretrain: float, finetune: float) -> None:
        """Updates the smoothed norms. Ignores norms that are 0 or not finite."""
        if not (0 < pretrain < math.inf and 0 < finetune < math.inf):
            return
        kept = KEPT if self.pretrain else 0.0
        self.pretrain = kept * self.pretrain + (1 - kept) * pretrain
        self.finetune = kept * self.finetune + (1 - kept) * finetune

    def state(self) -> dict[str, Any]:
        """Returns the state that a resumed training needs."""
        return {"pretrain": self.pretrain, "finetune": self.finetune}

    def restore(self, state: dict[str, Any]) -> None:
        """Restores the state that `state` returned."""
        self.pretrain, self.finetune = float(state["pretrain"]), float(state["finetune"])


def steps_to_measure(steps: int, scaled: bool) -> frozenset[int]:
    """Returns the steps at which both gradients are measured: a function of the length of the training.

    Args:
        scaled: whether λ depends on the measurements.
    """
    if scaled:
        return frozenset(range(0, steps, max(SCALED_EVERY, steps // SCALED_MEASUREMENTS)))
    count = max(1, min(MEASUREMENTS, int(COST * steps)))
    return frozenset(int((number + 0.5) * steps / count) for number in range(count))


@dataclass
class TugOfWar:
    """Measures the gradients of both streams at some steps of a training. All ranks take part and get the same result.

    Attributes:
        wrapped: the model as the training loop calls it.
        mix_weight: λ; it is told the norms if it depends on them.
        steps: optimizer steps of the training.
    """

    accelerator: Accelerator
    wrapped: nn.Module
    mix_weight: MixWeight
    steps: int
    _due: frozenset[int] = field(init=False)
    _text: list[Tensor] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._due = steps_to_measure(self.steps, isinstance(self.mix_weight, GradientScaled))

    def before_first(self, data: StepData, batches: Batches) -> None:
        """Measures the norms that λ of the first step depends on, in two passes."""
        scaled = self.mix_weight
        if not isinstance(scaled, GradientScaled) or scaled.pretrain or not (data.num_pretrain and data.sum_finetune):
            return
        of_streams = (1 / data.num_pretrain, 0.0), (0.0, 1 / data.sum_finetune)
        pretrain, finetune = (self._norm(self._gradient(batches, weights)) for weights in of_streams)
        scaled.observe_norms(pretrain, finetune)

    def before_step(self, step: int, data: StepData, weights: Weights, batches: Batches) -> None:
        """Computes the gradient of the pretraining stream's part, if the step is to be measured and has both streams."""
        both = data.num_pretrain and data.sum_finetune and weights[0] > 0 and weights[1] > 0
        self._text = self._gradient(batches, (weights[0], 0.0)) if step in self._due and both else None

    def after_step(self, data: StepData, weights: Weights) -> dict[str, float]:
        """Compares this gradient with the one that the parameters hold now.

        Penalties on the tokens of the fine-tuning stream count as a part of it.

        Returns:
            Metrics to log: `grad_norm_pretrain` and `grad_norm_finetune`, the gradient norms of the two mean losses, not
            multiplied by λ; `grad_cosine`, the cosine between them; `norm_share_pretrain`, ||g_p|| / (||g_p|| + ||g_f||);
            `step_share_pretrain`, see above. Empty if the step was not measured, or if a gradient is 0 or not finite.
        """
        if self._text is None:
            return {}
        sums = torch.zeros(3, dtype=torch.float64, device=self.accelerator.device)
        for parameter, moved in zip(_trained(self.wrapped), self._text, strict=True):
            text = moved.to(parameter.device, non_blocking=True)
            rest = -text if parameter.grad is None else local(parameter.grad) - text
            sums += torch.stack(
                [(a * b).sum(dtype=torch.float64) for a, b in ((text, text), (rest, rest), (text, rest))]
            )
        self._text = None
        of_text, of_rest, product = sum_over_shards(self.wrapped, sums).tolist()
        total = of_text + 2 * product + of_rest
        if not (0 < of_text < math.inf and 0 < of_rest < math.inf and 0 < total < math.inf):
            return {}
        pretrain = math.sqrt(of_text) / (weights[0] * data.num_pretrain)
        finetune = math.sqrt(of_rest) / (weights[1] * data.sum_finetune)
        if isinstance(self.mix_weight, GradientScaled):
            self.mix_weight.observe_norms(pretrain, finetune)
        return {
            "grad_norm_pretrain": pretrain,
            "grad_norm_finetune": finetune,
            "grad_cosine": product / math.sqrt(of_text * of_rest),
            "norm_share_pretrain": math.sqrt(of_text) / (math.sqrt(of_text) + math.sqrt(of_rest)),
            "step_share_pretrain": (of_text + product) / total,
        }

    def _gradient(self, batches: Batches, weights: Weights) -> list[Tensor]:
        """Returns the gradient of a step's loss with other weights, of each trained parameter, summed over all ranks.

        If the model is sharded, it is that of this rank's part of the parameter.

        Random states and gradients are afterwards as before. The result is in the memory of the CPU: a step then needs no more
        memory of a GPU than any other.
        """
        device = self.accelerator.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []), self.accelerator.no_sync(self.wrapped):
            for batch in batches():
                self.accelerator.backward(self.wrapped(batch, *weights)["weighted"])
        gradient = []
        for parameter in _trained(self.wrapped):
            own = local(parameter.grad if parameter.grad is not None else torch.zeros_like(parameter))
            # The backward pass of a sharded model has averaged over the ranks.
            ranks = self.accelerator.num_processes
            total = own * ranks if is_sharded(self.wrapped) else self.accelerator.reduce(own, "sum")
            gradient.append(_to_cpu(total.detach()))
            parameter.grad = None
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return gradient

    def _norm(self, gradient: Iterable[Tensor]) -> float:
        squares = sum(float((part * part).sum(dtype=torch.float64)) for part in gradient)
        total = torch.tensor(squares, dtype=torch.float64, device=self.accelerator.device)
        return math.sqrt(float(sum_over_shards(self.wrapped, total)))


def _to_cpu(tensor: Tensor) -> Tensor:
    """Starts a copy to page-locked memory, which is several times faster than one to other memory."""
    if tensor.device.type == "cpu":
        return tensor
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
