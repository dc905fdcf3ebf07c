"""The sample on which trainings are watched, beside the labelled training data."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from mixtune.components.prepare import watch
from mixtune.components.prepare.watch import write_watch
from mixtune.components.shared.artifacts import Artifact
from mixtune.components.shared.data.prepared import WATCH, DataManifest, Document, Documents, write_split
from tests.components.shared.tiny import write_data
from tests.conftest import sentences

from .prepared import jsonl, prepare_finetune, prepare_pretrain


def test_prepare_writes_control_text_and_examples_of_dev(tmp_path: Path) -> None:
    text = prepare_pretrain(tmp_path / "text", jsonl(tmp_path / "pt.jsonl", [{"text": t} for t in sentences(100)]))
    rows = [{"text": one, "label": "xyz"[number % 3]} for number, one in enumerate(sentences(60, seed=1))]
    made = prepare_finetune(tmp_path / "labelled", jsonl(tmp_path / "ft.jsonl", rows), text, task="classification")
    folder = Path(made.train.path) / WATCH
    manifest = DataManifest.load(folder)
    dev, control = Documents(folder, "dev"), Documents(folder, "control")
    assert dev.records() == made.documents("dev").records()
    assert dev.labels.tolist() == made.documents("dev").labels.tolist()
    whole = text.documents("control")
    assert sorted(control.flat.tolist()) == sorted(whole.flat.tolist()), "little text is taken as a whole"
    assert {record["id"] for record in control.records()} == {record["id"] for record in whole.records()}
    assert np.diff(control.offsets).max() <= manifest.max_length
    assert manifest.splits["control"].bytes == pytest.approx(text.manifest.splits["control"].bytes, abs=len(control))
    assert list(made.manifest.splits) == ["train"], "it is no split that is trained on"


def test_much_of_both_is_a_sample_in_a_random_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_most", {"max_examples": 10, "max_tokens": 50}.__getitem__)
    text = str(write_data(tmp_path / "text", "pretrain", None, count=100))
    labels = str(write_data(tmp_path / "labels", "finetune", "generation", count=30))
    found = []
    for seed in (0, 0, 1):
        write_watch(labels, labels, DataManifest.load(labels), text, seed)
        folder = tmp_path / "labels" / WATCH
        texts, examples = Documents(folder, "control"), Documents(folder, "dev")
        assert len(examples) == 10
        assert 50 <= len(texts.flat) < 50 + 20
        found.append([record["id"] for split in (texts, examples) for record in split.records()])
    assert found[0] == found[1] != found[2]
    assert found[0][:3] != [f"control-{number}" for number in range(3)]


def test_of_chats_the_learned_tokens_alone_are_predicted(tmp_path: Path) -> None:
    labels = str(write_data(tmp_path / "labels", "finetune", "classification"))
    learned = np.zeros(80, bool)
    learned[40:] = True  # the first of three pieces has nothing to predict
    chat = Document(np.arange(80) % 50, {"id": "a", "source": "s", "bytes": 400}, supervised=learned)
    folder = tmp_path / "text"
    info = write_split(folder, "control", [chat])
    DataManifest(
        stream="pretrain", max_length=32, vocabulary_size=61, source="chats", splits={"control": info}
    ).save(folder)  # fmt: skip
    write_watch(labels, labels, DataManifest.load(labels), str(folder), 0)
    pieces, manifest = Documents(tmp_path / "labels" / WATCH, "control"), DataManifest.load(tmp_path / "labels" / WATCH)
    assert sorted(np.diff(pieces.offsets).tolist()) == [16, 32]
    spans = pieces.offsets.tolist()
    counts = [len(found) for low, high in pairwise(spans) if (found := pieces.supervised(low, high)) is not None]
    assert sorted(counts) == [15, 24], "the first token of a piece has no context"
    assert (manifest.splits["control"].bytes, manifest.splits["control"].supervised_tokens) == (240, 39)


def test_without_control_text_there_are_examples_alone(tmp_path: Path) -> None:
    labels = Artifact(str(write_data(tmp_path / "labels", "finetune", "classification")))
    write_watch(labels.path, labels.path, DataManifest.load(labels.path), None, 0)
    assert list(DataManifest.load(tmp_path / "labels" / WATCH).splits) == ["dev"]
