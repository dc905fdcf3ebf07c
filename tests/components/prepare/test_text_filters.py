"""Documents that are too short, too long or repeat themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixtune.components.prepare.text_filters import PASSAGE_WORDS, repetition
from mixtune.components.shared.errors import RefusedError
from tests.conftest import sentences

from .prepared import jsonl, prepare_pretrain

LINE = "one two three four five six"


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("", 0),
        (LINE, 0),
        ("a\nb\na\nb", 0.5),  # lines
        (f"{LINE}\n\n {LINE}\nseven", 0.48),  # 27 of 59 characters in lines, 6 of 13 words: the passages join
        (f"{LINE} {LINE}", 0.5),  # words
        ("ha " * 100, 0.99),  # all but the first word stand in passages that stand above
        ("天气很好啊" * 2, 0.5),
        ("the cat and the dog and the cat", 0),
    ],
)
def test_the_share_that_was_said_before(text: str, share: float) -> None:
    assert repetition(text) == pytest.approx(share, abs=0.03)


@given(st.lists(st.sampled_from("abc"), max_size=40))
def test_agrees_with_the_plain_definition(found: list[str]) -> None:
    passages = [tuple(found[at : at + PASSAGE_WORDS]) for at in range(len(found) - PASSAGE_WORDS + 1)]
    repeated = {at + n for at, one in enumerate(passages) if one in passages[:at] for n in range(PASSAGE_WORDS)}
    assert repetition(" ".join(found)) == len(repeated) / max(1, len(found))


def test_each_is_counted_and_shown_and_held_out_data_are_kept(tmp_path: Path) -> None:
    rows = [{"text": text} for text in sentences(200)]
    odd = [{"text": "tiny"}, {"text": "long " + " ".join(f"w{n}" for n in range(300))}, {"text": f"{LINE}\n" * 9}]
    source, test = jsonl(tmp_path / "a.jsonl", [*rows, *odd]), jsonl(tmp_path / "test.jsonl", [odd[0], rows[0]])
    limits: dict[str, Any] = {"min_characters": 6, "max_characters": 500, "max_repetition": 0.5}
    made = prepare_pretrain(tmp_path / "out", source, test_source=str(test), **limits)
    assert [made.count(kind) for kind in ("too_short", "too_long", "repetitive")] == [1, 1, 1]
    texts = {text for split in ("train", "control", "dev") for text in made.texts(split)}
    assert not texts & {row["text"] for row in odd}
    assert len(texts) == 199
    assert "tiny" in made.texts("test")
    shown = made.page[made.page.index("The first of the removed records") :]
    for words in ("left out as too short", "left out as too long", "repeat themselves", "a.jsonl, line 201", LINE):
        assert words in shown
    whole = prepare_pretrain(tmp_path / "whole", source)
    assert len(whole.manifest.tallies) == len([row for row in whole.manifest.tallies if "too_" not in row.kind])
    assert "removed records" not in whole.page


def test_nothing_left(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", [{"text": text} for text in sentences(20)])
    with pytest.raises(RefusedError) as refused:
        prepare_pretrain(tmp_path / "out", source, min_characters=1000)
    assert str(refused.value) == "data.pretrain.source: nothing is left by min_characters; change them"
