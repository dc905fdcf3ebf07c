"""Candidates of further seeds: their spread is told, and none of them is selected."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from .made import MIXED, Made, compare, write_all

ALONE = ((1, 1.8, 0.5), (2, 2.2, 0.6))
"""Seed, forgetting and share of right answers of fine-tuning alone."""


def again(seed: int, forgets: float, right: float) -> Made:
    return Made(f"mixed-0.3-seed-{seed}", "mixed", forgets=forgets, right=right, mix_weight=0.3, seed=seed)


def test_the_spread_over_the_seeds_is_told_and_the_luckiest_is_not_selected(tmp_path: Path) -> None:
    other = Made("mixed-0.5", "mixed", forgets=0.5, right=0.6, mix_weight=0.5)
    alone = [Made(f"finetuned-seed-{s}", "mixed", forgets=f, right=r, mix_weight=0.0, seed=s) for s, f, r in ALONE]
    made = compare(tmp_path, write_all(tmp_path, MIXED, other, again(1, 0.1, 0.9), again(2, 0.5, 0.7), *alone))
    assert made.report["selected"] == "mixed-0.3"
    assert made.row("mixed-0.3-seed-1")["task_score"]["value"] > made.row("mixed-0.3")["task_score"]["value"]
    finetuned, row = made.report["seeds"]
    assert (row["id"], row["seeds"], finetuned["id"], finetuned["seeds"]) == ("mixed-0.3", 3, "finetuned", 3)
    assert finetuned["task_score_vs_finetuned"] is None
    values = {}
    for name in ("task_score", "delta_bpb"):
        for of, told in (("mixed-0.3", row), ("finetuned", finetuned)):
            values[of, name] = np.array(
                [made.row(f"{of}{ending}")[name]["value"] for ending in ("", "-seed-1", "-seed-2")]
            )
            assert told[name]["mean"] == pytest.approx(values[of, name].mean())
            assert told[name]["sd"] == pytest.approx(values[of, name].std(ddof=1))
    differences = values["mixed-0.3", "task_score"] - values["finetuned", "task_score"]  # with the same seed
    assert row["task_score_vs_finetuned"]["mean"] == pytest.approx(differences.mean())
    assert row["task_score_vs_finetuned"]["sd"] == pytest.approx(differences.std(ddof=1))
    assert f"over 3 seeds, accuracy {row['task_score']['mean']:.2f} ±" in made.report["headline"]
    assert (
        f"{differences.mean():+.2f} ± {differences.std(ddof=1):.2f} against fine-tuning alone"
        in made.report["headline"]
    )
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
