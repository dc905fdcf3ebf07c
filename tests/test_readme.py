"""The README in Chinese has the commands, the headings and the links of the README."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TRANSLATED = "README.zh-CN.md"


@pytest.fixture(scope="module")
def pages() -> tuple[str, str]:
    return (ROOT / "README.md").read_text("utf-8"), (ROOT / TRANSLATED).read_text("utf-8")


def without_blocks(page: str) -> str:
    return re.sub(r"^```.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL)


def test_the_commands_are_the_same(pages: tuple[str, str]) -> None:
    one, other = (re.findall(r"^```.*?^```$", page, re.MULTILINE | re.DOTALL) for page in pages)
    assert other == one


def test_the_headings_are_of_the_same_levels_in_the_same_order(pages: tuple[str, str]) -> None:
    one, other = (re.findall(r"^(#+) ", without_blocks(page), re.MULTILINE) for page in pages)
    assert other == one


def test_the_links_lead_to_the_same_places(pages: tuple[str, str]) -> None:
    one, other = (re.findall(r"\]\(([^)]+)\)", page) for page in pages)
    each_other = {TRANSLATED, "README.md"}
    assert sorted(set(other) - each_other) == sorted(set(one) - each_other)


def test_options_paths_and_numbers_are_the_same(pages: tuple[str, str]) -> None:
    one, other = (set(re.findall(r"`([^`\n]+)`", without_blocks(page))) for page in pages)
    assert other == one
    one, other = (set(re.findall(r"(?<![\w.])\d+(?:\.\d+)+(?![\w.])", without_blocks(page))) for page in pages)
    assert other == one


def test_tables_have_the_same_rows(pages: tuple[str, str]) -> None:
    one, other = (re.findall(r"^\|.*\|$", without_blocks(page), re.MULTILINE) for page in pages)
    assert [row.count("|") for row in other] == [row.count("|") for row in one]
