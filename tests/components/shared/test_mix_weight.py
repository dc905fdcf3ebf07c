"""λ: constants and schedules are functions of the step alone, and realise what is asked."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mixtune.components.shared.config import LambdaSchedule
from mixtune.components.shared.training.mix_weight import (
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
