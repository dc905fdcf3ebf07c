"""The report's page, its pictures and its Markdown twin."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from mixtune.components.compare.report.plots import looks, markers, name_in_legend, shown_in_pareto
from mixtune.components.shared.data.tallies import Tally

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


def test_what_was_lost_is_a_warning_and_a_table(tmp_path: Path) -> None:
    rows = [
        Tally(kind="duplicates", part="source", count=2, of=300),
        Tally(kind="dropped", part="train", count=190, of=240),
        Tally(kind="dropped", part="test", count=0, of=60),
        Tally(kind="shortened", part="train", count=0, of=50),
    ]
    done = compare(tmp_path, write_all(tmp_path, MIXED, alphas=(), tallies=rows))
    (warning,) = done.report["warnings"]
    assert warning == (
        "data.finetune: 190 of 300 examples (63 %) are dropped, since they do not fit into model.max_length "
        "(train 190 of 240; test 0 of 60); raise model.max_length"
    )
    text = (done.folder / "report.html").read_text(encoding="utf-8")
    cells = re.findall(r'<td class="wrap">([^<]*)</td><td class="wrap">([^<]*)</td><td>(\d+)</td><td>(\d+)</td>', text)
    assert [row[1:] for row in cells] == [("", "2", "300"), ("", "190", "300"), ("train", "190", "240")]
    assert text.count(warning) == 1
    assert f"- Warning: {warning}" in (done.folder / "report.md").read_text(encoding="utf-8")
    assert done.report["tallies"]["finetune"][1]["count"] == 190


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
    assert not re.search(r"[^\n]\n## ", text), "a heading is a paragraph of its own"


def test_without_curves_and_with_one_candidate_the_page_still_renders(tmp_path: Path) -> None:
    done = compare(tmp_path, write_all(tmp_path), max_forgetting_share=None)
    assert (done.report["selected"], done.passed) == ("finetuned", True)
    assert "Training curves" not in (done.folder / "report.html").read_text()


@pytest.mark.parametrize("on_gpu", [True, False])
def test_costs_show_what_was_measured_and_nothing_else(tmp_path: Path, on_gpu: bool) -> None:
    measured: dict[str, float] = {"tokens_per_second": 12345.6, "peak_memory_bytes": 3 << 30}
    if on_gpu:
        measured |= {"flops_per_second": 3e14, "mfu": 0.31, "gpu_utilisation": 0.875}
    done = compare(tmp_path, write_all(tmp_path, replace(MIXED, utilisation=measured)))
    text = (done.folder / "report.html").read_text(encoding="utf-8")
    table = text[text.index('<table class="costs machine">') :].partition("</table>")[0]
    rows = [re.findall(r"<td>(.*?)</td>", line) for line in table.partition("<tbody>")[2].split("</tr>")[:-1]]
    gpu = ["31 %", "88 %"] if on_gpu else []
    assert rows == [["mixed-0.3", "12,346", "3.0 GiB", *gpu]], "of the others nothing was measured"
    assert ("MFU" in table) == on_gpu
    assert done.report["costs"]["peak_memory_bytes"] == 3 << 30


def test_the_cost_of_generated_data_is_told(tmp_path: Path) -> None:
    written = {"tokens": 12_345, "documents": 90, "seconds": 21.4}
    done = compare(tmp_path, write_all(tmp_path, replace(MIXED, generation=written)))
    page = (done.folder / "report.html").read_text(encoding="utf-8")
    assert "<td>32<small>21 of them to generate 12,345 tokens</small></td>" in page
    assert done.row("mixed-0.3")["generation"] == {**written, "kept": None}
    assert done.row("finetuned")["generation"] is None


def row(name: str, kind: str, score: float | None = 0.5) -> dict[str, Any]:
    return {
        "id": name,
        "kind": kind,
        "task_score": None if score is None else {"value": score, "low": 0.4, "high": 0.6},
    }


def test_every_candidate_has_a_look_of_its_own() -> None:
    kinds = {"base": 1, "pretrained": 1, "finetuned": 1, "mixed": 40, "interpolated": 3, "champion": 1}
    rows = [row(f"{kind}-{number}", kind) for kind, count in kinds.items() for number in range(count)]
    found = looks(rows)
    assert len({(one.colour, one.marker) for one in found.values()}) == len(rows)
    of_ids = markers([*rows[:13], *rows[:13]])
    assert len(set(of_ids.values())) == len(of_ids) == 13


def test_the_legend_says_which_candidate_has_no_score(tmp_path: Path) -> None:
    rows = [row("base", "base", None), row("pretrained", "pretrained", None), row("mixed-0.3", "mixed")]
    assert [name_in_legend(one) for one in shown_in_pareto(rows)] == ["base, no score", "mixed-0.3"]
    many = [replace(MIXED, id=f"mixed-0.{number}", mix_weight=number / 10) for number in range(1, 10)]
    done = compare(tmp_path, write_all(tmp_path, *many, alphas=(INTERPOLATED,)))
    drawn = "".join(ElementTree.parse(done.folder / "pareto.svg").getroot().itertext())
    for name in ("finetuned", "interpolated-0.5", *(one.id for one in many)):
        assert drawn.count(name) >= 1, name


def test_candidates_that_differ_in_lambda_or_share_alone_are_drawn_over_it(tmp_path: Path) -> None:
    made = [
        replace(MIXED, id=f"mixed-{weight:g}-replay-{share:g}", mix_weight=weight, replay_share=share)
        for weight, share in ((0.1, 0.1), (0.3, 0.1), (0.5, 0.1), (0.1, 0.5))
    ]
    other = replace(MIXED, id="mixed-0.9-seed-3", mix_weight=0.9, seed=3)
    done = compare(tmp_path / "one", write_all(tmp_path / "one", *made, other))
    page = (done.folder / "report.html").read_text(encoding="utf-8")
    assert "Task score over λ" in page
    assert "Forgetting over λ" in page
    assert "over the replay share" not in page, "two shares are seen in the table"
    described = re.search(r"Forgetting over λ, forgetting, bits per byte\. (.*?)</desc>", page)
    assert described is not None
    found = re.findall(r"replay share ([\d.]+): ((?:[+-]?[\d.]+ at [\d.]+(?:, )?)+)", described[1])
    assert [(share, points.count(" at ")) for share, points in found] == [("0.1", 3), ("0.5", 1)]
    assert "0.9" not in described[1]
    few = compare(tmp_path / "two", write_all(tmp_path / "two", *made[:2]))
    assert "over λ</h3>" not in (few.folder / "report.html").read_text(encoding="utf-8")
