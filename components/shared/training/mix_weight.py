"""λ, the weight of the pretraining loss: a constant, a schedule, implied by pooling, or adapted to a forgetting budget.

An optimizer step's loss is Σ w_i · ce_i. The classes here determine w for each stream. A constant and a schedule are pure
functions of the step; the budget's controller has a state of four numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..config import Budget, LambdaSchedule

Weights = tuple[float, float]
"""Weight of a supervised pretraining token and of a supervised fine-tuning token (or example)."""


class MixWeight:
    """Interface between the training loop and a λ. Without adaptation there is no state."""

    adapts: ClassVar[bool] = False
    """Whether the loop must compute each step's forgetting and call `observe`."""

    def at(self, step: int) -> float | None:
        """Returns the configured λ of a step; None if it is not configured."""
        raise NotImplementedError

    def weights(self, step: int, num_pretrain: int, num_finetune: int) -> Weights:
        """Returns the token weights of a step, from the counts N_pt and N_ft of the whole step."""
        raise NotImplementedError

    def observe(self, forgetting: float, rate: float) -> None:
        """Updates λ from a step's measurement, with effect from the next step.

        Args:
            forgetting: the step's forgetting, in nats per token.
            rate: the step's learning rate as a fraction of its peak.
        """

    def metrics(self) -> dict[str, float]:
        """Returns metrics to log besides λ."""
        return {}

    def state(self) -> dict[str, Any]:
        """Returns the state that a resumed training needs."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Restores the state that `state` returned."""


def split(mix_weight: float, num_pretrain: int, num_finetune: int) -> Weights:
    """Returns λ / N_pt and (1 - λ) / N_ft."""
    return mix_weight / max(num_pretrain, 1), (1 - mix_weight) / max(num_finetune, 1)


def realised(weights: Weights, num_pretrain: int, num_finetune: int) -> float:
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

    def weights(self, step: int, num_pretrain: int, num_finetune: int) -> Weights:
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

    def weights(self, step: int, num_pretrain: int, num_finetune: int) -> Weights:
        """Returns `split` of the step's λ."""
        return split(self.at(step), num_pretrain, num_finetune)


@dataclass(frozen=True)
class Pooled(MixWeight):
    """One mean over the tokens of both streams, as if the data sets were mixed by sampling. λ follows from the counts."""

    def at(self, step: int) -> None:
        """Returns None, since λ is not configured."""
        return None

    def weights(self, step: int, num_pretrain: int, num_finetune: int) -> Weights:
        """Returns equal weights for all supervised tokens (or examples)."""
        weight = 1 / max(num_pretrain + num_finetune, 1)
        return weight, weight


@dataclass
class BudgetController(MixWeight):
    """Adapts λ as the multiplier of the constraint "forgetting at most the budget": dual ascent on a smoothed measurement.

    With f_s the loss of step s on its pretraining tokens less that of the pretrained model on the same tokens, in nats per
    token, before the step's update, ε the budget, r the learning rate as a share of its peak and n the number of steps,

        f̄ = Σ_s β^(t-s) f_s / Σ_s β^(t-s)                          smoothed forgetting
        v = clip((f̄ - ε · (1 + slack · r)) / max(ε, ε_min), -1/2, 1)     violation, relative to the budget
        ν ← ν + (gain / n) · v                                     the dual variable, in its logarithm
        log μ = ν + response · v,   λ = μ / (1 + μ)  in  [λ_min, λ_max]

    ν ascends the dual of  min L_finetune  s. t.  f ≤ ε. The proportional term reacts at once and damps: dual ascent alone lags
    behind the model and oscillates (A. Stooke et al., PID Lagrangian methods, arXiv:2007.03964). λ falls half as fast as it
    rises, since models forget faster than they recover. The slack accounts for temporary forgetting, which partly disappears as
    the learning rate decays; λ need not counter it. The controller is deterministic, and `state` suffices to resume it.

    Attributes:
        budget: ε, in nats per token.
        options: gain, response, smoothing, bounds and initial value.
        steps: n.
        dual: ν.
        weighted_sum: Σ β^(t-s) f_s.
        weight: Σ β^(t-s).
        rate: r of the last measurement.
    """

    budget: float
    options: Budget
    steps: int
    dual: float = field(init=False)
    weighted_sum: float = 0.0
    weight: float = 0.0
    rate: float = 0.0

    adapts: ClassVar[bool] = True
    SMALLEST_SCALE: ClassVar[float] = (
        0.02  # ε_min, nats per token: with a budget near zero every measurement would be a huge violation
    )

    def __post_init__(self) -> None:
        self.dual = _logit(self.options.start_lambda)

    def at(self, step: int) -> float:
        """Returns the current λ."""
        return 1 / (1 + math.exp(-self._bounded(self.dual + self.options.response * self.violation)))

    def weights(self, step: int, num_pretrain: int, num_finetune: int) -> Weights:
        """Returns `split` of the current λ."""
        return split(self.at(step), num_pretrain, num_finetune)

    def observe(self, forgetting: float, rate: float) -> None:
        """Updates λ from f_s, in nats per token, and r, with effect from the next step."""
        self.rate = rate
        keep = 1 - 1 / self.options.smoothing_steps
        self.weighted_sum = keep * self.weighted_sum + forgetting
        self.weight = keep * self.weight + 1
        # Clipped, to avoid windup while λ is at its bound.
        self.dual = self._bounded(self.dual + self.options.gain / max(self.steps, 1) * self.violation)

    @property
    def smoothed(self) -> float:
        """Returns f̄, in nats per token; 0 before the first measurement."""
        return self.weighted_sum / self.weight if self.weight else 0.0

    @property
    def violation(self) -> float:
        """Returns v; 0 before the first measurement."""
        if not self.weight:
            return 0.0
        target = self.budget * (1 + self.options.slack * self.rate)
        return min(max((self.smoothed - target) / max(self.budget, self.SMALLEST_SCALE), -0.5), 1.0)

    def metrics(self) -> dict[str, float]:
        """Returns the smoothed forgetting and the budget, in nats per token."""
        return {"forgetting": self.smoothed, "forgetting_budget": self.budget}

    def state(self) -> dict[str, Any]:
        """Returns the state that a resumed training needs."""
        return {"dual": self.dual, "weighted_sum": self.weighted_sum, "weight": self.weight, "rate": self.rate}

    def restore(self, state: dict[str, Any]) -> None:
        """Restores the state that `state` returned."""
        self.dual, self.weighted_sum = float(state["dual"]), float(state["weighted_sum"])
        self.weight, self.rate = float(state["weight"]), float(state["rate"])

    def _bounded(self, log_multiplier: float) -> float:
        return min(max(log_multiplier, _logit(self.options.min_lambda)), _logit(self.options.max_lambda))


def _logit(probability: float) -> float:
    return math.log(probability / (1 - probability))
