"""What the command says at the end of a run, whether here or on a cluster."""

from __future__ import annotations

from typing import Any

from mixtune.pipelines.cluster.results import summary
from mixtune.pipelines.ended import Ended


def test_the_two_most_important_sentences_of_advice_are_said() -> None:
    report: dict[str, Any] = {
        "advice": ["one", "two", "three"],
        "warnings": [],
        "candidates": [],
        "selected": "mixed-0.3",
    }
    report |= {"task": {"metric": "accuracy"}, "gate": {"passed": True, "reasons": []}}
    ended = Ended("run", "SUCCEEDED", "done", "the gate is passed", report=report)
    assert ended.advice == ["next: one", "next: two"]
    assert "- next: two\n" in summary(ended)
    assert Ended("run", "FAILED", "failed", "a step failed").advice == []
    assert Ended("run", "SUCCEEDED", "done", "of an earlier version", report={}).advice == []
