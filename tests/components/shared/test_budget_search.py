"""The λ of a forgetting budget: found in few trainings, bounded, and 0 where nothing needs to be prevented."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixtune.components.shared.config import Budget
from mixtune.components.shared.training.budget_search import LEAST_LIMIT, NEAR, SMALLEST, BudgetSearch
from mixtune.components.shared.training.control import ControlText

CONTROL = ControlText([], 1, 0, 1)


def search(forgets: Callable[[float], float], budget: float = 0.1, **options: Any) -> BudgetSearch:
    """Searches with trainings that forget a given function of λ, and allows nine tenths of the budget."""
    found = BudgetSearch(budget, Budget(**options), CONTROL, lambda: pytest.fail("loads a model"))
    while not found.done:
        found.note(forgets(found.mix_weight), 0.9 * found.limit)
    return found


def position(mix_weight: float) -> float:
    bounded = max(mix_weight, SMALLEST)
    return math.log(bounded / (1 - bounded))


def convex(at_middle: float, slope: float, curvature: float) -> Callable[[float], float]:
    """Forgetting that falls with log λ / (1 - λ), less and less steeply.

    Args:
        at_middle: forgetting with λ = 0.1.
        slope: fall there for each unit, as a share of it.
        curvature: 0 for a straight line.
    """

    def forgets(mix_weight: float) -> float:
        away = position(mix_weight) - position(0.1)
        return at_middle * (1 - slope * away + curvature * away * away)

    return forgets


@pytest.mark.parametrize(("trainings", "most"), [(3, 5.0), (4, 10.0)])
@given(share=st.floats(0, 1), slope=st.floats(0.25, 0.9), bend=st.floats(0, 0.5), budget=st.sampled_from([0.05, 0.1]))
def test_few_trainings_come_near_what_is_allowed(
    trainings: int, most: float, share: float, slope: float, bend: float, budget: float
) -> None:
    # The first training forgets a fifth of the budget to `most` times the budget. The parabola falls as far as 2.2, the
    # position of the largest λ from that of 0.1.
    forgets = convex(budget * (0.2 + share * (most - 0.2)), slope, bend * slope / 4.4)
    allowed = 0.9 * budget
    found = search(forgets, budget, max_trainings=trainings)
    last = found.trials[-1]
    assert len(found.trials) <= trainings
    if last.forgetting > 1.5 * allowed:
        assert forgets(0.5) > allowed, "even the largest λ prevents too little"
    elif last.forgetting < 0.5 * allowed:
        assert last.mix_weight == 0, "even no λ forgets more"


@given(
    data=st.data(),
    most=st.integers(1, 10),
    start=st.floats(0, 0.99),
    largest=st.floats(0, 0.99),
    budget=st.floats(0, 2),
)
def test_whatever_is_measured_each_lambda_is_tried_once_and_within_the_bounds(
    data: st.DataObject, most: int, start: float, largest: float, budget: float
) -> None:
    start, largest = sorted((start, largest))
    drawn = data.draw(st.lists(st.floats(-5, 20), min_size=most, max_size=most))
    options = {"start_lambda": start, "max_lambda": largest, "max_trainings": most}
    one, two = (search(lambda _, left=list(drawn): left.pop(0), budget, **options) for _ in range(2))  # type: ignore[misc]
    assert one.trials == two.trials
    tried = [trial.mix_weight for trial in one.trials]
    assert tried[0] == (start if start >= SMALLEST else 0)
    assert 1 <= len(tried) == len(set(tried)) <= most
    assert all(weight == 0 or SMALLEST <= weight <= largest for weight in tried)
    assert one.limit == max(budget, LEAST_LIMIT)


def test_a_training_that_is_near_is_the_only_one() -> None:
    for share in (NEAR[0] + 0.01, 1.0, NEAR[1] - 0.01):
        assert len(search(lambda _, share=share: share * 0.09, start_lambda=0.2).trials) == 1  # type: ignore[misc]


@pytest.mark.parametrize("alone", [0.03, 5e-324, 0.0, -0.2])
def test_where_little_is_forgotten_lambda_becomes_0(alone: float) -> None:
    found = search(lambda mix_weight: alone * (1 - mix_weight))
    assert [trial.mix_weight for trial in found.trials] == [0.1, 0.011, 0.0]


def test_a_larger_lambda_that_hardly_helps_is_not_tried() -> None:
    found = search(convex(0.3, 0.03, 0), budget=0.15)
    assert len(found.trials) == 2
    assert found.trials[-1].mix_weight < 0.4
    helps = search(convex(0.3, 0.3, 0), budget=0.15)
    assert helps.trials[-1].mix_weight == 0.5 or NEAR[0] <= helps.trials[-1].forgetting / (0.9 * 0.15) <= NEAR[1]


def test_between_two_trainings_the_line_is_followed() -> None:
    found = search(convex(0.2, 0.5, 0), budget=0.1)
    assert [round(trial.forgetting / 0.09, 2) for trial in found.trials][-1] == pytest.approx(0.95, abs=0.02)


def test_a_loss_that_is_not_finite_ends_the_search() -> None:
    assert len(search(lambda _: math.nan).trials) == 1
