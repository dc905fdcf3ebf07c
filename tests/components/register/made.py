"""A report as `compare` writes it, as far as `register` reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mixtune.components.shared.artifacts import write_json
from mixtune.components.shared.config import Task

VALUE = {"value": 0.9, "low": 0.8, "high": 1.0}


def write_report(folder: Path, kind: str, task: Task, labels: list[str] | None = None) -> dict[str, Any]:
    """Writes a comparison in which a candidate of this kind is selected; the report."""
    row = {
        "id": kind, "kind": kind, "lambda": 0.0, "base": "scratch", "params": {"alpha": 0.5}, "delta_bpb": VALUE, "bpb": VALUE,
        "task_score": VALUE, "task_score_vs_finetuned": VALUE, "tokens": {"pretrain": 1000, "finetune": 2000}, "steps": 3,
        "seconds": 4.0, "device": "cpu", "precision": "float32", "data": {"finetune": "f" * 64},
    }  # fmt: skip
    report = {
        "headline": f"{kind}: as good as it gets", "selected": kind, "interval": 0.95, "candidates": [row],
        "gate": {"passed": True, "reasons": ["it is good | and cheap"]},
        "task": {"kind": task, "metric": "accuracy", "examples": 10, "labels": labels},
        "forgetting": {"unit": "bits per byte", "documents": 20},
        "data": {stream: {"digest": stream[0] * 64, "source": f"{stream}.jsonl"} for stream in ("pretrain", "finetune")},
    }  # fmt: skip
    write_json(folder / "report.json", report)
    for name in ("report.html", "report.md"):
        (folder / name).write_text("a report")
    return report
