"""The report's page, its pictures and its Markdown twin."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from .made import CURVE, INTERPOLATED, MIXED, PRETRAINED, STRONGER, compare, write_all, write_evaluation


class Elements(HTMLParser):
    """Checks that elements close, and collects what a page is made of."""

    VOID = ("meta", "br", "link", "img", "path", "use")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    folder = tmp_path_factory.mktemp("page")
    PLAIN = replace(PRETRAINED, curve=CURVE)
    inputs = write_all(folder, replace(MIXED, curve=CURVE), STRONGER, alphas=(INTERPOLATED,))
    inputs["pretrained"] = write_evaluation(folder / "with-curve", [PLAIN])
    done = compare(folder, inputs)
    return (done.folder / "report.html").read_text(encoding="utf-8"), done


def test_the_page_stands_alone(page: tuple[str, Any]) -> None:
    text, _ = page
    elements = Elements()
    elements.feed(text)
    assert elements.open == []
    assert not [tag for tag, _ in elements.tags if tag in ("script", "link", "iframe", "object", "img")]
    for _, attributes in elements.tags:
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#")
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)


def test_the_page_is_accessible_and_its_ids_are_unique(page: tuple[str, Any]) -> None:
    text, _ = page
    assert "var(--mt-" in text
    assert "prefers-color-scheme: dark" in text
    assert text.count("<table") == text.count("<caption")
    elements = Elements()
    elements.feed(text)
    ids = [attributes["id"] for _, attributes in elements.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    pictures = [attributes for tag, attributes in elements.tags if tag == "svg"]
    assert len(pictures) == 4
    for picture in pictures:
        assert picture["role"] == "img"
        assert set((picture["aria-labelledby"] or "").split()) <= set(ids)
    assert ("html", {"lang": "en"}) in elements.tags


def test_text_of_the_data_cannot_become_markup(page: tuple[str, Any]) -> None:
    assert "&lt;do&gt;" in page[0]
    assert "<do>" not in page[0]


def assert_painted(file: Path) -> None:
    """A picture as pixels, in the colours of the light scheme: some ink, and no placeholder."""
    from matplotlib.colors import to_rgb
    from matplotlib.image import imread

    pixels = (imread(file)[..., :3] * 255).round().astype(int).reshape(-1, 3)
    found = {tuple(pixel) for pixel in pixels.tolist()}
    assert tuple(round(255 * part) for part in to_rgb("#1c2430")) in found
    assert not [pixel for pixel in found if pixel[:2] == (0, 0) and 0xA0 <= pixel[2] <= 0xBF]
    assert (pixels == 255).all(1).mean() > 0.5


def test_pictures_are_files_of_their_own(page: tuple[str, Any]) -> None:
    _, done = page
    files = sorted(file.name for file in done.folder.glob("*.svg"))
    assert files == ["pareto.svg", "pretraining-pretrain.svg", "training-finetune.svg", "training-pretrain.svg"]
    for name in files:
        root = ElementTree.parse(done.folder / name).getroot()
        assert root.get("viewBox")
        # In colours that any program shows, on a ground of their own.
        assert not re.search(r"#0000[ab]\d|var\(", (done.folder / name).read_text())
        assert 'fill="#ffffff"' in (done.folder / name).read_text()
        assert_painted(done.folder / name.replace(".svg", ".png"))
    drawn = "".join(ElementTree.parse(done.folder / "pareto.svg").getroot().itertext())
    for word in ("mixed-0.3", "mixed-0.5", "finetuned", "interpolated-0.5", "the gate's limits"):
        assert word in drawn


def test_the_markdown_twin_has_the_table(page: tuple[str, Any]) -> None:
    _, done = page
    text = (done.folder / "report.md").read_text(encoding="utf-8")
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 5
    assert {line.count("|") for line in table} == {8}
    assert done.report["headline"] in text
    assert "**mixed-0.5**" in text


def test_without_curves_and_with_one_candidate_the_page_still_renders(tmp_path: Path) -> None:
    done = compare(tmp_path, write_all(tmp_path), max_forgetting_share=None)
    assert (done.report["selected"], done.passed) == ("finetuned", True)
    assert "Training curves" not in (done.folder / "report.html").read_text()
