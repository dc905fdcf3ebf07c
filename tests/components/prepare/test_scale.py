"""Numbers that a regression head would learn slowly are counted when the data is prepared, and so named wherever losses are."""

from __future__ import annotations

from pathlib import Path

import pytest

from mixtune.components.prepare.target_checks import is_far
from mixtune.components.shared.data.tallies import warnings
from tests.conftest import sentences

from .prepared import jsonl, prepare_finetune, prepare_pretrain


def test_numbers_far_from_unit_scale_are_warned_of(tmp_path: Path) -> None:
    text = prepare_pretrain(tmp_path / "text", jsonl(tmp_path / "pt.jsonl", [{"text": one} for one in sentences(60)]))
    for name, scale in (("near", 1.0), ("far", 1000.0)):
        rows = [{"text": one, "label": scale + n % 7} for n, one in enumerate(sentences(60, seed=3))]
        made = prepare_finetune(tmp_path / name, jsonl(tmp_path / f"{name}.jsonl", rows), text, task="regression")
        found = [line for line in warnings(made.manifest.tallies, "finetune") if "scale" in line]
        assert made.manifest.notes["target_std"]["train"] == pytest.approx(2, abs=0.3)
        assert bool(found) == (name == "far")
    (line,) = found
    count = made.manifest.splits["train"].documents
    assert line.startswith(
        f"data.finetune: {count} of {count} examples (100 %) have a number on a scale that a head learns"
    )
    assert "(mean 1,003, standard deviation " in line
    assert "write (number - mean) / standard deviation into the column" in line


@pytest.mark.parametrize(
    ("mean", "spread", "warned"), [(0, 1, False), (5, 3, False), (0.5, 0.01, True), (0, 400, True), (-20, 1, True)]
)
def test_the_limits(mean: float, spread: float, warned: bool) -> None:
    assert is_far(mean, spread) == warned
