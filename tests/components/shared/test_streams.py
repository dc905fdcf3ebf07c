"""What a step reads is a pure function of seed, step and stream; the counts are those of the whole optimizer step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtune.components.shared.data.prepared import Documents
from mixtune.components.shared.model.packing import width_of
from mixtune.components.shared.training.mix_weight import Sampled
from mixtune.components.shared.training.streams import (
    FinetuneStream,
    PretrainStream,
    SampledMix,
    StepData,
    make_mix,
)

from .tiny import write_data


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Documents:
    return Documents(write_data(tmp_path_factory.mktemp("text"), "pretrain", None, count=600), "train")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Documents:
    return Documents(write_data(tmp_path_factory.mktemp("labelled"), "finetune", "generation", count=17), "train")


def ids(data: StepData) -> list[list[list[int]]]:
    return [[segment.tokens.tolist() for segment in row] for row in data.rows]


@settings(max_examples=25, deadline=None)
@given(step=st.integers(0, 5000), seed=st.integers(0, 9))
def test_any_step_can_be_read_without_the_ones_before(
    text: Documents, labelled: Documents, step: int, seed: int
) -> None:
    def read() -> StepData:
        return make_mix(PretrainStream(text, 32, seed), FinetuneStream(labelled, seed, "generation"), 4, 32, 0.5).step(
            step
        )

    assert ids(read()) == ids(read())


def test_an_epoch_of_windows_holds_every_token_once(text: Documents) -> None:
    stream = PretrainStream(text, 16, seed=1)
    lengths = [sum(len(s.tokens) for s in stream.item(position)) for position in range(len(stream))]
    # Only a piece of one token is left out: it has nothing to be predicted from.
    assert len(text.flat) - len(stream) <= sum(lengths) <= len(text.flat)
    assert max(lengths) <= 16


def test_epochs_differ_and_each_holds_every_example_once(labelled: Documents) -> None:
    stream = FinetuneStream(labelled, seed=0, task="generation")
    epochs = [[stream.item(e * len(stream) + i)[0].key for i in range(len(stream))] for e in range(3)]
    assert all(sorted(epoch) == list(range(len(labelled))) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_segments_never_cross_a_document(text: Documents) -> None:
    stream = PretrainStream(text, 16, seed=0)
    for position in range(len(stream)):
        for segment in stream.item(position):
            whole = text.tokens(segment.key).tolist()
            piece = segment.tokens.tolist()
            assert any(whole[i : i + len(piece)] == piece for i in range(len(whole)))


@settings(max_examples=40, deadline=None)
@given(ranks=st.integers(1, 4), size=st.integers(1, 8), step=st.integers(0, 50))
def test_ranks_and_micro_batches_share_the_rows_without_loss(
    text: Documents, labelled: Documents, ranks: int, size: int, step: int
) -> None:
    data = make_mix(PretrainStream(text, 32, 0), FinetuneStream(labelled, 0, "generation"), 5, 32, 0.4).step(step)
    shares = [list(data.share(rank, ranks, size)) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1, "every rank takes part in as many backward passes"
    widest = max(width_of(row) for row in data.rows)
    assert all(len(batch) * widest <= size * 32 for share in shares for batch in share)
    supervised = {True: 0, False: 0}
    for share in shares:
        for segment in (s for batch in share for row in batch for s in row):
            supervised[segment.pretrain] += segment.num_supervised
    assert supervised == {True: data.num_pretrain, False: data.num_finetune}


@pytest.mark.parametrize("max_length", [32, 256])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_the_replay_share_is_kept_on_average(
    text: Documents, labelled: Documents, share: float, max_length: int
) -> None:
    chosen = make_mix(
        PretrainStream(text, max_length, 0), FinetuneStream(labelled, 0, "generation"), 16, max_length, share
    )
    steps = [chosen.step(i) for i in range(40)]
    pretrain = sum(s.tokens_pretrain for s in steps)
    assert pretrain / (pretrain + sum(s.tokens_finetune for s in steps)) == pytest.approx(share, abs=0.06)


@given(length=st.integers(8, 40))
def test_every_window_has_something_to_predict(text: Documents, length: int) -> None:
    stream = PretrainStream(text, length, 0)
    assert all(sum(s.num_supervised for s in stream.item(position)) > 0 for position in range(len(stream)))


def test_one_stream_alone_leaves_the_other_unread(text: Documents, labelled: Documents) -> None:
    only_text = make_mix(PretrainStream(text, 32, 0), None, 3, 32).step(0)
    only_labels = make_mix(None, FinetuneStream(labelled, 0, "generation"), 3, 32).step(0)
    assert only_text.num_finetune == only_labels.num_pretrain == 0
    assert len(only_text.rows) == 3
    assert only_labels.num_finetune > 0


def test_one_example_is_enough(tmp_path: Path) -> None:
    documents = Documents(write_data(tmp_path, "finetune", "classification", count=1), "train")
    data = make_mix(None, FinetuneStream(documents, 0, "classification"), 4, 32).step(3)
    assert data.num_finetune == 4
    assert np.all([segment.label >= 0 for row in data.rows for segment in row])


def test_streams_are_sampled_item_by_item(text: Documents, labelled: Documents) -> None:
    steps = 400
    mix = make_mix(PretrainStream(text, 32, 0), FinetuneStream(labelled, 0, "generation"), 6, 32, 0.4)
    sampled = SampledMix.of(mix, steps, seed=3)
    taken = [sampled.positions(step) for step in range(steps)]
    items = mix.num_windows + mix.num_examples
    assert all(len(windows) + len(examples) == items for windows, examples in taken)
    for stream in zip(*taken, strict=True):
        assert [position for one in stream for position in one] == list(range(sum(map(len, stream)))), (
            "none is left out"
        )
    windows = [len(one) for one, _ in taken]
    assert np.mean(windows) == pytest.approx(mix.num_windows, rel=0.1)
    share = mix.num_windows / items
    assert np.var(windows) == pytest.approx(items * share * (1 - share), rel=0.25), "as n draws with probability q"
    assert SampledMix.of(mix, steps, seed=3).positions(77) == taken[77]


def test_the_weights_of_sampled_streams_are_exact_in_expectation(text: Documents, labelled: Documents) -> None:
    mix = make_mix(PretrainStream(text, 32, 0), FinetuneStream(labelled, 0, "generation"), 6, 32, 0.4)
    sampled = SampledMix.of(mix, 400, seed=3)
    weight = Sampled(0.3, *sampled.mean_counts())
    data = [sampled.step(step) for step in range(400)]
    of_text, of_labels = weight.weights(0, 1, 1)
    assert of_text * np.mean([one.num_pretrain for one in data]) == pytest.approx(0.3, rel=0.05)
    assert of_labels * np.mean([one.num_finetune for one in data]) == pytest.approx(0.7, rel=0.05)
