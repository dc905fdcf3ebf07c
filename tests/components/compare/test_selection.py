"""The gate, the choice and the front, case by case."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixtune.components.compare.config import Gate
from mixtune.components.compare.selection import Decision, Measured, decide, examples_needed, pareto, share_limit
from mixtune.components.compare.statistics import Value

PRETRAINED = Measured("pretrained", "pretrained", None, None, Value(0, 0, 0))


def around(value: float, half: float = 0.01) -> Value:
    return Value(value, value - half, value + half)


def finetuned(score: float = 0.6, forgets: float = 1.0, half: float = 0.01) -> Measured:
    return Measured("finetuned", "finetuned", around(score), Value(0, 0, 0), around(forgets, half))


def mixed(name: str, score: float, forgets: float, half: float = 0.01) -> Measured:
    return Measured(name, "mixed", around(score), around(score - 0.6, half), around(forgets))


def choose(*candidates: Measured, half: float = 0.01, **gate: object) -> Decision:
    """Decides among candidates whose scores differ by less than `half` if they cannot be told apart."""
    scores = {one.id: one.task_score.value for one in candidates if one.task_score is not None}
    return decide(
        [PRETRAINED, *candidates],
        Gate.model_validate(gate),
        "accuracy",
        lambda one, other: around(scores[one] - scores[other], half),
        "the most frequent label",
    )


def test_least_forgetting_among_those_that_meet_the_gate() -> None:
    found = choose(
        finetuned(), mixed("a", 0.65, 0.4), mixed("b", 0.6, 0.2), mixed("c", 0.5, 0.1), rule="least_forgetting"
    )
    assert (found.selected, found.passed) == ("b", True)
    assert [item.passed for item in found.checks["c"]] == [False, True]
    assert [item.passed for item in found.checks["finetuned"]] == [True, False]
    assert found.why == "of the 2 candidates (out of 4) that meet the gate, it forgets least"


def test_best_task_score_among_those_that_meet_the_gate() -> None:
    candidates = [finetuned(), mixed("a", 0.65, 0.4), mixed("b", 0.6, 0.2), mixed("c", 0.9, 0.6)]
    assert choose(*candidates, rule="best_task_score").selected == "a"


def test_of_scores_that_cannot_be_told_apart_the_one_that_forgets_least_is_taken() -> None:
    candidates = [finetuned(), mixed("a", 0.597, 0.154), mixed("b", 0.596, -0.063), mixed("c", 0.591, -0.2)]
    found = choose(*candidates, half=0.004)
    assert found.selected == "b"
    assert found.why == (
        "of the 3 candidates (out of 4) that meet the gate, 2 are not measurably below the best in accuracy; of these "
        "it forgets least"
    )
    assert choose(*candidates, half=0.0005).why.endswith(
        "it has the best accuracy, measurably above that of the others"
    )
    assert choose(*candidates, rule="best_task_score").selected == "a"


def against_trivial(one: Measured, value: float, half: float = 0.05) -> Measured:
    return replace(one, task_score_vs_trivial=around(value, half))


def test_a_score_no_better_than_the_trivial_one_is_nothing_learned() -> None:
    found = choose(against_trivial(finetuned(), 0.04), against_trivial(mixed("a", 0.65, 0.1), 0.09))
    assert not found.passed
    (sentence,) = [item.sentence for item in found.checks["a"] if item.name == "beat_trivial"]
    assert sentence == (
        "nothing was learned: the accuracy of fine-tuning alone against the most frequent label is +0.040 [-0.010, +0.090]; "
        "the lower end is not above 0"
    )
    learned = choose(against_trivial(finetuned(), 0.06), against_trivial(mixed("a", 0.65, 0.1), 0.11))
    assert (learned.selected, learned.passed) == ("a", True)
    found = choose(against_trivial(finetuned(), 0.06), against_trivial(mixed("a", 0.65, 0.1), 0.04))
    assert [item.passed for item in found.checks["a"]] == [True, False, True]
    assert choose(
        against_trivial(finetuned(), 0.0), against_trivial(mixed("a", 0.65, 0.1), 0.0), beat_trivial=False
    ).passed


@pytest.mark.parametrize(
    ("drop", "half", "needed"),
    [
        (-0.004, 0.054, 2800),
        (0.0, 0.054, 1800),
        (0.01, 0.04, 430),
        (-0.02, 0.01, None),
        (-0.03, 0.001, None),
        (0.0, 0.01, None),
    ],
)
def test_too_few_examples_are_said_to_be_too_few(drop: float, half: float, needed: int | None) -> None:
    one = replace(mixed("a", 0.6 + drop, 0.1, half), examples=240)
    (check,) = [item for item in choose(finetuned(), one).checks["a"] if item.name == "max_score_drop"]
    assert examples_needed(around(drop, half), 0.02, 240) == needed
    told = f"; 240 examples are too few to tell, about {needed:,} are needed" if needed else ""
    assert check.sentence.endswith(f"above -0.02{told}")


def test_ties_go_to_the_other_quantity_and_then_to_the_first() -> None:
    least = "least_forgetting"
    assert choose(finetuned(), mixed("a", 0.6, 0.2), mixed("b", 0.65, 0.2), rule=least).selected == "b"
    assert choose(finetuned(), mixed("a", 0.65, 0.2), mixed("b", 0.65, 0.2), rule=least).selected == "a"
    tied = [finetuned(), mixed("a", 0.65, 0.3), mixed("b", 0.65, 0.2)]
    assert choose(*tied, rule="best_task_score").selected == "b"


def test_a_single_mixed_candidate() -> None:
    found = choose(finetuned(), mixed("a", 0.65, 0.4))
    assert (found.selected, found.why) == ("a", "it is the only one of 2 candidates that meets the gate")


def test_finetuned_meets_a_gate_that_accepts_its_forgetting() -> None:
    found = choose(finetuned(), mixed("a", 0.5, 0.1), max_forgetting_share=None)
    assert (found.selected, found.passed) == ("finetuned", True)


@pytest.mark.parametrize(
    ("low", "passes"), [(-0.0199, True), (-0.02, False), (-0.0201, False)], ids=["above", "at the limit", "below"]
)
def test_the_lower_end_decides_on_the_score(low: float, passes: bool) -> None:
    one = Measured("a", "mixed", around(0.6), Value(0.0, low, 0.05), around(0.1))
    assert choose(finetuned(), one).passed is passes


def test_where_no_drop_is_accepted_the_same_predictions_pass() -> None:
    same = Measured("a", "mixed", around(0.6), Value(0.0, 0.0, 0.0), around(0.1))
    better_or_not = Measured("b", "mixed", around(0.61), Value(0.01, 0.0, 0.02), around(0.05))
    found = choose(finetuned(), better_or_not, same, max_score_drop=0.0)
    assert (found.selected, found.passed) == ("a", True)
    assert not found.checks["b"][0].passed


def test_every_condition_that_fails_is_told_with_its_numbers() -> None:
    found = choose(finetuned(), mixed("a", 0.5, 0.6), min_task_score=0.55, max_forgetting=0.3, max_forgetting_share=0.5)
    told = [item.sentence for item in found.checks["a"]]
    assert told == [
        "its accuracy against fine-tuning alone is -0.100 [-0.110, -0.090]; the lower end is not above -0.02",
        "its accuracy is 0.500; at least 0.55 is asked for",
        "it forgets 0.600 bits per byte; at most 0.3 is accepted",
        "it forgets 60 % of what fine-tuning alone does (0.600 of 1.000 bits per byte); at most 50 % is accepted",
    ]
    assert not any(item.passed for item in found.checks["a"])


def test_limits_themselves_are_accepted() -> None:
    found = choose(finetuned(), mixed("a", 0.6, 0.5), min_task_score=0.6, max_forgetting=0.5, max_forgetting_share=0.5)
    assert (found.selected, found.passed) == ("a", True)


def test_outside_the_gate_the_nearest_is_named_with_what_it_misses() -> None:
    found = choose(finetuned(), mixed("near", 0.58, 0.1), mixed("far", 0.3, 0.05), max_score_drop=0.02)
    assert (found.selected, found.passed) == ("near", False)
    assert found.reasons == [
        "near: its accuracy against fine-tuning alone is -0.020 [-0.030, -0.010]; the lower end is not above -0.02"
    ]
    assert "none of the 3 candidates meets the gate" in found.why


def test_all_equally_far_outside_the_gate() -> None:
    found = choose(finetuned(), mixed("a", 0.6, 1.0), mixed("b", 0.6, 1.0))
    assert (found.selected, found.passed) == ("finetuned", False)


def test_a_mixed_model_without_a_trained_head_never_passes() -> None:
    headless = Measured("mixed-1", "mixed", None, None, around(0.0))
    found = choose(finetuned(), headless, min_task_score=0.1, max_forgetting_share=None)
    assert found.selected == "finetuned"
    assert [item.passed for item in found.checks["mixed-1"]] == [False, False]


def test_pretrained_is_never_selected() -> None:
    generator = Measured("pretrained", "pretrained", around(0.9), around(0.3), Value(0, 0, 0))
    found = choose(generator, finetuned())
    assert found.selected == "finetuned"
    assert set(found.checks) == {"finetuned"}


@pytest.mark.parametrize(
    ("value", "limit"),
    [
        (Value(1.0, 0.9, 1.1), 0.5),
        (Value(0.01, -0.01, 0.03), 0.03),
        (Value(-0.02, -0.04, 0.01), 0.01),
        (Value(-0.2, -0.3, -0.1), 0.0),
    ],
    ids=["forgets", "cannot be told", "less than nothing, perhaps", "improves"],
)
def test_a_share_of_no_forgetting(value: Value, limit: float) -> None:
    assert share_limit(value, 0.5) == limit


def test_finetuning_that_does_not_forget_meets_its_own_share() -> None:
    found = choose(finetuned(forgets=-0.001, half=0.02), mixed("a", 0.6, 0.015), mixed("b", 0.6, 0.03))
    assert found.passed
    assert [item.passed for item in found.checks["finetuned"]] == [True, True]
    assert [item.passed for item in found.checks["a"]] == [True, True]
    assert [item.passed for item in found.checks["b"]] == [True, False]
    assert "does not measurably forget" in found.checks["b"][1].sentence


def test_a_candidate_that_improves_forgets_nothing() -> None:
    found = choose(finetuned(), mixed("a", 0.6, -0.02))
    assert found.reasons[1] == (
        "it forgets nothing (-0.020 bits per byte, fine-tuning alone +1.000); at most 50 % of that is accepted"
    )


def test_the_front() -> None:
    candidates = [PRETRAINED, finetuned(0.6, 1.0), mixed("a", 0.65, 0.4), mixed("b", 0.6, 0.2), mixed("c", 0.6, 0.3)]
    assert pareto(candidates) == {"a", "b"}
    assert pareto([mixed("a", 0.6, 0.2), mixed("b", 0.6, 0.2)]) == {"a", "b"}


POINTS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=8)


@given(points=POINTS)
def test_every_candidate_off_the_front_is_beaten_by_one_on_it(points: list[tuple[int, int]]) -> None:
    candidates = [mixed(str(i), score, forgets) for i, (score, forgets) in enumerate(points)]
    front = pareto(candidates)
    assert front
    for i, (score, forgets) in enumerate(points):
        beaten = any(
            points[int(j)] != (score, forgets) and points[int(j)][0] >= score and points[int(j)][1] <= forgets
            for j in front
        )
        assert beaten == (str(i) not in front)


@given(points=POINTS, rule=st.sampled_from(["least_forgetting", "best_task_score", "least_forgetting_of_best"]))
def test_what_is_selected_is_the_best_that_meets_the_gate(points: list[tuple[int, int]], rule: str) -> None:
    candidates = [mixed(str(i), score / 5, forgets / 5) for i, (score, forgets) in enumerate(points)]
    found = choose(finetuned(), *candidates, rule=rule)
    meeting = [one for one in candidates if all(item.passed for item in found.checks[one.id])]
    assert found.passed == bool(meeting)
    if meeting:
        chosen = next(one for one in meeting if one.id == found.selected)
        if rule == "least_forgetting_of_best":
            best = max(one.task_score.value for one in meeting if one.task_score)
            as_good = [one for one in meeting if one.task_score and one.task_score.value >= best - 0.01]
            assert chosen in as_good
            assert chosen.delta_bpb.value == min(one.delta_bpb.value for one in as_good)
        elif rule == "least_forgetting":
            assert chosen.delta_bpb.value == min(one.delta_bpb.value for one in meeting)
        else:
            assert chosen.task_score is not None
            assert chosen.task_score.value == max(one.task_score.value for one in meeting if one.task_score)


def test_a_lost_capability_fails_the_gate() -> None:
    lost = replace(mixed("a", 0.65, 0.1), capabilities={"copying, accuracy": (-0.1, 0.02), "cloze, acc": (0.05, 0.02)})
    kept = replace(mixed("b", 0.6, 0.2), capabilities={"copying, accuracy": (-0.02, 0.02), "cloze, acc": (0.0, 0.02)})
    unknown = mixed("c", 0.65, 0.05)
    alone = replace(finetuned(), capabilities={"copying, accuracy": (-0.3, 0.02)})
    found = choose(alone, lost, kept, unknown, max_capability_drop=0.05)
    assert found.selected == "b"
    passed = {name: checks[-1].passed for name, checks in found.checks.items()}
    assert passed == {"finetuned": False, "a": False, "b": True, "c": False}
    assert found.checks["a"][-1].miss == pytest.approx(0.05)
    assert found.checks["a"][-1].sentence == (
        "of 2 capabilities it lost most in copying, accuracy: -0.100 ± 0.020 (standard error) against the pretrained model; "
        "a drop of at most 0.05 is accepted"
    )
    assert choose(alone, lost, kept, unknown).selected == "c"
