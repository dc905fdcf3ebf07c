"""The pseudo-likelihood of masked language models, held against plain transformers, one pass at a time."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForMaskedLM

from mixtune.components.evaluate.likelihood import masked_segments
from mixtune.components.evaluate.sampling import draw_text
from mixtune.components.evaluate.windows import mask, mask_passes, windows
from mixtune.components.shared.artifacts import read_jsonl
from mixtune.components.shared.data.prepared import Documents
from mixtune.components.shared.errors import RefusedError

from ..shared.tiny import SPECIAL, tiny_tokenizer
from .made import FIRST, LABELS, LAST, MASK, MAX_LENGTH, evaluate, write_labelled, write_model, write_text

pytestmark = pytest.mark.numeric


@pytest.fixture(autouse=True)
def _float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixtune.components.shared.model.precision.pick_precision", lambda precision: "float32")


class Given:
    """Documents in memory."""

    def __init__(self, *documents: list[int]) -> None:
        self._documents = [np.array(document, np.int32) for document in documents]
        self.offsets = np.cumsum([0, *map(len, documents)])

    def tokens(self, index: int) -> np.ndarray:
        return self._documents[index]


def segments(*documents: list[int], passes: int = 7, max_length: int = MAX_LENGTH) -> list[Any]:
    given: Any = Given(*documents)
    lengths = np.diff(given.offsets)
    sample = draw_text(lengths, lengths, max_length, None, passes)
    found = masked_segments(given, sample, max_length, passes, MASK, SPECIAL.values())
    return [replace(segment, key=int(sample.document[segment.key])) for segment in found]


@given(
    lengths=st.lists(st.integers(0, 60), min_size=1, max_size=3), passes=st.integers(2, 12),
    max_length=st.integers(2, 20), ends=st.booleans(),
)  # fmt: skip
def test_every_token_but_special_ones_is_predicted_once(
    lengths: list[int], passes: int, max_length: int, ends: bool
) -> None:
    """Tokens are their own positions, so that each prediction says which token it is of."""
    documents = [[100 + i for i in range(length)] for length in lengths]
    if ends:
        documents = [[FIRST, *document, LAST] for document in documents]
    predicted: Counter[tuple[int, int]] = Counter()
    for segment in segments(*documents, passes=passes, max_length=max_length):
        assert len(segment.tokens) <= max_length
        assert segment.num_supervised == len(segment.masked) > 0
        assert set(segment.tokens[segment.masked]) == {MASK}
        restored = segment.tokens.copy()
        restored[segment.masked] = segment.originals
        assert MASK not in restored  # nothing else is masked
        first = documents[segment.key].index(int(restored[0]))
        assert restored.tolist() == documents[segment.key][first : first + len(restored)]
        predicted.update((segment.key, int(token)) for token in segment.originals)
    ordinary = [(i, token) for i, document in enumerate(documents) for token in document if token >= 100]
    assert predicted == Counter(ordinary)


def test_special_tokens_inside_a_text_are_left_alone() -> None:
    found = segments([FIRST, 5, MASK, 6, LAST, 7, LAST])
    assert sorted(int(token) for segment in found for token in segment.originals) == [5, 6, 7]
    assert all(segment.tokens[[0, 2, 4, 6]].tolist() == [FIRST, MASK, LAST, LAST] for segment in found)


def test_a_document_is_masked_alike_whatever_stands_beside_it() -> None:
    document = [FIRST, *range(30), LAST]
    alone = segments([FIRST, 1, LAST], document)
    beside = segments([FIRST, *range(50), LAST], document)
    ours, theirs = ([one for one in found if one.key == 1] for found in (alone, beside))
    assert len(ours) == len(theirs) > 0
    assert all(np.array_equal(one.tokens, other.tokens) for one, other in zip(ours, theirs, strict=True))


def write_masked(folder: Path, architecture: str = "bert", **options: Any) -> Any:
    write_text(folder / "text", with_ends=True)
    return write_model(folder / "model", "finetuned", "finetuned", LABELS, architecture=architecture, **options)


@torch.no_grad()
def naive_nats(model: Any, index: int, tokens: np.ndarray) -> tuple[float, int]:
    """Loss and count of the tokens, one pass over one window after the other, with transformers' own forward."""
    total, count = 0.0, 0
    for window in windows(len(tokens), MAX_LENGTH, scored_from=0):
        piece = torch.tensor(tokens[window.start : window.end].tolist())
        ordinary = [
            place - window.start
            for place in range(window.scored_from, window.end)
            if int(tokens[place]) not in SPECIAL.values()
        ]
        for turn in range(mask_passes(0.15)):
            chosen = mask(np.array(ordinary, np.int64), mask_passes(0.15), index, window.start, turn)
            ids = piece.clone()
            ids[chosen] = MASK
            scores = F.log_softmax(model(input_ids=ids[None]).logits[0].double(), -1)
            total -= float(scores[chosen, piece[chosen].long()].sum())
            count += len(chosen)
    return total, count


