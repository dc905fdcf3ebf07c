"""Reads sources in a test, and returns what was found."""

from __future__ import annotations

from pathlib import Path

from mixtune.components.shared.data.problems import Problems
from mixtune.components.shared.data.readers import Reading
from mixtune.components.shared.data.records import Row
from mixtune.components.shared.data.sources import read
from mixtune.components.shared.data.tallies import Tallies

TEXT = {"text": "text"}
LABELLED = {"text": "text", "label": "label"}


def reading(columns: dict[str, str] | None = None, tsv_quotes: bool = False) -> Reading:
    return Reading(columns or TEXT, "data.x.source", tsv_quotes, Problems(), Tallies())


def rows_of(source: str | Path, columns: dict[str, str] | None = None, tsv_quotes: bool = False) -> list[Row]:
    by = reading(columns, tsv_quotes)
    rows = list(read(str(source), by))
    assert by.problems.sentences() == []
    return rows


def texts_of(source: str | Path) -> list[str]:
    return [row.values["text"] for row in rows_of(source)]


def problems_of(source: str | Path, columns: dict[str, str] | None = None) -> list[str]:
    by = reading(columns)
    list(read(str(source), by))
    return by.problems.sentences()
