"""Numbers that a regression head would learn slowly are named when the data is prepared."""

from __future__ import annotations

from pathlib import Path

import pytest

from mixtune.components.prepare.scale import scale_warning
from mixtune.components.shared.running.context import Context
from tests.conftest import sentences

from . import prepared
from .prepared import jsonl, prepare_finetune, prepare_pretrain


def test_numbers_far_from_unit_scale_are_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Loud(Context):
        """A context that prints."""

        @classmethod
        def for_tests(cls) -> Context:
            return Context(title="prepare finetune", tracker=Context.for_tests().tracker)

    monkeypatch.setattr(prepared, "Context", Loud)
    text = prepare_pretrain(tmp_path / "text", jsonl(tmp_path / "pt.jsonl", [{"text": one} for one in sentences(60)]))
    for name, scale in (("near", 1.0), ("far", 1000.0)):
        rows = [{"text": one, "label": scale + n % 7} for n, one in enumerate(sentences(60, seed=3))]
        capsys.readouterr()
        made = prepare_finetune(tmp_path / name, jsonl(tmp_path / f"{name}.jsonl", rows), text, task="regression")
        printed = capsys.readouterr().out
        assert ("warning: the numbers in the column label have the mean 1,003 and the" in printed) == (name == "far")
        assert made.manifest.notes["target_std"]["train"] == pytest.approx(2, abs=0.3)


@pytest.mark.parametrize(
    ("mean", "spread", "warned"), [(0, 1, False), (5, 3, False), (0.5, 0.01, True), (0, 400, True), (-20, 1, True)]
)
def test_the_limits(mean: float, spread: float, warned: bool) -> None:
    notes = {"target_mean": {"train": mean}, "target_std": {"train": spread}}
    assert (scale_warning(notes, "score") is not None) == warned
    assert scale_warning({}, "score") is None
