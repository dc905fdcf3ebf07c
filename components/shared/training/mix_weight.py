"""λ, the weight of the pretraining loss: a constant, a schedule, implied by pooling, or adapted to a forgetting budget.

An optimizer step's loss is Σ w_i · ce_i. The classes here determine w for each stream. A constant and a schedule are pure
functions of the step; the budget's controller has a state of five numbers.
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

    def at(self, step: int) -> float | None:
        """Returns the configured λ of a step; None if it is not configured."""
        raise NotImplementedError

    def weights(self, step: int, num_pretrain: int, num_finetune: float) -> Weights:
        """Returns the token weights of a step, from the counts N_pt and N_ft of the whole step.

        Where examples have weights of their own, N_ft is the sum of these weights.
        """
        raise NotImplementedError

    def observe(self, nats: float, tokens: int, done: int, rate: float) -> None:
        """Updates λ from a measurement of forgetting, with effect from the next step.

        Args:
            nats: rise of the loss on control text over the reference model, Σ ce.
            tokens: predicted tokens of the text that was read.
            done: completed optimizer steps.
            rate: the last step's learning rate as a fraction of its peak.
        """

    def metrics(self) -> dict[str, float]:
        """Returns metrics to log besides λ."""
        return {}

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


@dataclass
class BudgetController(MixWeight):
    """Adapts λ as the multiplier of the constraint "forgetting at most the budget": dual ascent with a proportional part.

    With the rises of the loss on control text that the measurements found, in nats, their numbers of predicted tokens, ε the
    budget, r the learning rate as a share of its peak, and t the share of the training that is done,

        f̄ = Σ β^k nats_k / Σ β^k tokens_k          smoothed forgetting; k = 0 is the last measurement
        τ = aim · ε · (1 + slack · r)              the forgetting to hold now
        v = (f̄ - τ) / max(τ, τ_min)                violation of the constraint
        dν = gain · clip(v, -1/2, 2) · dt          the dual variable, in its logarithm
        log μ = ν + response · min(v, 3)           if v ≥ 0, else on the line from ν at v = 0 to λ_min at v = -1
        λ = μ / (1 + μ)  in  [λ_min, λ_max], and 0 where that is below 0.001

    ν ascends the dual of  min L_finetune  s. t.  f ≤ ε. The proportional part reacts at once and damps: dual ascent alone lags
    behind the model and oscillates (A. Stooke et al., PID Lagrangian methods, arXiv:2007.03964). Before anything is forgotten,
    v = -1: λ starts at λ_min and rises as forgetting nears τ. λ_min is tiny, and what is below 0.001 is 0, since Adam takes a
    whole step along a gradient of any size: weights that only the text moves, such as those of the LM head, move as at any λ,
    and a budget could not be used. `start_lambda` is the first guess of the λ at τ. The
    slack is for forgetting that disappears as the learning rate decays; `aim` leaves room for the error of the measurement. The
    controller is deterministic, and `state` suffices to resume it.

    Attributes:
        budget: ε, in nats per token.
        options: gain, response, smoothing, bounds and initial value.
        steps: optimizer steps of the training.
        dual: ν.
        nats: Σ β^k nats_k.
        tokens: Σ β^k tokens_k.
        rate: r at the last measurement.
        done: steps before the last measurement.
    """

    budget: float
    options: Budget
    steps: int
    dual: float = field(init=False)
    nats: float = 0.0
    tokens: float = 0.0
    rate: float = 1.0
    done: int = 0

    SMALLEST: ClassVar[float] = 1e-3
    """Smallest λ other than 0."""
    SMALLEST_SCALE: ClassVar[float] = (
        0.02  # τ_min, nats per token: with a budget near zero every measurement would be a huge violation
    )

    def __post_init__(self) -> None:
        self.dual = _logit(self.options.start_lambda)

    def at(self, step: int) -> float:
        """Returns the current λ."""
        violation = min(max(self.violation, -1.0), 3.0)
        slope = self.options.response if violation >= 0 else self.dual - _logit(self.options.min_lambda)
        proportional = slope * violation
        weight = 1 / (1 + math.exp(-self._bounded(self.dual + proportional)))
        return weight if weight > self.SMALLEST * (1 - 1e-9) else 0.0  # a minimum of 0.001 is not rounded to 0

    def weights(self, step: int, num_pretrain: int, num_finetune: float) -> Weights:
        """Returns `split` of the current λ."""
        return split(self.at(step), num_pretrain, num_finetune)

    def observe(self, nats: float, tokens: int, done: int, rate: float) -> None:
        """Updates λ from a measurement, with effect from the next step."""
        keep = 1 - 1 / self.options.smoothing
        self.nats = keep * self.nats + nats
        self.tokens = keep * self.tokens + tokens
        share = (done - self.done) / max(self.steps, 1)
        self.done, self.rate = done, rate
        # Bounded, to avoid windup while λ is at its bound.
        self.dual = self._bounded(self.dual + self.options.gain * share * min(max(self.violation, -0.5), 2.0))

    @property
    def forgetting(self) -> float:
        """Returns f̄, in nats per token; 0 before the first measurement, since nothing is forgotten at the start."""
        return self.nats / self.tokens if self.tokens else 0.0

    @property
    def limit(self) -> float:
        """Returns the forgetting that the trained model may have, in nats per token: ε, and a little for ε near zero."""
        return max(self.budget, self.SMALLEST_SCALE / 2)

    @property
    def violation(self) -> float:
        """Returns v."""
        target = self.options.aim * self.budget * (1 + self.options.slack * self.rate)
        return (self.forgetting - target) / max(target, self.SMALLEST_SCALE)

    def metrics(self) -> dict[str, float]:
        """Returns the smoothed forgetting and the budget, in nats per token."""
        return {"forgetting": self.forgetting, "forgetting_budget": self.budget}

    def state(self) -> dict[str, Any]:
        """Returns the state that a resumed training needs."""
        return {name: getattr(self, name) for name in _STATE}

    def restore(self, state: dict[str, Any]) -> None:
        """Restores the state that `state` returned."""
        for name in _STATE:
            setattr(self, name, state[name])

    def _bounded(self, log_multiplier: float) -> float:
        return min(max(log_multiplier, _logit(self.options.min_lambda)), _logit(self.options.max_lambda))


_STATE = ("dual", "nats", "tokens", "rate", "done")


def _logit(probability: float) -> float:
    return math.log(probability / (1 - probability))
