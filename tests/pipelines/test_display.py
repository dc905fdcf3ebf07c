"""What a local run shows while it runs, and the table of candidates."""

from __future__ import annotations

import io
import json
import re
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mixtune.components.shared.outcome import Outcome
from mixtune.components.shared.running.context import WorkDone
from mixtune.pipelines import display
from mixtune.pipelines.cli.commands import _print_verdict
from mixtune.pipelines.configuration import read_config
from mixtune.pipelines.display import Display, candidates_table, print_candidates, titles_of

TITLES = titles_of(read_config(None, ["mixed.lambdas=[0.3]", "mixed.forgetting_budgets=[0.05]"]))
TRAINING = WorkDone("", 120, 300, "steps", "λ 0.3, loss 3.214 (pretrain 4.110, finetune 2.318)", 1203, 72.4)


class Noted:
    """The files of a run that a display follows."""

    def __init__(self, folder: Path, shown: Display) -> None:
        self.progress, self.outcomes, self.display = folder / "progress.jsonl", folder / "outcomes", shown
        self.outcomes.mkdir()
        self._following = ExitStack()
        self._following.enter_context(shown.following(self.progress, self.outcomes))

    def note(self, title: str, work: WorkDone | None = None, **more: Any) -> None:
        with self.progress.open("a") as file:
            file.write(json.dumps({"title": title, **(asdict(work) if work else {}), **more}) + "\n")
        self.display.refresh()

    def end(self, title: str, **record: Any) -> None:
        Outcome(**{"title": title, "kind": "done", "seconds": 8.2, **record}).save(self.outcomes)
        self.display.refresh()

    def stop(self) -> None:
        self._following.close()


def lines_of(console: Console) -> list[str]:
    """The printed lines without trailing spaces."""
    return [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]


def test_ended_steps_are_counted_and_those_from_the_cache_have_their_candidate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(display, "PLAIN_LINE_SECONDS", 0.0)
    console = Console(file=io.StringIO(), width=80, soft_wrap=True)
    run = Noted(tmp_path, Display(console, TITLES))
    run.note("plan")
    run.end("plan")
    run.note("mixed-0.3", cached=True)
    run.note("mixed-budget-0.05")
    run.note("mixed-budget-0.05", TRAINING)
    run.note("evaluate pretrained")
    run.note("evaluate pretrained", WorkDone("test documents", 3, 12, "batches"))
    run.end("mixed-budget-0.05", kind="failed")
    run.end("compare", facts={"gate": "not met"})
    run.stop()
    assert len(TITLES) == 15
    assert lines_of(console) == [
        "   1/15 plan                       done 8 s",
        "   2/15 mixed-0.3                  from the cache",
        "   3/15 mixed-budget-0.05          120/300 steps, λ 0.3, loss 3.214 (pretrain 4.110, finetune 2.318), 1,203 "
        "tokens/s, 72 s left",
        "   4/15 evaluate pretrained        test documents: 3/12 batches, 0 s left",
        "   3/15 mixed-budget-0.05          failed 8 s",
        "   4/15 compare                    done 8 s",
        "   5/15 register                   skipped, since the gate is not met",
    ]


def test_a_terminal_of_80_columns_shows_a_bar_with_losses_rate_and_time_left(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    run = Noted(tmp_path, Display(console, TITLES))
    run.note("mixed-budget-0.05", TRAINING)
    run.stop()
    shown = [line for line in lines_of(console) if "mixed" in line or "loss" in line]
    bar, losses = shown[-2:]
    assert re.search(r"1/15 mixed-budget-0.05 +━+ +1,203 tokens/s 0:01:12$", bar)
    assert "120/300 steps, λ 0.3, loss 3.214 (pretrain 4.110, finetune 2.318)" in losses
    assert all(len(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line)) <= 80 for line in shown)


@pytest.mark.parametrize("terminal", [False, True])
def test_brackets_in_names_are_shown_as_they_are(tmp_path: Path, terminal: bool) -> None:
    console = Console(file=io.StringIO(), width=200, force_terminal=terminal, color_system=None)
    title = "[/a] :smile: [red]"
    run = Noted(tmp_path, Display(console))
    run.note(title, WorkDone("", 1, 2, "[/b]", "[/c]"))
    run.end(title.replace("/", "|"))
    run.stop()
    budget = {"kept": False, "sentence": "not kept"}
    row = {"id": title, "kind": "mixed", "lambda": 0.3, "forgetting_budget": budget} | dict.fromkeys(
        ("task_score", "task_score_vs_finetuned", "delta_bpb")
    )
    gate = {"passed": False, "reasons": [title]}
    report = {"name": title, "selected": title, "task": {"metric": title}, "candidates": [row], "gate": gate}
    console.print(candidates_table(report))
    _print_verdict(console, report)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert printed.count(title) >= 5
    assert "← nearest" in printed
    assert "forgetting budget: not kept" in printed
    assert "[|a] :smile: [red]" in printed


@pytest.mark.parametrize(("width", "terminal"), [(80, True), (80, False), (140, True)])
def test_each_candidate_is_one_line_of_the_table_at_any_width(width: int, terminal: bool) -> None:
    value = {"value": 0.0791, "low": 0.0701, "high": 0.0881}
    names = ["pretrained", "mixed-budget-0.05", "interpolated-0.5"]
    values = dict.fromkeys(("task_score", "task_score_vs_finetuned", "delta_bpb"), value)
    rows: list[dict[str, Any]] = [{"id": name, "kind": "mixed", "lambda": 0.3, **values} for name in names]
    rows[1] |= {"lambda": None, "forgetting_budget": {"tried": [{"lambda": 0.1}, {"lambda": 0.371}]}}
    report = {
        "name": "r",
        "selected": names[1],
        "task": {"metric": "accuracy"},
        "candidates": rows,
        "gate": {"passed": True},
    }
    file = io.StringIO()
    print_candidates(
        report, Console(file=file, width=width, force_terminal=terminal, color_system=None, soft_wrap=True)
    )
    lines = file.getvalue().splitlines()
    shown = "+0.079 ±0.009" if terminal and width == 80 else "+0.079 [+0.070, +0.088]"
    for name in names:
        (line,) = [line for line in lines if name in line]
        assert line.count(shown) == 2
        assert (" 0.371 " in line) == (name == names[1]), "the λ that was found"
        assert len(line.rstrip()) <= (width if terminal else 120)
    assert any("half the width" in line for line in lines) == (terminal and width == 80)