@pytest.mark.parametrize("architecture", ["bert", "roberta", "modernbert"])
def test_document_losses_are_those_of_plain_transformers(tmp_path: Path, architecture: str) -> None:
    model = write_masked(tmp_path, architecture)
    found, folder = evaluate(tmp_path, model, write_labelled(tmp_path / "labelled"))
    assert found["likelihood"] == "fixed-mask pseudo-likelihood"
    plain = AutoModelForMaskedLM.from_pretrained(model.path).eval()
    documents = Documents(tmp_path / "text", "dev")
    for index, row in enumerate(read_jsonl(folder / "finetuned" / "dev.documents.jsonl")):
        tokens = documents.tokens(index)
        nats, count = naive_nats(plain, index, tokens)
        assert row["tokens"] == count == len(tokens) - 2
        assert row["nats"] == pytest.approx(nats, rel=1e-5)


@pytest.mark.parametrize("architecture", ["bert", "roberta"])
def test_losses_depend_neither_on_the_batch_nor_on_the_packing(tmp_path: Path, architecture: str) -> None:
    model, labelled = write_masked(tmp_path, architecture), write_labelled(tmp_path / "labelled")
    nats = []
    ways: list[dict[str, Any]] = [{"batch_size": 1}, {"batch_size": 64}]
    for options in ways:
        _, folder = evaluate(tmp_path, model, labelled, **options)
        nats.append([row["nats"] for row in read_jsonl(folder / "finetuned" / "test.documents.jsonl")])
    assert nats[0] == pytest.approx(nats[1], rel=1e-5)


def test_the_share_that_is_masked_sets_the_passes(tmp_path: Path) -> None:
    """Fewer passes hide more of the text from each prediction: another measure, of as many tokens."""
    model, labelled = write_masked(tmp_path), write_labelled(tmp_path / "labelled")
    rows = {}
    for share in (0.5, 0.15):
        _, folder = evaluate(tmp_path, model, labelled, mask_probability=share)
        rows[share] = list(read_jsonl(folder / "finetuned" / "dev.documents.jsonl"))
    assert [row["tokens"] for row in rows[0.5]] == [row["tokens"] for row in rows[0.15]]
    assert rows[0.5][4]["nats"] != pytest.approx(rows[0.15][4]["nats"], rel=1e-3)


def test_a_causal_model_says_that_it_is_one(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "pretrained", "pretrained")
    found, _ = evaluate(tmp_path, model, write_labelled(tmp_path / "labelled"))
    assert found["likelihood"] == "causal"


def test_a_masked_model_whose_tokenizer_has_no_mask_token_is_refused(tmp_path: Path) -> None:
    model = write_masked(tmp_path)
    words: Any = tiny_tokenizer()
    words.mask_token = None
    words.save_pretrained(model.path)
    with pytest.raises(
        RefusedError, match=r"finetuned: is a masked language model, but its tokenizer has no mask token"
    ):
        evaluate(tmp_path, model, write_labelled(tmp_path / "labelled"))


def test_a_masked_model_writes_no_answers(tmp_path: Path) -> None:
    write_text(tmp_path / "text", with_ends=True)
    model = write_model(tmp_path / "model", "pretrained", "pretrained", architecture="bert")
    with pytest.raises(RefusedError, match="pretrained: is a masked language model, which writes no answers"):
        evaluate(tmp_path, model, write_labelled(tmp_path / "labelled", "generation"))
