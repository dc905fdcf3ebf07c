"""The line from a trained model to its reference: how far it is followed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from accelerate import Accelerator

from mixtune.components.shared.model.mixed_model import MixedModel
from mixtune.components.shared.training.control import ControlText
from mixtune.components.shared.training.pull_back import allowed_forgetting, pull_back

from .tiny import tiny_model


class Landscape(ControlText):
    """Control text of which a model forgets a given function of α."""

    def __init__(self, trained: MixedModel, reference: MixedModel, forgets: Callable[[float], float]) -> None:
        self.origin, self.forgets = flat(reference), forgets
        self.whole = float((flat(trained) - self.origin).norm())

    def forgetting(self, model: MixedModel, accelerator: Accelerator) -> tuple[float, float]:
        return self.forgets(float((flat(model) - self.origin).norm()) / self.whole), 0.0


def flat(model: MixedModel) -> torch.Tensor:
    return torch.cat([weight.detach().flatten() for weight in model.lm.parameters()])


def behind_a_barrier(alpha: float) -> float:
    """Falls to 1.05 at 0.8, rises to 1.2 at 0.5, and falls to 0."""
    if alpha >= 0.8:
        return 1.05 + (alpha - 0.8)
    return 1.2 - 0.5 * (alpha - 0.5) if alpha >= 0.5 else 2.4 * alpha


@pytest.mark.parametrize(
    ("forgets", "wanted"),
    [
        (lambda alpha: 0.9 * alpha, 1.0),
        (lambda alpha: 2 * alpha**2, 0.5**0.5),
        (lambda alpha: 25 * alpha, 0.04),
        (behind_a_barrier, 0.8),
        (lambda alpha: 1.5 - 0.2 * alpha, 1.0),
    ],
    ids=["kept", "a parabola", "far", "a barrier", "uphill"],
)
def test_the_line_is_followed_as_long_as_forgetting_falls(forgets: Callable[[float], float], wanted: float) -> None:
    reference, trained = tiny_model(seed=1), tiny_model(seed=2)
    ends, control = (flat(reference), flat(trained)), Landscape(trained, reference, forgets)
    alpha = pull_back(trained, lambda: reference, control, forgets(1.0), 1.0, Accelerator(cpu=True))
    assert alpha == pytest.approx(wanted, abs=0.01)
    torch.testing.assert_close(flat(trained), ends[0] + (ends[1] - ends[0]) * alpha, rtol=1e-4, atol=1e-5)


def test_what_is_allowed_leaves_room_for_other_text() -> None:
    assert allowed_forgetting(0.1, 0.0) == pytest.approx(0.095)
    assert allowed_forgetting(0.1, 0.01) == pytest.approx(0.11 - 2.326 * 0.01, abs=1e-4)
    assert allowed_forgetting(0.1, 0.1) == allowed_forgetting(0.1, float("inf")) == 0.05
