"""The recipes are valid, and their tables say what the reports say."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest

from mixtune.components.shared.data.sources import named_sources
from mixtune.pipelines.configuration import read_config
from tests.benchmarks.recipe_data import GOODS, dialogues, number_words, questions, reports, split
from tests.benchmarks.recipes import CONFIGS, budgets, labels_of, main, over_labels, table
from tests.components.compare.made import FINETUNED, MIXED, compare, write_all

TASKS = ("sentiment", "summarisation", "translation", "question-answering", "chat")


def test_each_task_has_a_small_and_a_full_recipe() -> None:
    assert {f"{task}-{size}" for task in TASKS for size in ("small", "full")} <= {
        file.stem for file in CONFIGS.glob("*.yaml")
    }


@pytest.mark.parametrize("recipe", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_a_recipe_is_valid_and_says_whether_it_has_been_run(recipe: Path) -> None:
    text = recipe.read_text(encoding="utf-8")
    first = text.splitlines()[0]
    assert first.lower().startswith(("# run on ", "# not run"))
    config = read_config(recipe)
    assert config.name == recipe.stem
    assert config.placement.gpus == (1 if recipe.stem.endswith("-full") else 0)
    if not config.placement.gpus:
        assert f"recipes run {recipe.stem}" in first
        assert "hub:" not in text
        return
    assert f"mixtune submit pipelines/configs/recipes/{recipe.name}" in first
    places = [
        source.path for stream in (config.data.pretrain, config.data.finetune) for source in named_sources(stream)
    ]
    places.append(f"{config.model.base}@{config.model.revision}")
    assert len(places) >= 3
    for place in places:
        assert re.search(r"@[0-9a-f]{40}(#|/|$)", place), place


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
    assert lines[0] == "| accuracy (forgets), by labelled examples | 50 | all |"
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| finetuned", "| mixed-0.3"]
    forgets = next(row for row in reports["all"]["seeds"] if row["id"] == "mixed-0.3")["delta_bpb"]["mean"]
    assert lines[3].endswith(f" | {mean['mean']:.3f} ± {mean['sd']:.3f} ({forgets:.3f}) |")
    (tmp_path / "config.yaml").write_text("data: {finetune: {max_documents: 50}}")
    assert labels_of(tmp_path) == "50"
    (tmp_path / "config.yaml").write_text("data: {finetune: {max_documents: null}}")
    assert labels_of(tmp_path) == "all"


@pytest.mark.parametrize("numbers", [("50", "null"), ("null", "null")])
def test_runs_are_drawn_over_labels_only_where_their_numbers_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], numbers: tuple[str, str]
) -> None:
    report = compare(tmp_path / "made", write_all(tmp_path / "made", MIXED)).report
    outputs = [tmp_path / "one", tmp_path / "two"]
    for output, number in zip(outputs, numbers, strict=True):
        (output / "report").mkdir(parents=True)
        (output / "report" / "report.json").write_text(json.dumps(report), encoding="utf-8")
        (output / "config.yaml").write_text(f"data: {{finetune: {{max_documents: {number}}}}}", encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["recipes", "table", *map(str, outputs)])
    main()
    printed = capsys.readouterr().out
    assert printed.count("| candidate | seeds |") == 2
    assert ("(forgets), by labelled examples | 50 | all |" in printed) == (numbers[0] == "50")
    assert ("by labelled examples" in printed) == (numbers[0] == "50")


def test_of_a_budget_each_training_is_told(tmp_path: Path) -> None:
    one = replace(MIXED, id="mixed-budget-0.05", mix_weight=None, budget=0.05, tried=[(0.3, 0.25), (0.4, 0.19)])
    two = replace(one, id="mixed-budget-0.05-seed-1", seed=1, tried=[(0.41, 0.19)])
    report = compare(tmp_path, write_all(tmp_path, MIXED, one, two)).report
    used = [row["forgetting_budget"]["used"] for row in report["candidates"] if row["forgetting_budget"]]
    expected = f"λ = 0.4 in 2 trainings, {used[0]:.2f} used; λ = 0.41 in 1 training, {used[1]:.2f} used."
    assert budgets(report) == [f"mixed-budget-0.05: {expected}"]


def test_each_number_is_said_once_and_the_same_in_both_languages() -> None:
    pairs = list(number_words(random.Random(0), lambda number, lang, **form: f"{lang} {form.get('to')} {number}", 20))
    assert len(pairs) == 1999 + 20
    said = [english.split() for english, _ in pairs]
    numbers = [round(float(number) * (100 if form == "currency" else 1)) for _, form, number in said]
    assert len(set(numbers)) == len(numbers)
    assert all(german == english.replace("en ", "de ") for english, german in pairs)
    assert {form for _, form, _ in said} == {"None", "ordinal", "currency", "year"}
    assert all(1100 <= int(number) < 2000 for _, form, number in said if form == "year")


def test_a_headline_follows_from_its_report_and_occurs_once() -> None:
    made = list(reports(random.Random(0), lambda number, lang: f"n{number}", 200))
    assert len(made) == 200
    said = [headline.split() for _, headline in made]
    assert len({(good, number) for good, _, number, _ in said}) == 200
    assert {good for good, *_ in said} <= set(GOODS)
    up = {"rose by", "climbed by", "gained"}
    for report, headline in made:
        good, direction, number, unit = headline.split()
        sentence = next(part for part in report.split(". ") if " percent" in part)
        assert f"the price of {good} " in sentence
        assert f" {number} {unit}" in sentence
        assert any(f" {verb} " in sentence for verb in up) == (direction == "up")
        assert f"The price of {good} did not move" not in report


def test_splits_share_no_row(tmp_path: Path) -> None:
    rows = [{"text": str(number % 50)} for number in range(100)]
    split(tmp_path / "made", rows, held_out=10)
    parts = {name: (tmp_path / f"made.{name}.jsonl").read_text().splitlines() for name in ("train", "dev", "test")}
    assert [len(parts[name]) for name in ("train", "dev", "test")] == [30, 10, 10]
    assert len({line for part in parts.values() for line in part}) == 50


def test_questions_are_asked_of_what_a_docstring_says() -> None:
    docstring = """Do it.

Parameters
----------
G : NetworkX graph
    A graph. It can be
    directed.
weight : string, optional
    Name of an
    attribute

Returns
-------
G : graph
    Another one.
"""
    asked = {row["question"]: row["answers"] for row in questions("do", docstring)}
    assert asked == {
        "What is the type of G in do?": "NetworkX graph",
        "What is G in do?": "A graph.",
        "What is the type of weight in do?": "string, optional",
        "What is weight in do?": "Name of an attribute",
    }
    assert all(row["answers"] in row["context"] for row in questions("do", docstring))
    assert not list(questions("do", "Do it.")) + list(questions("do", None))


def test_dialogues_ask_two_things_of_a_number() -> None:
    found = list(dialogues(random.Random(0), lambda number, **form: f"{form} {number}", 20))
    assert len(found) == 999 + 20
    numbers = set()
    for row in found:
        question, answer, again, last = (turn["content"] for turn in row["messages"])
        number = re.search(r"\d+", question)
        assert number is not None
        assert answer.endswith(f" {number[0]}")
        assert last.endswith(f" {number[0]}")
        assert answer != last
        assert number[0] not in again
        numbers.add(number[0])
    assert len(numbers) == len(found)
