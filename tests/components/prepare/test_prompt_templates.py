"""Prompts that are made of several columns."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from mixtune.components.config import load
from mixtune.components.prepare.config import FinetuneData
from mixtune.components.shared.data.problems import Problems
from mixtune.components.shared.data.prompt_templates import PromptTemplate
from mixtune.components.shared.data.sources import check_source, named_sources, read
from mixtune.components.shared.data.tallies import Tallies
from mixtune.components.shared.errors import RefusedError

from .prepared import jsonl

TEMPLATE = "{question}\n\nContext: {the context} {{x}} {question}"
ROWS: list[dict[str, Any]] = [
    {"question": "为什么?", "the context": "weil", "completion": "so"},
    {"question": 3, "the context": "b", "completion": "c"},
]
PROMPTS = ["为什么?\n\nContext: weil {x} 为什么?", "3\n\nContext: b {x} 3"]


def prompts(source: Path, template: str = TEMPLATE) -> tuple[list[str], list[str]]:
    stream = FinetuneData(source=str(source), task="generation", prompt_template=template)
    problems = Problems()
    (named,) = named_sources(stream)
    rows = list(read(str(source), named.reading(stream, problems, Tallies())))
    assert check_source(stream) == problems.sentences()
    return [row.values["prompt"] for row in rows], problems.sentences()


def test_every_format(tmp_path: Path) -> None:
    with (tmp_path / "a.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [*ROWS[0], "other"])
        writer.writeheader()
        writer.writerows(ROWS)
    frame = pd.DataFrame([{name: str(value) for name, value in row.items()} for row in ROWS]).assign(other=1)
    frame.to_parquet(tmp_path / "a.parquet")
    jsonl(tmp_path / "a.jsonl", [dict(row) for row in ROWS])
    for name in ("a.jsonl", "a.csv", "a.parquet"):
        assert prompts(tmp_path / name) == (PROMPTS, [])


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", [*map(dict, ROWS), ROWS[0] | {"question": None}])
    assert prompts(source) == (PROMPTS, [f"{source}, line 3: question is empty"])
    _, (problem,) = prompts(source, "{quest} {question}")
    assert "has no column quest; its columns are question, the context, completion" in problem


def test_a_name_with_a_dot_is_a_field_of_an_object(tmp_path: Path) -> None:
    pairs = [
        {"translation": {"en": "Yes", "de": "Ja"}, "id.x": "1"},
        {"translation": {"en": "No", "de": "Nein"}, "id.x": "2"},
    ]
    pd.DataFrame(pairs).to_parquet(tmp_path / "a.parquet")
    Dataset.from_list(pairs).save_to_disk(tmp_path / "saved")
    for source in (
        jsonl(tmp_path / "a.jsonl", [dict(pair) for pair in pairs]),
        tmp_path / "a.parquet",
        tmp_path / "saved",
    ):
        stream = FinetuneData(
            source=str(source),
            task="generation",
            prompt_template="{id.x} {translation.en}",
            completion_column="translation.de",
        )
        (named,) = named_sources(stream)
        problems = Problems()
        rows = list(read(str(source), named.reading(stream, problems, Tallies())))
        assert [row.values for row in rows] == [
            {"prompt": "1 Yes", "completion": "Ja"},
            {"prompt": "2 No", "completion": "Nein"},
        ]
        assert not problems.sentences()
        assert not check_source(stream)
        (problem,) = check_source(stream.model_copy(update={"completion_column": "translation.fr"}))
        assert "has no column translation.fr" in problem


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("no column", "has no column in braces"),
        ("{a", "has a brace that is not closed"),
        ("{}", "the name of a column, and nothing else"),
        ("{a!r}", "the name of a column, and nothing else"),
        ("{a:>3}", "the name of a column, and nothing else"),
    ],
)
def test_templates_that_cannot_be_filled(template: str, problem: str) -> None:
    data = {
        "pretrain": {"source": "embedded"},
        "finetune": {"source": "x", "task": "generation", "prompt_template": template},
    }
    with pytest.raises(RefusedError, match=f"data.finetune.prompt_template: .*{problem}"):
        load({"model": {"base": "scratch"}, "data": data})


def test_other_tasks_have_no_prompts() -> None:
    data = {"pretrain": {"source": "embedded"}, "finetune": {"source": "x", "prompt_template": "{a}"}}
    with pytest.raises(RefusedError, match="prompt_template is for the task generation"):
        load({"model": {"base": "scratch"}, "data": data})


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip), st.text("{}ab ", max_size=9))
def test_values_are_never_read_as_templates(value: str, around: str) -> None:
    template = PromptTemplate(around.replace("{", "{{").replace("}", "}}") + "{a}", "prompt")
    ((record, _),) = template.filled(iter([({"a": value + "{b}"}, "here")]), Problems())
    assert record["prompt"] == f"{around}{value}{{b}}"
