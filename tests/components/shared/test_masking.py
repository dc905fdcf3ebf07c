"""Masking: what is chosen, what is put there, and that it is drawn anew at every reading but never differs for one position."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from mixtune.components.mixed.config import MixedCandidate
from mixtune.components.shared.data.prepared import Documents
from mixtune.components.shared.errors import RefusedError
from mixtune.components.shared.model.masking import Masking
from mixtune.components.shared.model.packing import Segment, collate
from mixtune.components.shared.training.control import ControlText
from mixtune.components.shared.training.streams import FinetuneStream, PretrainStream, make_mix

from .several import Steps
from .tiny import SPECIAL, VOCABULARY_SIZE, tiny_masking, tiny_tokenizer, write_data

TOKENS = st.lists(st.integers(0, VOCABULARY_SIZE - 1), min_size=1, max_size=80)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Documents:
    return Documents(write_data(tmp_path_factory.mktemp("text"), "pretrain", None, count=60), "train")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Documents:
    return Documents(write_data(tmp_path_factory.mktemp("labelled"), "finetune", "multi_label", count=17), "train")


@given(tokens=TOKENS, probability=st.floats(0.01, 0.99), seed=st.integers(0, 99))
def test_the_right_number_of_ordinary_tokens_is_predicted(tokens: list[int], probability: float, seed: int) -> None:
    given_tokens = np.array(tokens, np.int32)
    masked = tiny_masking(probability)(Segment(given_tokens, key=7, pretrain=True), np.random.default_rng(seed))
    ordinary = [token for token in tokens if token not in SPECIAL.values()]
    if not ordinary:
        assert masked is None
        return
    assert masked is not None
    assert masked.masked is not None
    assert masked.originals is not None
    assert masked.num_supervised == len(masked.masked) == max(1, round(probability * len(ordinary)))
    assert len(set(masked.masked.tolist())) == len(masked.masked)
    assert masked.originals.tolist() == [tokens[at] for at in masked.masked]
    assert not set(masked.originals.tolist()) & set(SPECIAL.values())
    others = np.delete(np.arange(len(tokens)), masked.masked)
    assert (masked.tokens[others] == given_tokens[others]).all()
    assert (masked.key, masked.pretrain) == (7, True)
    assert given_tokens.tolist() == tokens, "the document itself stays as it is"


def test_eight_in_ten_become_the_mask_one_anything_and_one_stays() -> None:
    # More ids than tokens, so that a random token is hardly ever the one that stood there.
    masking = Masking(mask_id=1_000_001, special_ids=(1_000_001,), vocabulary_size=1_000_000, probability=0.5)
    tokens = np.arange(100_000)
    masked = masking(Segment(tokens), np.random.default_rng(0))
    assert masked is not None
    chosen = masked.tokens[masked.masked]
    became_mask = int((chosen == masking.mask_id).sum())
    stayed = int((chosen == masked.originals).sum())
    for count, share in ((became_mask, 0.8), (stayed, 0.1), (len(chosen) - became_mask - stayed, 0.1)):
        assert binomtest(count, len(chosen), share).pvalue > 1e-3
    random = chosen[(chosen != masking.mask_id) & (chosen != masked.originals)]
    assert 0.48 < random.mean() / masking.vocabulary_size < 0.52, "from all of the vocabulary"


def test_forgetting_is_measured_under_masks_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in `evaluate`: of tokens that a model sees, it forgets more or less."""
    read: list[Segment] = []
    plan = ControlText.plan

    def listened(*given: Any) -> ControlText:
        control = plan(*given)
        read.extend(segment for window in control.windows for segment in window)
        return control

    monkeypatch.setattr(ControlText, "plan", listened)
    steps = Steps(tmp_path, "classification", "masked_lm")
    steps.run("mixed", "model", MixedCandidate(id="mixed-budget-1", forgetting_budget=1.0))
    placed = [int(token) for segment in read for token in segment.tokens[segment.masked]]
    assert len(placed) > 10
    assert len(set(placed)) == 1


def test_every_ordinary_token_has_the_same_chance() -> None:
    draw, times = np.random.default_rng(0), np.zeros(20)
    for _ in range(4000):
        masked = tiny_masking(0.15)(Segment(np.arange(20)), draw)
        assert masked is not None
        times[masked.masked] += 1
    assert all(binomtest(int(count), 4000, 3 / 20).pvalue > 1e-4 for count in times)


def shown(stream: PretrainStream, position: int) -> list[tuple[list[int], list[int], list[int]]]:
    found = []
    for segment in stream.item(position):
        assert segment.masked is not None
        assert segment.originals is not None
        found.append((segment.tokens.tolist(), segment.masked.tolist(), segment.originals.tolist()))
    return found


@settings(max_examples=30, deadline=None)
@given(position=st.integers(0, 10_000), seed=st.integers(0, 9))
def test_the_masks_of_a_position_are_always_the_same(text: Documents, position: int, seed: int) -> None:
    one, two = (PretrainStream(text, 32, seed, tiny_masking()) for _ in range(2))
    two.item(position + 3)
    assert shown(one, position) == shown(two, position)


def test_another_epoch_has_other_masks(text: Documents) -> None:
    stream, plain = PretrainStream(text, 32, 0, tiny_masking()), PretrainStream(text, 32, 0)
    epochs: list[dict[bytes, list[list[int]]]] = [{}, {}]
    for position in range(2 * len(stream)):
        # The text of a window, which says which one it is, and where it is masked.
        content = b"".join(segment.tokens.tobytes() for segment in plain.item(position))
        epochs[position // len(stream)][content] = [masked for _, masked, _ in shown(stream, position)]
    assert epochs[0].keys() == epochs[1].keys()
    same = sum(epochs[0][content] == epochs[1][content] for content in epochs[0])
    assert same < 0.1 * len(epochs[0])


@settings(max_examples=30, deadline=None)
@given(step=st.integers(0, 500), length=st.integers(8, 32), share=st.floats(0.2, 0.8), ranks=st.integers(1, 3))
def test_the_count_of_a_step_is_what_the_model_is_given(
    text: Documents, labelled: Documents, step: int, length: int, share: float, ranks: int
) -> None:
    stream = PretrainStream(text, length, 0, tiny_masking(0.2))
    data = make_mix(stream, FinetuneStream(labelled, 0, "multi_label"), 5, 32, share).step(step)
    predicted = examples = 0
    for rank in range(ranks):
        for rows in data.share(rank, ranks, 3):
            batch = collate(rows, 60)
            predicted += len(batch.lm_at)
            examples += len(batch.targets)
            assert batch.lm_pretrain.all()
            assert len(set(batch.lm_at.tolist())) == len(batch.lm_at)
    assert (predicted, examples) == (data.num_pretrain, data.num_finetune)
    assert predicted < data.tokens_pretrain


def test_a_tokenizer_without_a_mask_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.mask_token = None
    with pytest.raises(RefusedError, match=r"model\.objective: is masked_lm, but the tokenizer has no mask token"):
        Masking.of(tokenizer, 0.15)


def test_a_random_token_is_any_word_and_never_a_special_token() -> None:
    masking = Masking(mask_id=3, special_ids=(0, 3, 5, 9), vocabulary_size=10, probability=0.99)
    masked = masking(Segment(np.full(20_000, 7)), np.random.default_rng(0))
    assert masked is not None
    assert set(masked.tokens.tolist()) == {1, 2, 4, 6, 7, 8, masking.mask_id}
