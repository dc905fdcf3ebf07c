"""Candidates of further seeds: their spread is told, and none of them is selected."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from .made import MIXED, Made, compare, write_all


def again(seed: int, forgets: float, right: float) -> Made:
    return Made(f"mixed-0.3-seed-{seed}", "mixed", forgets=forgets, right=right, mix_weight=0.3, seed=seed)


def test_the_spread_over_the_seeds_is_told_and_the_luckiest_is_not_selected(tmp_path: Path) -> None:
    other = Made("mixed-0.5", "mixed", forgets=0.5, right=0.6, mix_weight=0.5)
    made = compare(tmp_path, write_all(tmp_path, MIXED, other, again(1, 0.1, 0.9), again(2, 0.5, 0.7)))
    assert made.report["selected"] == "mixed-0.3"
    assert made.row("mixed-0.3-seed-1")["task_score"]["value"] > made.row("mixed-0.3")["task_score"]["value"]
    (row,) = made.report["seeds"]
    assert (row["id"], row["seeds"]) == ("mixed-0.3", 3)
    for name in ("task_score", "task_score_vs_finetuned", "delta_bpb"):
        values = [made.row(one)[name]["value"] for one in ("mixed-0.3", "mixed-0.3-seed-1", "mixed-0.3-seed-2")]
        assert row[name]["mean"] == pytest.approx(np.mean(values))
        assert row[name]["sd"] == pytest.approx(np.std(values, ddof=1))
    assert "Over several seeds" in (made.folder / "report.html").read_text()
    line = f"| mixed-0.3 | 3 | {row['task_score']['mean']:.3f} ± {row['task_score']['sd']:.3f} |"
    assert line in (made.folder / "report.md").read_text()


def test_further_numbers_are_shown_beside_the_main_one(tmp_path: Path) -> None:
    made = compare(tmp_path, write_all(tmp_path, MIXED, metric="macro_f1"))
    page = (made.folder / "report.html").read_text()
    assert '<th scope="col">accuracy</th>' in page
    assert f"<td>{made.row('mixed-0.3')['accuracy']:.3f}</td>" in page


def test_without_further_seeds_nothing_is_said_of_them(tmp_path: Path) -> None:
    made = compare(tmp_path, write_all(tmp_path, MIXED))
    assert made.report["seeds"] == []
    assert "several seeds" not in (made.folder / "report.html").read_text()
