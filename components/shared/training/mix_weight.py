"""λ, the weight of the pretraining loss: a constant, a schedule, or implied by pooling.

An optimizer step's loss is Σ w_i · ce_i. The classes here determine w for each stream, as pure functions of the step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..config import LambdaSchedule

Weights = tuple[float, float]
"""Weight of a supervised pretraining token and of a supervised fine-tuning token (or example)."""


class MixWeight:
    """Interface between the training loop and a λ. Most have no state."""

    def at(self, step: int) -> float | None:
        """Returns the configured λ of a step; None if it is not configured."""
        raise NotImplementedError

    def weights(self, step: int, num_pretrain: int, num_finetune: float) -> Weights:
        """Returns the token weights of a step, from the counts N_pt and N_ft of the whole step.

        Where examples have weights of their own, N_ft is the sum of these weights.
        """
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """Returns the state that a resumed training needs."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Restores the state that `state` returned."""


def split(mix_weight: float, num_pretrain: int, num_finetune: float) -> Weights:
    """Returns λ / N_pt and (1 - λ) / N_ft."""
    return mix_weight / (num_pretrain or 1), (1 - mix_weight) / (num_finetune or 1)


def realised(weights: Weights, num_pretrain: int, num_finetune: float) -> float:
    """Returns the share of the step's weights on its pretraining tokens."""
    of_text, of_labels = weights[0] * num_pretrain, weights[1] * num_finetune
    return of_text / (of_text + of_labels) if of_text + of_labels else 0.0


@dataclass(frozen=True)
class Constant(MixWeight):
    """A constant λ."""

    mix_weight: float

    def at(self, step: int) -> float:
        """Returns λ."""
        return self.mix_weight

    def weights(self, step: int, num_pretrain: int, num_finetune: float) -> Weights:
        """Returns `split` of λ."""
        return split(self.mix_weight, num_pretrain, num_finetune)


@dataclass(frozen=True)
class Scheduled(MixWeight):
    """λ as a function of the step.

    Attributes:
        schedule: shape and values of the schedule.
        steps: optimizer steps of the training.
    """

    schedule: LambdaSchedule
    steps: int

    def at(self, step: int) -> float:
        """Returns λ at a step: the first value at step 0, the last value at the last step."""
        values = self.schedule.values
        done = step / max(self.steps - 1, 1)
        if self.schedule.shape == "steps":
            return values[sum(step >= round(start * self.steps) for start in self.schedule.starts) - 1]
        position = done * (len(values) - 1)
        low = min(int(position), len(values) - 2)
        share = position - low
        if self.schedule.shape == "cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        return values[low] + share * (values[low + 1] - values[low])

    def weights(self, step: int, num_pretrain: int, num_finetune: float) -> Weights:
        """Returns `split` of the step's λ."""
        return split(self.at(step), num_pretrain, num_finetune)


@dataclass(frozen=True)
class Sampled(MixWeight):
    """λ in expectation only: weights from the mean counts of steps whose numbers of items are drawn (`SampledMix`).

    With q the probability of drawing an item of the pretraining stream, its tokens weigh λ / E[N_pt], and E[N_pt] is
    proportional to q: this is the correction w / q of importance sampling. What a step really draws is not looked at.

    Attributes:
        mix_weight: λ.
        mean_pretrain: E[N_pt], supervised tokens of the pretraining stream in a step.
        mean_finetune: E[N_ft].
    """

    mix_weight: float
    mean_pretrain: float
    mean_finetune: float

    def at(self, step: int) -> float:
        """Returns λ."""
        return self.mix_weight

    def weights(self, step: int, num_pretrain: int, num_finetune: float) -> Weights:
        """Returns the same weights for every step."""
        return self.mix_weight / self.mean_pretrain, (1 - self.mix_weight) / self.mean_finetune


@dataclass(frozen=True)
class Pooled(MixWeight):
    """One mean over the tokens of both streams, as if the data sets were mixed by sampling. λ follows from the counts."""

    def at(self, step: int) -> None:
        """Returns None, since λ is not configured."""
        return None

    def weights(self, step: int, num_pretrain: int, num_finetune: float) -> Weights:
        """Returns equal weights for all supervised tokens (or examples)."""
        weight = 1 / max(num_pretrain + num_finetune, 1)
        return weight, weight
