"""Forgetting by source: what a source is, its values, and what a report says of one, of none and of many."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixtune.components.compare.sources import forgetting_by_source, group
from mixtune.components.compare.statistics import Bootstrap
from mixtune.components.shared.data.source_names import NO_NAME, source_of

from .made import MIXED, Outcome, compare, write_all


@pytest.mark.parametrize(
    ("where", "embedded", "source"),
    [
        ("data/a.jsonl, line 12", False, "data/a.jsonl"),
        ("data/a.json, item 3", False, "data/a.json"),
        ("hub:owner/name#train, row 7", False, "hub:owner/name#train"),
        ("语料/新闻.txt, line 1", False, "语料/新闻.txt"),
        ("notes, part 2.txt", False, "notes, part 2.txt"),
        ("stdlib/email/parser.py, Parser", True, "stdlib"),
        ("python reference, for, passage 2", True, "python reference"),
        ("", False, NO_NAME),
        (None, True, NO_NAME),
    ],
)
def test_the_source_is_what_a_document_comes_from_without_its_line(
    where: str | None, embedded: bool, source: str
) -> None:
    assert source_of(where, embedded) == source


def test_values_are_ratios_of_sums_of_each_source_alone() -> None:
    draw = np.random.default_rng(1)
    names = ["b", "a", "b", "c", "a", "b"]
    before, after = draw.uniform(50, 90, 6), draw.uniform(60, 99, 6)
    size = np.array([100, 200, 100, 50, 100, 100])
    sources = group(names, size)
    assert [(one.name, one.num_bytes, list(one.places)) for one in sources] == [
        ("a", 300, [1, 4]), ("b", 300, [0, 2, 5]), ("c", 50, [3]),
    ]  # fmt: skip
    found, rest = forgetting_by_source(sources, after, before, size, Bootstrap(0, 200, 0.9))
    assert rest is None
    for one in sources:
        expected = (after - before)[one.places].sum() / (math.log(2) * one.num_bytes)
        assert found[one.name]["value"] == pytest.approx(expected)
        assert found[one.name]["documents"] == len(one.places)
    assert found["b"]["low"] < found["b"]["value"] < found["b"]["high"]
    assert (found["c"]["low"], found["c"]["high"]) == (None, None)


def run_with(folder: Path, name: Callable[[int], str | None], **how: Any) -> Outcome:
    return compare(folder, write_all(folder, MIXED, source=name, origin="texts", **how))


def text_of(done: Outcome, name: str) -> str:
    return (done.folder / name).read_text(encoding="utf-8")


def test_every_candidate_has_its_sources_and_the_worst_is_named(tmp_path: Path) -> None:
    done = run_with(tmp_path, lambda i: f"part-{i % 3}.jsonl, line {i}")
    assert [(one["source"], one["documents"]) for one in done.report["forgetting"]["sources"]]
    assert sum(one["documents"] for one in done.report["forgetting"]["sources"]) == 60
    row = done.row("mixed-0.3")
    assert set(row["delta_bpb_by_source"]) == {"part-0.jsonl", "part-1.jsonl", "part-2.jsonl"}
    # The whole is the mean of the parts, weighted by bytes.
    sizes = {one["source"]: one["bytes"] for one in done.report["forgetting"]["sources"]}
    whole = sum(size * row["delta_bpb_by_source"][name]["value"] for name, size in sizes.items()) / sum(sizes.values())
    assert whole == pytest.approx(row["delta_bpb"]["value"])
    worst = max(row["delta_bpb_by_source"], key=lambda name: row["delta_bpb_by_source"][name]["value"])
    assert row["worst_source"] == worst
    value = row["delta_bpb_by_source"][worst]
    sentence = (
        f"mixed-0.3 forgets most on {worst}: {value['value']:+.2f} [{value['low']:+.2f}, {value['high']:+.2f}] "
        "bits per byte (20 documents)"
    )
    assert done.report["forgetting"]["worst"] == sentence
    assert sentence in text_of(done, "report.html")
    assert sentence in text_of(done, "report.md")
    assert done.row("pretrained")["delta_bpb_by_source"][worst]["value"] == 0.0
    assert (done.folder / "sources.svg").is_file()
    assert f"| {worst} | 20 |" in text_of(done, "report.md")


def test_a_source_of_one_document_has_no_interval_and_this_is_said(tmp_path: Path) -> None:
    done = run_with(tmp_path, lambda i: "alone.txt" if i == 5 else "many.jsonl, line 3")
    alone = done.row("mixed-0.3")["delta_bpb_by_source"]["alone.txt"]
    assert (alone["low"], alone["high"], alone["documents"]) == (None, None, 1)
    # A value without an interval is not what a sentence rests on where there are others.
    assert done.row("mixed-0.3")["worst_source"] == "many.jsonl"
    for name in ("report.html", "report.md"):
        assert "single document has no interval" in text_of(done, name)


def test_one_source_and_no_names_need_no_table(tmp_path: Path) -> None:
    names: dict[str, Callable[[int], str | None]] = {"one": lambda i: f"text.jsonl, line {i}", "none": lambda i: None}
    for folder, name in names.items():
        done = run_with(tmp_path / folder, name)
        assert len(done.report["forgetting"]["sources"]) == 1
        assert done.report["forgetting"]["worst"] is None
        assert not (done.folder / "sources.svg").exists()
        assert "Forgetting by source" not in text_of(done, "report.html")
    assert done.report["forgetting"]["sources"][0]["source"] == NO_NAME


def test_many_files_are_grouped_by_folder(tmp_path: Path) -> None:
    names = [f"/data/texts/{folder}/{number}.txt" for folder in ("law", "news/old", "news/new") for number in range(20)]
    done = run_with(tmp_path, lambda index: names[index], documents=60)
    rows = {row["source"]: row["documents"] for row in done.report["forgetting"]["sources"]}
    assert rows == {"law": 20, "news": 40}
    flat = group([f"s3://bucket/texts/{number}.txt" for number in range(40)], np.ones(40))
    assert [(one.name, len(one.places)) for one in flat] == [("texts", 40)]
    few = group(["/data/a.txt", "/data/b.txt"], np.array([1, 2]))
    assert [one.name for one in few] == ["b.txt", "a.txt"]


def test_of_many_sources_the_largest_are_shown_and_the_others_together(tmp_path: Path) -> None:
    done = run_with(tmp_path, lambda i: f"shard-{i % 20}.jsonl, line {i}", documents=100)
    row = done.row("finetuned")
    assert len(row["delta_bpb_by_source"]) == 20
    rest = row["delta_bpb_other_sources"]
    assert (rest["sources"], rest["documents"]) == (9, 45)
    sizes = [one["bytes"] for one in done.report["forgetting"]["sources"]]
    assert sizes == sorted(sizes, reverse=True)
    names = [one["source"] for one in done.report["forgetting"]["sources"]]
    page = text_of(done, "report.html")
    assert f'<td class="wrap name">{names[10]}</td>' in page
    assert f'<td class="wrap name">{names[11]}</td>' not in page
    assert "9 others" in page


def test_chinese_names_and_texts_and_names_that_look_like_markup(tmp_path: Path) -> None:
    names = ["语料/新闻.txt", "<b>bold</b> & $x^2$ | pipe.jsonl", "百科"]
    done = run_with(tmp_path, lambda i: f"{names[i % 3]}, line {i}")
    page, twin = text_of(done, "report.html"), text_of(done, "report.md")
    assert "语料/新闻.txt" in page
    assert "<b>bold" not in page + twin
    assert "&lt;b&gt;bold&lt;/b&gt; &amp; $x^2$ | pipe.jsonl" in page
    assert "&lt;b>bold&lt;/b> &amp; $x^2$ \\| pipe.jsonl" in twin
    assert "语料/新闻.txt" in text_of(done, "sources.svg")
    assert "$x^2$" in text_of(done, "sources.svg")


def test_a_model_that_forgets_nowhere(tmp_path: Path) -> None:
    better = replace(MIXED, forgets=-0.3)
    done = compare(tmp_path, write_all(tmp_path, better, source=lambda i: f"{i % 2}.txt, line {i}"))
    assert done.report["selected"] == "mixed-0.3"
    assert done.report["forgetting"]["worst"] == "mixed-0.3 forgets on none of the 2 sources"


def test_embedded_text_is_grouped_by_package(tmp_path: Path) -> None:
    inputs = write_all(tmp_path, MIXED, source=lambda i: ("stdlib/a.py, f", "python reference, for, passage 1")[i % 2])
    done = compare(tmp_path / "embedded", inputs)
    assert {one["source"] for one in done.report["forgetting"]["sources"]} == {"stdlib", "python reference"}
    inputs = write_all(
        tmp_path, MIXED, source=lambda i: ("stdlib/a.py, f", "reference, passage 1")[i % 2], origin="texts"
    )
    done = compare(tmp_path / "files", inputs)
    assert {one["source"] for one in done.report["forgetting"]["sources"]} == {
        "stdlib/a.py, f", "reference",
    }  # fmt: skip
