"""Invalid records are left out on request, and none disappears without a word."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from mixtune.components.prepare.config import FinetuneData, PretrainData
from mixtune.components.shared.artifacts import read_jsonl
from mixtune.components.shared.data.prepared import QUARANTINE
from mixtune.components.shared.data.sources import check_source
from mixtune.components.shared.errors import RefusedError
from tests.conftest import sentences

from .prepared import Prepared, jsonl, prepare_finetune, prepare_pretrain

BAD = [
    b'{"text": "no end',
    b"[1, 2]",
    b'{"text": null}',
    b'{"text": "   "}',
    b'{"other": "no text"}',
    b'{"text": 5}',
    b'{"text": "\xff\xfe"}',
]


def quarantined(made: Prepared) -> list[dict[str, object]]:
    return list(read_jsonl(Path(made.train.path) / QUARANTINE))


@pytest.fixture
def spoilt(tmp_path: Path) -> Path:
    good = [json.dumps({"text": text}).encode() for text in sentences(60)]
    source = tmp_path / "a.jsonl"
    source.write_bytes(b"\n".join([*good[:30], *BAD, *good[30:]]) + b"\n")
    return source


def test_each_is_written_with_its_reason_and_the_rest_is_used(tmp_path: Path, spoilt: Path) -> None:
    made = prepare_pretrain(tmp_path / "out", spoilt, on_error="skip", control_fraction=0)
    assert sum(len(made.documents(split)) for split in ("train", "dev", "test")) == 60
    found = quarantined(made)
    assert len(found) == len(BAD) == made.count("quarantined")
    for number, row in enumerate(found, start=31):
        assert f"a.jsonl, line {number}" in str(row["problem"])
    assert "is no JSON" in str(found[0]["problem"])
    assert found[0]["record"] == '{"text": "no end\n'
    assert found[3]["record"] == {"text": "   "}
    assert "is not UTF-8" in str(found[6]["problem"])
    (tally,) = [tally for tally in made.manifest.tallies if tally.kind == "quarantined" and tally.source is None]
    assert (tally.count, tally.of) == (7, 67)
    assert tally.is_warning()
    assert "are invalid and left out" in made.page


def test_by_default_they_are_refused_and_all_are_named(tmp_path: Path, spoilt: Path) -> None:
    with pytest.raises(RefusedError) as refused:
        prepare_pretrain(tmp_path / "out", spoilt)
    assert len([line for line in refused.value.problems if "line 3" in line]) == len(BAD)


def test_a_quick_check_does_not_name_what_is_skipped(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", [{"text": ""}, {"text": "a"}])
    assert check_source(PretrainData(source=str(source), on_error="skip")) == []
    (problem,) = check_source(PretrainData(source=str(source)))
    assert "line 1: text is empty" in problem


def test_nothing_left_is_refused(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", [{"text": ""}] * 9)
    with pytest.raises(RefusedError, match="holds no records that are valid"):
        prepare_pretrain(tmp_path / "out", source, on_error="skip")


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_other_formats_and_labels(tmp_path: Path, ending: str) -> None:
    start = prepare_pretrain(
        tmp_path / "start", jsonl(tmp_path / "t.jsonl", [{"text": text} for text in sentences(60)])
    )
    labels = ["a", "b"] * 20
    table = pd.DataFrame({"text": sentences(40, seed=2), "label": labels})
    table.loc[[3, 8], "label"] = None
    source = tmp_path / f"labelled.{ending}"
    if ending == "csv":
        table.to_csv(source, index=False)
        with source.open("a", encoding="utf-8") as file:
            file.write("one,two,three\n")
    else:
        table.to_parquet(source)
    made = prepare_finetune(tmp_path / "out", source, start, on_error="skip")
    assert len(quarantined(made)) == (3 if ending == "csv" else 2)
    assert sum(len(made.documents(split)) for split in ("train", "dev", "test")) == 38
    assert FinetuneData(source="a").on_error == "fail"


def test_a_file_that_cannot_be_read_to_its_end_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "a.csv"
    source.write_text('text\nfine\n"not closed\nmore\n', encoding="utf-8")
    with pytest.raises(RefusedError, match="is no valid CSV"):
        prepare_pretrain(tmp_path / "out", source, on_error="skip")
