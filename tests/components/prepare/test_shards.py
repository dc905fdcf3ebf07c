"""Shards: any division, any number of processes and any interruption give the same data."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from mixtune.components.prepare import shards
from mixtune.components.prepare.shards import Shard
from mixtune.components.prepare.tokenization import Encoder
from mixtune.components.shared.data.prepared import Document, Documents, merge_splits, write_split
from tests.conftest import sentences

from .prepared import Prepared, jsonl, prepare_finetune, prepare_pretrain, tokenizer_options
from .wordpiece import bert_folder

MASKED = tokenizer_options(objective="masked_lm")
ANIMALS = {"cat", "dog", "bird"}


def rows(task: str) -> list[dict[str, Any]]:
    texts = sentences(60, seed=4)
    if task == "question_answering":
        animal = [next((word for word in text.split() if word in ANIMALS), "") for text in texts]
        return [
            {"question": "which animal?", "context": text, "answers": answer}
            for text, answer in zip(texts, animal, strict=True)
        ]
    return [{"prompt": text, "completion": text * (1 + 3 * (number % 2))} for number, text in enumerate(texts)]


def same(one: Prepared, other: Prepared) -> None:
    assert one.manifest.digest == other.manifest.digest
    for split in ("train", "dev", "test"):
        assert one.documents(split).records() == other.documents(split).records()
    assert one.manifest.notes == other.manifest.notes
    assert one.manifest.splits == other.manifest.splits


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of a few rows, each made by this process."""
    monkeypatch.setattr(shards, "SHARD_BYTES", 700)
    monkeypatch.setattr(shards, "usable_cores", lambda: 1)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return jsonl(tmp_path / "text.jsonl", [{"text": text} for text in sentences(120)])


def test_shards_of_text_give_the_same_as_one(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = prepare_pretrain(tmp_path / "one", text)
    monkeypatch.setattr(shards, "SHARD_BYTES", 700)
    for cores in (1, 2):
        monkeypatch.setattr(shards, "usable_cores", lambda cores=cores: cores)
        made = prepare_pretrain(tmp_path / str(cores), text)
        same(one, made)
        assert made.page == one.page


@pytest.mark.parametrize("task", ["generation", "question_answering"])
def test_shards_of_examples_give_the_same_as_one(
    tmp_path: Path, text: Path, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {
        "task": task,
        "tokenizer": MASKED if task == "question_answering" else tokenizer_options(),
    }
    start = prepare_pretrain(tmp_path / "start", text, tokenizer=options["tokenizer"])
    source = jsonl(tmp_path / "rows.jsonl", rows(task))
    one = prepare_finetune(tmp_path / "one", source, start, **options)
    monkeypatch.setattr(shards, "SHARD_BYTES", 900)
    made = prepare_finetune(tmp_path / "many", source, start, **options)
    same(one, made)
    if task == "generation":  # the characters of a question that examples share are counted once for each shard
        assert made.page == one.page
        assert made.count("dropped") == one.count("dropped") > 0


@pytest.mark.parametrize("where", ["folder", "url"])
def test_after_a_kill_only_the_missing_shards_are_made(
    tmp_path: Path, text: Path, small: None, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    one = prepare_pretrain(tmp_path / "one", text)
    checkpoints = str(tmp_path / "checkpoints") if where == "folder" else f"memory://{tmp_path.name}/checkpoints"
    monkeypatch.setenv("MIXTUNE_CHECKPOINT_DIR", checkpoints)
    made: list[str] = []
    make = Shard.make

    def until_killed(shard: Shard, encoder: Encoder) -> None:
        if len(made) == 4:
            raise KeyboardInterrupt
        make(shard, encoder)
        made.append(shard.folder.name)

    monkeypatch.setattr(Shard, "make", until_killed)
    with pytest.raises(KeyboardInterrupt):
        prepare_pretrain(tmp_path / "first", text)
    files = fsspec.url_to_fs(checkpoints)
    (kept,) = files[0].ls(files[1], detail=False)
    assert "prepare-pretrain-" in kept
    first, made = made, []

    def counted(shard: Shard, encoder: Encoder) -> None:
        make(shard, encoder)
        made.append(shard.folder.name)

    monkeypatch.setattr(Shard, "make", counted)
    same(one, prepare_pretrain(tmp_path / "second", text))
    assert len(first) == 4
    assert made
    assert not set(made) & set(first)
    assert files[0].find(files[1]) == [], "nothing is left"


def test_other_data_uses_no_shard_of_before(
    tmp_path: Path, text: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = jsonl(tmp_path / "other.jsonl", [{"text": text} for text in sentences(120, seed=9)])
    expected = prepare_pretrain(tmp_path / "expected", other)
    monkeypatch.setenv("MIXTUNE_CHECKPOINT_DIR", str(tmp_path / "checkpoints"))
    with monkeypatch.context() as stopped:
        stopped.setattr(shards.Made, "merge", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare_pretrain(tmp_path / "first", text)
    assert list((tmp_path / "checkpoints").iterdir())
    same(expected, prepare_pretrain(tmp_path / "second", other))


def test_a_refusal_keeps_no_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = bert_folder(tmp_path / "bert", sentences(20))
    unknown = jsonl(tmp_path / "a.jsonl", [{"text": f"чужой текст {number}"} for number in range(40)])
    monkeypatch.setenv("MIXTUNE_CHECKPOINT_DIR", str(tmp_path / "checkpoints"))
    with pytest.raises(Exception, match="unknown to the tokenizer"):
        prepare_pretrain(tmp_path / "out", unknown, tokenizer=tokenizer_options(base=base, vocabulary_size=None))
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_parts_of_a_split_are_merged_and_documents_can_be_left_out(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    documents = [
        Document(draw.integers(0, 99, 1 + number % 5).tolist(), {"id": str(number), "bytes": number}, 1, number % 3)
        for number in range(20)
    ]
    kept = draw.random(20) < 0.5
    kept[:7] = False  # nothing of the first part
    parts = [tmp_path / "a", tmp_path / "b", tmp_path / "c"]
    for part, inside in zip(parts, (documents[:7], documents[7:8], documents[8:]), strict=True):
        write_split(part, "train", inside)
    num_bytes = np.arange(20)
    for mask, wanted in ((None, documents), (kept, [one for one, keep in zip(documents, kept, strict=True) if keep])):
        info = merge_splits(tmp_path / "merged", "train", parts, num_bytes, mask)
        assert info == write_split(tmp_path / "whole", "train", wanted)
        merged, whole = (Documents(tmp_path / name, "train") for name in ("merged", "whole"))
        assert merged.records() == whole.records()
        assert [merged.tokens(n).tolist() for n in range(len(merged))] == [one.tokens for one in wanted]


def test_a_container_may_use_fewer_cores_than_the_machine_has() -> None:
    assert 1 <= shards.usable_cores() <= len(os.sched_getaffinity(0))
