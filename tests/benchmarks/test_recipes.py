"""The recipes are valid, and their tables say what the reports say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mixtune.pipelines.configuration import read_config
from tests.benchmarks.recipe_data import messages, split
from tests.benchmarks.recipes import CONFIGS, labels_of, over_labels, table
from tests.components.compare.made import FINETUNED, MIXED, compare, write_all


@pytest.mark.parametrize("recipe", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_a_recipe_says_whether_it_has_been_run(recipe: Path) -> None:
    first = recipe.read_text(encoding="utf-8").splitlines()[0]
    assert first.lower().startswith(("# run on ", "# not run"))
    assert f"recipes run {recipe.stem}" in first
    assert read_config(recipe).name == recipe.stem


def test_tables_have_means_over_the_seeds_and_numbers_of_labels(tmp_path: Path) -> None:
    again = replace(MIXED, id="mixed-0.3-seed-1", seed=1, right=0.6)
    alone = replace(FINETUNED, id="finetuned-seed-1", kind="mixed", mix_weight=0.0, seed=1)
    reports = {}
    for number in ("50", "all"):
        finetuned = replace(FINETUNED, divergence=0.5)
        done = compare(tmp_path / number, write_all(tmp_path / number, MIXED, again, alone, finetuned=finetuned))
        reports[number] = done.report
    rows = table(reports["all"]).splitlines()
    assert rows[0].startswith("| candidate | seeds | accuracy |")
    by_name = {row.split(" | ")[0].strip("|* "): row.split(" | ")[1:] for row in rows[2:]}
    assert set(by_name) == {"pretrained", "finetuned", "mixed-0.3"}
    assert by_name["mixed-0.3"][0] == "2"
    mean = next(row for row in reports["all"]["seeds"] if row["id"] == "mixed-0.3")["task_score"]
    assert by_name["mixed-0.3"][1] == f"{mean['mean']:.3f} ± {mean['sd']:.3f}"
    assert by_name["finetuned"][3].startswith("0.500 [")
    lines = over_labels(reports).splitlines()
    assert lines[0] == "| accuracy, by labelled examples | 50 | all |"
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| finetuned", "| mixed-0.3"]
    (tmp_path / "config.yaml").write_text("data: {finetune: {max_documents: 50}}")
    assert labels_of(tmp_path) == "50"
    (tmp_path / "config.yaml").write_text("data: {finetune: {max_documents: null}}")
    assert labels_of(tmp_path) == "all"


def test_messages_are_read_as_gettext_writes_them() -> None:
    blocks = [
        '#, fuzzy\nmsgid ""\nmsgstr "header"',
        '#: a.py\nmsgid "Yes"\nmsgstr "Ja"',
        'msgid ""\n"two "\n"lines"\nmsgstr ""\n"zwei "\n"Zeilen"',
        'msgid "day"\nmsgid_plural "days"\nmsgstr[0] "Tag"',
        'msgid "No"\nmsgstr ""',
    ]
    assert list(messages("\n\n".join(blocks))) == [("Yes", "Ja"), ("two lines", "zwei Zeilen")]


def test_splits_share_no_row(tmp_path: Path) -> None:
    rows = [{"text": str(number % 50)} for number in range(100)]
    split(tmp_path / "made", rows, held_out=10)
    parts = {name: (tmp_path / f"made.{name}.jsonl").read_text().splitlines() for name in ("train", "dev", "test")}
    assert [len(parts[name]) for name in ("train", "dev", "test")] == [30, 10, 10]
    assert len({line for part in parts.values() for line in part}) == 50
