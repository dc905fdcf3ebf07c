"""The table of task kinds: every stage can handle every kind, and reading the table loads nothing heavy."""

from __future__ import annotations

import subprocess
import sys
from typing import Any, get_args

import pytest
import transformers

from mixtune.components.compare import targets
from mixtune.components.evaluate import examples, scores
from mixtune.components.prepare import encoding, target_checks
from mixtune.components.prepare.config import FinetuneData
from mixtune.components.shared.model import heads
from mixtune.components.shared.task_kinds import TASK_KINDS, Metric, Target, Task, TaskKind

KINDS = pytest.mark.parametrize("row", TASK_KINDS.values(), ids=TASK_KINDS)


def test_every_kind_has_its_row() -> None:
    assert tuple(TASK_KINDS) == get_args(Task)
    assert {row.target for row in TASK_KINDS.values()} == set(get_args(Target))
    assert {metric for row in TASK_KINDS.values() for metric in row.metrics} == set(get_args(Metric))


@pytest.mark.parametrize(
    "table", [encoding._MAKERS, target_checks._CHECKS, scores._SCORES, targets._SHOWN], ids=["make", "check", "score", "show"]
)  # fmt: skip
def test_every_stage_knows_every_target(table: dict[str, Any]) -> None:
    assert set(table) == set(get_args(Target))


def test_every_target_of_a_head_has_a_loss_and_predictions() -> None:
    of_heads = {row.target for row in TASK_KINDS.values() if row.head}
    assert set(heads._LOSSES) == set(examples._FROM_HEAD) == of_heads
    assert set(heads._CLASSES) == {row.head for row in TASK_KINDS.values() if row.head}


@KINDS
def test_columns_are_options_and_the_class_exists(row: TaskKind) -> None:
    assert set(row.columns.values()) <= set(FinetuneData.model_fields)
    assert set(row.inputs) < set(row.columns)
    assert hasattr(transformers, row.auto_class)
    assert set(row.metrics).isdisjoint(row.further_metrics)


@KINDS
def test_a_kind_has_a_problem_type_exactly_if_its_head_reads_one_state(row: TaskKind) -> None:
    assert (row.problem_type is not None) == (row.head == "sequence")


def test_the_table_loads_nothing_heavy() -> None:
    code = (
        "import sys, mixtune.components.shared.task_kinds; print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
