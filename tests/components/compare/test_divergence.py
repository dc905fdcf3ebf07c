"""The divergence from the pretrained model in the report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from .made import FINETUNED, INTERPOLATED, MIXED, STRONGER, compare, write_all


def test_the_divergence_is_drawn_and_ranked_against_forgetting(tmp_path: Path) -> None:
    # Forgetting is 2.0, 0.4, 0.2 and, for the interpolated candidate, 0.2: only the last two are out of order.
    mixed = replace(MIXED, divergence=0.3), replace(STRONGER, forgets=0.1, divergence=0.2)
    interpolated = replace(INTERPOLATED, divergence=0.1)
    made = write_all(tmp_path, *mixed, finetuned=replace(FINETUNED, divergence=0.5), alphas=(interpolated,))
    done = compare(tmp_path, made)
    assert done.row("pretrained")["kl_from_pretrained"] is None
    value = done.row("mixed-0.3")["kl_from_pretrained"]
    assert value == pytest.approx({"value": 0.3, "low": 0.3, "high": 0.3})
    found = done.report["divergence"]
    assert found["rank_correlation"] == pytest.approx(0.8)  # 1 - 6 · 2 / (4 · 15)
    assert (found["candidates"], found["examples"], found["tokens"]) == (4, 5, 60)
    page = (done.folder / "report.html").read_text(encoding="utf-8")
    assert "Divergence from the pretrained model, and forgetting" in page
    assert 'aria-labelledby="divergence-title' in page
    text = (done.folder / "report.md").read_text(encoding="utf-8")
    assert "| mixed-0.3 | 0.300 [0.300, 0.300] |" in text
    assert "forgetting is +0.80." in text


def test_evaluations_without_it_have_a_report_without_it(tmp_path: Path) -> None:
    done = compare(tmp_path, write_all(tmp_path, MIXED))
    assert done.report["divergence"] is None
    assert "Divergence" not in (done.folder / "report.html").read_text(encoding="utf-8")
    few = compare(tmp_path / "few", write_all(tmp_path / "few", replace(MIXED, divergence=0.3)))
    assert few.report["divergence"]["rank_correlation"] is None
