"""λ: constants and schedules are functions of the step alone; the controller is exact, bounded and finds its budget."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mixtune.components.shared.config import Budget, LambdaSchedule
from mixtune.components.shared.training.mix_weight import (
    BudgetController,
    Constant,
    MixWeight,
    Pooled,
    Scheduled,
    realised,
)

LAMBDA = st.floats(0, 1)
VALUES = st.lists(LAMBDA, min_size=2, max_size=5)
COUNT = st.integers(1, 10_000)
SHAPES = st.sampled_from(["linear", "cosine", "steps"])


def scheduled(shape: str, values: list[float], steps: int, starts: list[float] | None = None) -> Scheduled:
    return Scheduled(LambdaSchedule.model_validate({"shape": shape, "values": values, "starts": starts or []}), steps)


@given(shape=SHAPES, values=VALUES, steps=st.integers(5, 300), at=st.lists(st.integers(0, 299), max_size=9))
def test_a_schedule_is_a_function_of_the_step_within_its_values(
    shape: str, values: list[float], steps: int, at: list[int]
) -> None:
    schedule = scheduled(shape, values, steps)
    course = [schedule.at(step) for step in range(steps)]
    assert course[0] == values[0]
    assert course[-1] == pytest.approx(values[-1], abs=1e-12)
    assert min(values) - 1e-12 <= min(course)
    assert max(course) <= max(values) + 1e-12
    for step in at:  # in any order, by another object
        if step < steps:
            assert scheduled(shape, values, steps).at(step) == course[step]


@given(shape=st.sampled_from(["linear", "cosine"]), low=LAMBDA, high=LAMBDA, steps=st.integers(2, 200))
def test_between_two_values_it_only_goes_one_way(shape: str, low: float, high: float, steps: int) -> None:
    course = [scheduled(shape, [low, high], steps).at(step) for step in range(steps)]
    rising = [later - before for before, later in pairwise(course)]
    assert all(change * (high - low) >= -1e-12 for change in rising)
    middle = scheduled(shape, [low, high], 2 * steps + 1).at(steps)
    assert middle == pytest.approx((low + high) / 2, abs=1e-9)


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_the_values_in_between_are_reached_at_even_distances(shape: str) -> None:
    schedule = scheduled(shape, [0.8, 0.2, 0.5], 21)
    assert [schedule.at(step) for step in (0, 10, 20)] == pytest.approx([0.8, 0.2, 0.5])


@given(
    values=VALUES, steps=st.integers(50, 500), cuts=st.lists(st.integers(1, 49), min_size=4, max_size=4, unique=True)
)
def test_steps_hold_each_value_from_its_start_on(values: list[float], steps: int, cuts: list[int]) -> None:
    starts = [0.0, *sorted(cut / 50 for cut in cuts)[: len(values) - 1]]
    schedule = scheduled("steps", values, steps, starts)
    for number, value in enumerate(values):
        first = round(starts[number] * steps)
        after = round(starts[number + 1] * steps) if number + 1 < len(values) else steps
        assert {schedule.at(step) for step in range(first, after)} == {value}


@given(weight=LAMBDA, num_pretrain=COUNT, num_finetune=COUNT, shape=SHAPES)
def test_constants_and_schedules_realise_what_is_asked(
    weight: float, num_pretrain: int, num_finetune: int, shape: str
) -> None:
    chosen: list[MixWeight] = [Constant(weight), scheduled(shape, [weight, 1 - weight], 9)]
    for mix_weight in chosen:
        for step in (0, 4, 8):
            asked, weights = mix_weight.at(step), mix_weight.weights(step, num_pretrain, num_finetune)
            assert asked is not None
            assert weights == (asked / num_pretrain, (1 - asked) / num_finetune)
            assert realised(weights, num_pretrain, num_finetune) == pytest.approx(asked, abs=1e-12)


@given(num_pretrain=st.integers(0, 9999), num_finetune=st.integers(0, 9999))
def test_pooling_gives_each_stream_its_share_of_the_tokens(num_pretrain: int, num_finetune: int) -> None:
    assume(num_pretrain + num_finetune)
    weights = Pooled().weights(3, num_pretrain, num_finetune)
    pooled: MixWeight = Pooled()
    assert pooled.at(3) is None
    wanted = num_pretrain / (num_pretrain + num_finetune)
    assert realised(weights, num_pretrain, num_finetune) == pytest.approx(wanted, abs=1e-12)


STEPS = 40
OPTIONS = st.builds(
    lambda bounds, **others: Budget(min_lambda=bounds[0], start_lambda=bounds[1], max_lambda=bounds[2], **others),
    bounds=st.lists(st.floats(0.001, 0.999), min_size=3, max_size=3).map(sorted),
    aim=st.floats(0.1, 1),
    gain=st.floats(0.01, 50),
    response=st.floats(0, 3),
    slack=st.floats(0, 2),
    smoothing=st.floats(1, 100),
)
MEASURED = st.lists(st.tuples(st.floats(-5, 20), st.integers(1, 500), st.floats(0, 1)), max_size=60)
"""Forgetting in nats per token, the tokens that it was measured on, and the learning rate as a share of the peak."""


def course(controller: BudgetController, measured: list[tuple[float, int, float]], first: int = 0) -> list[float]:
    """λ at the start and after each measurement; one is made after every step."""
    found = [controller.at(first)]
    for done, (forgetting, tokens, rate) in enumerate(measured, first + 1):
        controller.observe(forgetting * tokens, tokens, done, rate)
        found.append(controller.at(done))
    return found


@given(budget=st.floats(0, 2), options=OPTIONS, measured=MEASURED, steps=st.integers(1, 500))
def test_the_controller_is_deterministic_and_within_its_bounds(
    budget: float, options: Budget, measured: list[tuple[float, int, float]], steps: int
) -> None:
    one = course(BudgetController(budget, options, steps), measured)
    assert one == course(BudgetController(budget, options, steps), measured)
    assert one[0] <= options.start_lambda + 1e-9
    smallest = max(options.min_lambda, BudgetController.SMALLEST)
    assert all(value == 0 or smallest - 1e-9 <= value <= options.max_lambda + 1e-9 for value in one)
    odds = [math.log(value / (1 - value)) for value in one if value]
    rise = 2 * options.gain / steps + 3 * options.response
    lowest, top = (math.log(value / (1 - value)) for value in (options.min_lambda, options.max_lambda))
    assert all(after - before <= rise + top - lowest + 1e-6 for before, after in pairwise(odds))


@given(budget=st.floats(0.03, 2), above=st.floats(0.01, 5), rate=st.floats(0, 1), count=st.integers(1, 30))
def test_too_much_forgetting_raises_lambda_and_too_little_lowers_it(
    budget: float, above: float, rate: float, count: int
) -> None:
    options = Budget()
    held = options.aim * budget * (1 + options.slack * rate)  # more is allowed while the learning rate is high

    def after(forgetting: float) -> list[float]:
        return course(BudgetController(budget, options, 100), [(forgetting, 100, rate)] * count)[1:]

    rising, falling, still = after(held + above), after(held - above), after(held)
    assert all(high > low or high == pytest.approx(options.max_lambda) for low, high in pairwise(rising))
    assert all(low < high or low == 0 for high, low in pairwise(falling))
    assert rising[0] > options.start_lambda > falling[0]
    assert still == pytest.approx([options.start_lambda] * count)


@given(budget=st.floats(0, 2), options=OPTIONS, measured=MEASURED, data=st.data())
def test_going_on_from_a_saved_state_changes_nothing(
    budget: float, options: Budget, measured: list[tuple[float, int, float]], data: st.DataObject
) -> None:
    at = data.draw(st.integers(0, len(measured)))
    first, whole, resumed = (BudgetController(budget, options, 60) for _ in range(3))
    course(first, measured[:at])
    resumed.restore(json.loads(json.dumps(first.state())))
    assert course(resumed, measured[at:], at) == course(whole, measured)[at:]
    assert resumed == whole


def test_what_is_smoothed_is_a_mean_weighted_by_age_and_by_tokens() -> None:
    controller = BudgetController(0.1, Budget(smoothing=4), 10)
    measured = [(0.3, 10, 0.0), (0.1, 30, 0.0), (0.5, 20, 0.0)]
    course(controller, measured)
    forgetting, tokens, _ = zip(*measured, strict=True)
    weights = np.array(tokens) * [0.75**2, 0.75, 1]
    assert controller.metrics()["forgetting"] == pytest.approx(np.average(forgetting, weights=weights))


@pytest.mark.parametrize("every", [1, 2, 5])
def test_seldom_measurements_move_lambda_as_far_as_frequent_ones(every: int) -> None:
    options = Budget()
    controller = BudgetController(0.1, options, 100)
    for done in range(every, 21, every):
        controller.observe(50 * 0.1, 50, done, 0.0)
    violation = 1 / options.aim - 1
    moved = math.log(controller.at(20) / (1 - controller.at(20))) - math.log(
        options.start_lambda / (1 - options.start_lambda)
    )
    assert moved == pytest.approx(violation * (options.gain * 0.2 + options.response))


def plant(
    controller: BudgetController, steps: int, alone: float, noise: float = 0.0, seed: int = 0
) -> tuple[list[float], list[float]]:
    """Forgetting that follows λ slowly, as a model's weights do, under a learning rate that falls as a cosine.

    Args:
        alone: what fine-tuning alone forgets.

    Returns:
        Forgetting and λ at each step.
    """
    draw = np.random.default_rng(seed)
    forgetting, found, asked = 0.0, [], []
    for step in range(steps):
        rate = (1 + math.cos(math.pi * step / steps)) / 2
        asked.append(controller.at(step))
        forgetting += 12 / steps * rate * (alone * math.exp(-8 * math.sqrt(asked[-1])) - forgetting)
        found.append(forgetting)
        if (step + 1) % max(1, steps // 40) == 0:
            controller.observe(50 * (forgetting + noise * draw.standard_normal()), 50, step + 1, rate)
    return found, asked


@settings(max_examples=60, deadline=None)
@given(
    budget=st.floats(0.03, 0.25), alone=st.floats(1.5, 8), seed=st.integers(0, 99), noise=st.sampled_from([0.0, 0.15]),
    start=st.floats(0.05, 0.3), steps=st.sampled_from([100, 1000]),
)  # fmt: skip
def test_in_a_closed_loop_forgetting_ends_within_the_budget_and_uses_it(
    budget: float, alone: float, seed: int, noise: float, start: float, steps: int
) -> None:
    controller = BudgetController(budget, Budget(start_lambda=start), steps)
    found, _ = plant(controller, steps, alone * budget, noise * budget, seed)
    assert 0.6 * budget <= found[-1] <= 1.1 * budget


@given(budget=st.floats(0.03, 0.25), steps=st.sampled_from([100, 1000]))
def test_where_little_is_forgotten_lambda_is_0(budget: float, steps: int) -> None:
    _, asked = plant(BudgetController(budget, Budget(), steps), steps, 0.3 * budget)
    assert max(asked) == 0, "Adam would move what only the text moves, at any λ above it"


@pytest.mark.parametrize(("budget", "end"), [(5.0, "min_lambda"), (0.0, "max_lambda")])
def test_a_budget_out_of_reach_ends_at_a_bound_and_comes_back_at_once(budget: float, end: str) -> None:
    options = Budget(gain=50, min_lambda=BudgetController.SMALLEST)
    controller = BudgetController(budget, options, 300)
    for step in range(300):
        controller.observe(50 * 0.3 * (1 - controller.at(step)) ** 2 + 1, 50, step + 1, 0.0)
    at_the_end = controller.at(300)
    assert at_the_end == pytest.approx(getattr(options, end))
    for step in range(300, 320):  # nothing has wound up: it turns round as soon as the average has turned
        controller.observe(500.0 if end == "min_lambda" else -500.0, 50, step + 1, 0.0)
    assert abs(controller.at(320) - at_the_end) > 0.1 * at_the_end
