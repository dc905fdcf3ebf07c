"""The comparison for a bare GPU machine, with a tiny model, on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import sentences

from .gpu_evidence import main

pytestmark = pytest.mark.slow


def test_a_whole_comparison_leaves_a_report_and_figures_and_runs_no_step_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIXTUNE_CHECKPOINT_DIR", str(tmp_path / "checkpoints"))
    texts = tmp_path / "texts"
    texts.mkdir()
    lines = [json.dumps({"text": text}) for text in sentences(400)]
    (texts / "text.jsonl").write_text("\n".join(lines), encoding="utf-8")
    rows = [{"text": text, "label": "cat" if "cat" in text else "none"} for text in sentences(120, seed=1)]
    labelled = tmp_path / "labelled.jsonl"
    labelled.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    output = tmp_path / "output"
    arguments = ["--text", str(texts), "--labelled", str(labelled), "--task", "classification", "--output", str(output)]
    main([*arguments, "--tiny"])
    report = json.loads((output / "report.json").read_text())
    assert [one["id"] for one in report["candidates"]] == ["pretrained", "finetuned", "mixed-0.3", "interpolated-0.5"]
    figures = json.loads((output / "figures.json").read_text())
    assert {one["candidate"] for one in figures["trainings"]} == {"pretrained", "finetuned", "mixed-0.3"}
    assert all(one["tokens_per_second"] > 0 for one in figures["trainings"])
    capsys.readouterr()
    main([*arguments, "--tiny"])
    assert "saved after" not in capsys.readouterr().out
