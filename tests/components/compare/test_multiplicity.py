"""The correction for choosing among many candidates, and the number of examples that a margin needs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mixtune.components.compare.multiplicity import corrected, power, selection_note
from mixtune.components.compare.selection import Measured
from mixtune.components.compare.statistics import Bootstrap, Value

from .made import FINETUNED, INTERPOLATED, MIXED, STRONGER, Made, compare, write_all

DRAW = Bootstrap(seed=0, resamples=500, coverage=0.95)


def measured(name: str, kind: str = "mixed", score: float = 0.6, seed: int = 1) -> Measured:
    answers = np.random.default_rng(seed).choice([-1.0, 0.0, 1.0], 400, p=[0.1, 0.8, 0.1])
    difference = DRAW.mean(answers) if kind != "finetuned" else Value(0.0, 0.0, 0.0)
    return Measured(name, kind, Value(score, 0, 1), difference, Value(0, 0, 0), examples=400)


def width(one: Measured) -> float:
    assert one.task_score_vs_finetuned is not None
    return one.task_score_vs_finetuned.high - one.task_score_vs_finetuned.low


def test_only_what_can_be_selected_is_corrected() -> None:
    candidates = [
        measured("finetuned", "finetuned"), measured("a"), measured("b", seed=2), measured("base", "base", seed=3),
        replace(measured("a-seed-1", seed=4), replicate=True),
    ]  # fmt: skip
    found = corrected(candidates, 0.95)
    assert [one.id for one in found] == [one.id for one in candidates]
    wider = {one.id for one, before in zip(found, candidates, strict=True) if width(one) > width(before)}
    assert wider == {"a", "b"}
    alone = corrected([candidates[0], candidates[1]], 0.95)
    assert width(alone[1]) == width(candidates[1])


def test_power_is_that_of_the_selected_candidate() -> None:
    candidates = [measured("finetuned", "finetuned"), measured("a"), measured("b", score=0.7, seed=2)]
    found = power(candidates, "a", 0.02)
    assert found is not None
    assert (found.candidate, found.examples) == ("a", 400)
    # One candidate in five disagrees: the formula for a normal difference, with z of 95 % on both sides and of 80 % on one.
    assert found.needed == pytest.approx(0.2 * ((1.960 + 0.842) / 0.02) ** 2, rel=0.1)
    assert found.chance == pytest.approx(0.146, abs=0.03)
    assert found.sentence == (
        f"A margin of 0.02 (gate.max_score_drop) needs about {found.needed:,} labelled examples on dev, so that a candidate as "
        "good as fine-tuning alone meets it with a chance of 80% (estimated from how a and fine-tuning alone disagree); there "
        f"are 400: too few, the chance is about {found.chance:.0%}"
    )
    best = power(candidates, "finetuned", 0.3)
    assert best is not None
    assert best.candidate == "b"
    assert best.sentence.endswith("there are 400: enough")
    assert power(candidates, "a", 0.0) is None
    assert power(candidates[:1], "finetuned", 0.02) is None


def test_the_chance_is_how_often_a_candidate_meets_the_gate() -> None:
    """Drawn over and over: as good as fine-tuning alone, and as many examples as are said to be needed."""
    draw = np.random.default_rng(0)
    needed = round(0.2 * ((1.960 + 0.842) / 0.1) ** 2)
    met, chances = 0, []
    for _ in range(300):
        answers = draw.choice([-1.0, 0.0, 1.0], needed, p=[0.1, 0.8, 0.1])
        one = replace(measured("a"), task_score_vs_finetuned=DRAW.mean(answers), examples=needed)
        found = power([measured("finetuned", "finetuned"), one], "a", 0.1)
        assert found is not None
        assert one.task_score_vs_finetuned is not None
        met += one.task_score_vs_finetuned.low > -0.1
        chances.append(found.chance)
    assert met / 300 == pytest.approx(0.8, abs=0.06)
    assert np.mean(chances) == pytest.approx(0.8, abs=0.03)


def test_the_report_tells_the_correction_and_the_power(tmp_path: Path) -> None:
    many = write_all(
        tmp_path / "many", MIXED, STRONGER, Made("mixed-0.4", "mixed", 0.3, 0.645, 0.4), alphas=(INTERPOLATED,)
    )
    few = write_all(tmp_path / "few", MIXED, finetuned=FINETUNED)
    found = {name: compare(tmp_path / name, given) for name, given in (("many", many), ("few", few))}
    gates = {name: done.report["gate"] for name, done in found.items()}
    assert gates["many"]["selection"] == selection_note(5, "accuracy")
    assert "One of 2 candidates" in gates["few"]["selection"]
    text = (found["many"].folder / "report.md").read_text(encoding="utf-8")
    page = (found["many"].folder / "report.html").read_text(encoding="utf-8")
    for sentence in (gates["many"]["selection"], gates["many"]["power"]["sentence"]):
        assert sentence in text
        assert sentence.replace("'", "&#39;") in page
    sentences = {
        name: next(item["sentence"] for item in gate["checks"]["mixed-0.3"] if item["name"] == "max_score_drop")
        for name, gate in gates.items()
    }
    assert sentences["many"] != sentences["few"]  # the interval is wider among more candidates
    assert found["many"].row("mixed-0.3")["dev"] == found["few"].row("mixed-0.3")["dev"] | {
        "pareto": found["many"].row("mixed-0.3")["dev"]["pareto"]
    }


def test_groups_of_the_data_widen_the_intervals(tmp_path: Path) -> None:
    alone = compare(tmp_path / "alone", write_all(tmp_path / "alone", MIXED))
    groups = compare(tmp_path / "groups", write_all(tmp_path / "groups", MIXED, group=lambda i: f"author {i % 12}"))
    assert (alone.report["task"]["groups"], alone.report["forgetting"]["groups"]) == (None, None)
    assert (groups.report["task"]["groups"], groups.report["forgetting"]["groups"]) == (12, 12)
    assert (
        "300 labelled examples in 12 groups, which are resampled as a whole"
        in (groups.folder / "report.md").read_text()
    )
    for name in ("task_score", "task_score_vs_finetuned", "delta_bpb"):
        one, other = (done.row("mixed-0.3")[name] for done in (alone, groups))
        assert one["value"] == pytest.approx(other["value"])
        assert (one["low"], one["high"]) != (other["low"], other["high"])
