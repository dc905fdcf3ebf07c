"""The embedded default as `make demo` runs it: what the README says of it is so."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

pytestmark = pytest.mark.slow

Row = dict[str, Any]
MIXED = ("mixed-0.1", "mixed-budget-0.05")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Row]:
    """The candidates by id, of one run of the default."""
    folder = tmp_path_factory.mktemp("demo")
    # On one thread, as all tests: threads that wait for one another on cores that others use are many times slower.
    command = [sys.executable, "-m", "mixtune.pipelines.cli", "run", "--output", str(folder / "run")]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=3000, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((folder / "run" / "report" / "report.json").read_text(encoding="utf-8"))
    return {row["id"]: row for row in report["candidates"]}


def test_fine_tuning_forgets_and_mixing_forgets_less_than_half(rows: dict[str, Row]) -> None:
    forgotten = rows["finetuned"]["delta_bpb"]
    assert forgotten["low"] > 0
    for candidate in MIXED:
        assert rows[candidate]["delta_bpb"]["high"] < 0.5 * forgotten["low"]


def test_mixing_costs_no_accuracy_and_interpolating_does(rows: dict[str, Row]) -> None:
    for candidate in MIXED:
        assert rows[candidate]["task_score_vs_finetuned"]["high"] >= 0
    assert rows["interpolated-0.5"]["task_score_vs_finetuned"]["high"] < 0


def test_the_forgetting_budget_is_kept(rows: dict[str, Row]) -> None:
    found = rows["mixed-budget-0.05"]["forgetting_budget"]
    assert found["budget"] == 0.05
    assert found["kept"], found
