"""Finds the λ of a forgetting budget: a constant λ, from how much trainings with other constants have forgotten."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from ..config import Budget
from ..model.mixed_model import MixedModel
from .control import ControlText

SMALLEST = 1e-3
"""Smallest λ other than 0. Adam takes a whole step along a gradient of any size: weights that only the text moves, such as
those of the LM head under a task head, would move as at any λ."""
LEAST_LIMIT = 0.01
"""Smallest limit, in nats per token, for budgets near 0."""
NEAR = (0.8, 1.1)
"""Shares of what is allowed that end the search. The weights are pulled back from what is above 1."""
AIM = 0.95
"""Share of what is allowed that the next λ is chosen for."""
FIRST_SLOPE = 0.5
"""Assumed fall of forgetting after one training, as a share of it, for each unit of log λ / (1 - λ). At λ = 0.1, 0.15 to 0.9
were seen."""
FARTHEST = math.log(10)
"""Largest change of log λ / (1 - λ) that rests on this assumption."""
LEAST_HELP = 0.5
"""Share of the forgetting beyond what is allowed that the largest λ must be expected to prevent, for a larger λ to be tried."""


@dataclass(frozen=True)
class Trial:
    """A training with a constant λ.

    Attributes:
        mix_weight: λ.
        forgetting: of control text, in nats per token, before any pull back.
        allowed: forgetting that was allowed, in nats per token.
    """

    mix_weight: float
    forgetting: float
    allowed: float


@dataclass
class BudgetSearch:
    """Chooses the λ of one training after another, until one forgets about as much as is allowed.

    Forgetting f is nearly linear in x = log λ / (1 - λ). After one training, x changes by (f - τ) / (f / 2), with τ the
    forgetting to aim at; after that the line through the two trainings next to τ gives x. So it is the secant method, or false
    position once τ lies between two trainings. A λ below `SMALLEST` is 0. Where a larger λ hardly helps, none is tried: it
    would cost task score, and the pull back does better. The search is deterministic.

    Attributes:
        budget: in nats per token.
        options: the first and the largest λ, and the maximum number of trainings.
        control: text on which forgetting is measured.
        load_reference: loads the model that forgetting is measured against.
        mix_weight: λ of the training that is to be made now.
        trials: the trainings so far.
        done: whether the last of them is the candidate.
    """

    budget: float
    options: Budget
    control: ControlText
    load_reference: Callable[[], MixedModel]
    mix_weight: float = field(init=False)
    trials: list[Trial] = field(init=False, default_factory=list)
    done: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self.mix_weight = self._possible(self.options.start_lambda)

    @property
    def limit(self) -> float:
        """Returns the forgetting that the trained model may have, in nats per token: the budget, or `LEAST_LIMIT`."""
        return max(self.budget, LEAST_LIMIT)

    def note(self, forgetting: float, allowed: float) -> None:
        """Notes the result of a training and chooses the next λ, unless this training was the last.

        Args:
            forgetting: of control text, in nats per token.
            allowed: forgetting that is allowed, in nats per token.
        """
        self.trials.append(Trial(self.mix_weight, forgetting, allowed))
        wanted = self._next()
        if wanted is None:
            self.done = True
        else:
            self.mix_weight = wanted

    def _next(self) -> float | None:
        last = self.trials[-1]
        is_near = NEAR[0] <= last.forgetting / last.allowed <= NEAR[1]
        if is_near or not math.isfinite(last.forgetting) or len(self.trials) == self.options.max_trainings:
            return None
        position = self._position(last)
        if position is None:
            return None
        # Three digits are enough, and a user can train with the same λ.
        wanted = self._possible(float(f"{1 / (1 + math.exp(-max(position, -99.0))):.3g}"))
        return None if wanted in [trial.mix_weight for trial in self.trials] else wanted

    def _possible(self, mix_weight: float) -> float:
        bounded = min(mix_weight, self.options.max_lambda)
        return bounded if bounded >= SMALLEST else 0.0

    def _position(self, last: Trial) -> float | None:
        """Returns log λ / (1 - λ) of the next training; None if none is worth while."""
        aim = AIM * last.allowed
        points = sorted((_logit(trial.mix_weight), trial.forgetting) for trial in self.trials)
        if len(points) == 1:
            ((x, found),) = points
            return x + max((1 - aim / found) / FIRST_SLOPE, -FARTHEST) if found > 0 else x - FARTHEST
        over = [point for point in points if point[1] > aim]
        under = [point for point in points if point[1] <= aim]
        # The two next to the aim, or the two at the end that is nearer to it.
        left, right = (over[-1], under[0]) if over and under else points[:2] if under else points[-2:]
        slope = (right[1] - left[1]) / (right[0] - left[0])
        if not over:
            return left[0] + (aim - left[1]) / slope if slope < 0 else -math.inf
        if not under:
            most = _logit(self.options.max_lambda)
            if slope * (most - right[0]) > -LEAST_HELP * (right[1] - last.allowed):
                return None
        return right[0] + (aim - right[1]) / slope if slope < 0 else None


def _logit(mix_weight: float) -> float:
    """Returns log λ / (1 - λ). That of 0 is taken to be 1 below that of the smallest λ."""
    bounded = max(mix_weight, SMALLEST)
    return math.log(bounded / (1 - bounded)) - (mix_weight == 0)
