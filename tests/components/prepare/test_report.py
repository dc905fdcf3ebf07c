"""The data report: complete, and inert whatever the data holds."""

from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .prepared import Prepared, jsonl, prepare_finetune, prepare_pretrain

NASTY = '<script>alert("x")</script><img src=x onerror=alert(1)></pre></details>'


class Elements(HTMLParser):
    """Collects the elements, their attributes and the text of a page; elements must nest."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += f"{data} "


def parsed(page: str) -> Elements:
    elements = Elements()
    elements.feed(page)
    assert elements.open == []
    return elements


@pytest.fixture
def pretrained(tmp_path: Path) -> Prepared:
    rows = [{"text": f"{NASTY} 文章 {number} " + "word " * number} for number in range(60)]
    return prepare_pretrain(tmp_path / "pt", jsonl(tmp_path / "pt.jsonl", rows))


def test_text_cannot_become_part_of_the_page(tmp_path: Path, pretrained: Prepared) -> None:
    rows = [{"text": f"{number} {NASTY}", "label": f"{NASTY}{number % 2}"} for number in range(40)]
    made = prepare_finetune(tmp_path / "ft", jsonl(tmp_path / "<b>ft.jsonl", rows), pretrained)
    for page in (pretrained.page, made.page):
        elements = parsed(page)
        assert not {"script", "img", "b"} & set(elements.tags)
        assert NASTY in elements.text
        assert not [name for name, _ in elements.attributes if name.startswith("on")]


def test_page_needs_nothing_from_elsewhere(pretrained: Prepared) -> None:
    elements = parsed(pretrained.page)
    assert not [value for name, value in elements.attributes if name in ("src", "href")]
    assert not re.search(r"url\(|@import|https?:", pretrained.page)
    assert "prefers-color-scheme: dark" in pretrained.page
    assert ("name", "viewport") in elements.attributes


def test_page_holds_the_counts_and_five_samples_of_each_split(pretrained: Prepared) -> None:
    elements = parsed(pretrained.page)
    text = " ".join(elements.text.split())
    train = pretrained.manifest.splits["train"]
    assert f"train {train.documents} {train.tokens:,} {train.bytes:,}" in text
    assert "records read 60" in text
    assert elements.tags.count("details") == 5 + 2 + 3 + 3
    assert "No model trains on the documents of the split control" in text
    assert "文章" in text
    assert "<|bos|>" in text


def test_what_was_lost_is_a_table(tmp_path: Path) -> None:
    (tmp_path / "pt").mkdir()
    for name, count in (("a.csv", 3), ("b.csv", 0)):
        lines = [f'"text\n{name} {n}"' if n < count else f"text {name} {n}" for n in range(20)]
        (tmp_path / "pt" / name).write_text("\n".join(["text", *lines]) + "\n")
    made = prepare_pretrain(tmp_path / "out", tmp_path / "pt")
    rows = made.manifest.tallies
    assert [(row.kind, row.source, row.count, row.of) for row in rows if row.kind == "several_lines"] == [
        ("several_lines", None, 3, 40),
        ("several_lines", f"{tmp_path}/pt/a.csv", 3, 20),
    ]
    text = " ".join(parsed(made.page).text.split())
    what = f"records that span several lines of their file (such as the 2 lines from {tmp_path}/pt/a.csv, line 2)"
    assert f"{what} 3 40 7.5 % {tmp_path}/pt/a.csv 3 20 15 %" in text
    assert "lines that stand in quotes and look like records of their own 0 45 0 %" in text


def charted(page: str) -> dict[str, list[int]]:
    """The counts beside each bar of all charts."""
    rows = re.findall(r"<tr><td class=\"name\">(.*?)</td>(.*?)</tr>", page, re.DOTALL)
    return {name: [int(n) for n in re.findall(r'<td class="number">(\d+)</td>', rest)] for name, rest in rows}


def test_labels_and_lengths_add_up(
    tmp_path: Path, pretrained: Prepared, write_jsonl: Callable[[str, list[dict[str, Any]]], Path]
) -> None:
    rows = [{"text": f"text {number}", "label": "好" if number % 3 else "坏"} for number in range(60)]
    made = prepare_finetune(tmp_path / "ft", write_jsonl("ft.jsonl", rows), pretrained)
    counts = charted(made.page)
    splits = [made.documents(split) for split in ("train", "dev", "test")]
    assert sum(counts["好"]) == 40
    assert sum(counts["坏"]) == 20
    lengths = [row for name, row in counts.items() if " to " in name]
    assert [sum(column) for column in zip(*lengths, strict=True)] == [len(split) for split in splits]


def test_labels_of_examples_that_have_several(tmp_path: Path, pretrained: Prepared) -> None:
    rows = [{"text": f"text {number}", "label": [["好", NASTY], ["好"], []][number % 3]} for number in range(60)]
    made = prepare_finetune(tmp_path / "ft", jsonl(tmp_path / "ft.jsonl", rows), pretrained, task="multi_label")
    counts = charted(made.page)
    assert sum(counts["好"]) == 40
    assert sum(counts["(no label)"]) == 20
    text = " ".join(parsed(made.page).text.split())
    assert f"labels {NASTY} · 好" in text
    assert "labels (none)" in text


def test_numbers_to_predict(tmp_path: Path, pretrained: Prepared) -> None:
    rows = [{"text": f"text {number}", "label": number} for number in range(101)]
    made = prepare_finetune(tmp_path / "ft", jsonl(tmp_path / "ft.jsonl", rows), pretrained, task="regression")
    counts = charted(made.page)
    bins = [f"{10 * number} to {10 * number + 10}" for number in range(10)]
    assert [sum(counts[name]) for name in bins] == [10] * 9 + [11]
    text = " ".join(parsed(made.page).text.split())
    assert "split lowest 5 % 25 % median 75 % 95 % highest" in text
    numbers = made.documents("train").targets[:, 0]
    assert f"train {numbers.min():.4g} " in text
    assert f" {np.median(numbers):.4g} " in text


def test_one_far_number_and_negative_ones_do_not_break_the_page(tmp_path: Path, pretrained: Prepared) -> None:
    rows = [{"text": f"text {number}", "label": -number if number else 3e38} for number in range(40)]
    made = prepare_finetune(tmp_path / "ft", jsonl(tmp_path / "ft.jsonl", rows), pretrained, task="regression")
    assert "3e+38" in parsed(made.page).text


def test_answers_and_the_windows_that_hold_them(tmp_path: Path, pretrained: Prepared) -> None:
    rows = [
        {
            "question": f"第{number}?",
            "context": f"北京{number}。" + "词 " * 20,
            "answers": f"北京{number}" if number % 4 else "",
        }
        for number in range(40)
    ]
    source = jsonl(tmp_path / "ft.jsonl", rows)
    made = prepare_finetune(tmp_path / "ft", source, pretrained, task="question_answering")
    elements = parsed(made.page)
    text = " ".join(elements.text.split())
    notes = made.manifest.notes
    for split in ("train", "dev", "test"):
        windows, having = notes["windows"][split], notes["windows_with_answer"][split]
        share = f"{having} of {windows} ({having / windows:.0%})"
        assert f"{split} {notes['examples'][split]} {notes['unanswerable'][split]} {share}" in text
    assert "Length of the windows" in text
    assert elements.tags.count("details") == 5 + 4 + 4  # one window of each example
    found = re.findall(r"answer in this window tokens \d+ to \d+: (.*?) as the model sees it", text)
    assert found
    assert all(re.fullmatch(r"北京\d+", answer) for answer in found)
    assert len(found) + text.count("answer in this window none: the first token") == 13
