"""The data report: complete, and inert whatever the data holds."""

from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

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
    assert elements.tags.count("details") == 5 + 3 + 3
    assert "文章" in text
    assert "<|bos|>" in text


def test_labels_and_lengths_add_up(
    tmp_path: Path, pretrained: Prepared, write_jsonl: Callable[[str, list[dict[str, Any]]], Path]
) -> None:
    rows = [{"text": f"text {number}", "label": "好" if number % 3 else "坏"} for number in range(60)]
    made = prepare_finetune(tmp_path / "ft", write_jsonl("ft.jsonl", rows), pretrained)
    rows_shown = re.findall(r"<tr><td class=\"name\">(.*?)</td>(.*?)</tr>", made.page, re.DOTALL)
    counts = {name: [int(n) for n in re.findall(r'<td class="number">(\d+)</td>', rest)] for name, rest in rows_shown}
    splits = [made.documents(split) for split in ("train", "dev", "test")]
    assert sum(counts["好"]) == 40
    assert sum(counts["坏"]) == 20
    lengths = [row for name, row in counts.items() if " to " in name]
    assert [sum(column) for column in zip(*lengths, strict=True)] == [len(split) for split in splits]
