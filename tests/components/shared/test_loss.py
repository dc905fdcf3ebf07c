"""The mixed loss: gradients against a naive float64 reference, however a global batch is split."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtune.components.shared.model import MixedModel
from mixtune.components.shared.packing import Segment, collate, pack
from mixtune.components.shared.streams import StepData

from .tiny import ARCHITECTURES, random_documents, tiny_model

Gradients = dict[str, torch.Tensor]


def reference(model: MixedModel, pretrain: list[Segment], finetune: list[Segment], weight: float) -> Gradients:
    """λ · mean(ce over pretraining tokens) + (1 - λ) · mean(ce over labels), one document at a time, by transformers."""
    model.zero_grad()
    losses: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    for segment in [*pretrain, *finetune]:
        ids = torch.from_numpy(np.asarray(segment.tokens))[None]
        if segment.label >= 0:
            assert model.head is not None
            last = model.lm.base_model(input_ids=ids).last_hidden_state[0, -1]
            losses[False].append(F.cross_entropy(model.head(last)[None], torch.tensor([segment.label])))
        else:
            logits = model.lm(input_ids=ids).logits[0]
            ce = F.cross_entropy(logits[:-1], ids[0, 1:], reduction="none")
            losses[segment.pretrain].extend(ce[segment.supervised_from - 1 :])
    total = torch.zeros((), dtype=torch.float64)
    if losses[True]:
        total = total + weight * torch.stack(losses[True]).mean()
    if losses[False]:
        total = total + (1 - weight) * torch.stack(losses[False]).mean()
    torch.autograd.backward(total)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def ours(
    model: MixedModel,
    pretrain: list[Segment],
    finetune: list[Segment],
    weight: float,
    size: int,
    packed: bool,
    ranks: int,
) -> Gradients:
    """The engine's weights, rows and micro-batches; several ranks one after the other, averaged as DDP averages."""
    model.zero_grad()
    segments = [*pretrain, *finetune]
    rows = pack([len(s.tokens) for s in segments], 40) if packed else [[i] for i in range(len(segments))]
    data = StepData(
        rows=[[segments[i] for i in row] for row in rows],
        num_pretrain=sum(s.num_supervised for s in pretrain),
        num_finetune=sum(1 if s.label >= 0 else s.num_supervised for s in finetune),
        tokens_pretrain=0,
        tokens_finetune=0,
    )
    for rank in range(ranks):
        for rows_of_one in data.share(rank, ranks, size):
            batch = collate(rows_of_one, pad_id=0)
            losses = model(batch, weight / max(data.num_pretrain, 1), (1 - weight) / max(data.num_finetune, 1))
            (losses["weighted"] * ranks).backward()
    return {name: p.grad / ranks for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(found: Gradients, wanted: Gradients, tolerance: float) -> None:
    for name, gradient in wanted.items():
        error = torch.linalg.vector_norm(found[name].double() - gradient.double())
        assert error <= tolerance * max(float(torch.linalg.vector_norm(gradient.double())), 1e-9), name


def make_segments(
    seed: int, num_pretrain: int, num_finetune: int, classify: bool
) -> tuple[list[Segment], list[Segment]]:
    documents = random_documents(num_pretrain + num_finetune, seed, low=4)
    pretrain = [Segment(tokens, 1, pretrain=True) for tokens in documents[:num_pretrain]]
    finetune = [
        Segment(tokens, len(tokens), label=int(tokens[0]) % 3) if classify else Segment(tokens, 1 + int(tokens[0]) % 3)
        for tokens in documents[num_pretrain:]
    ]
    return pretrain, finetune


@settings(max_examples=40, deadline=None)
@given(
    architecture=st.sampled_from(ARCHITECTURES),
    classify=st.booleans(),
    seed=st.integers(0, 1000),
    num_pretrain=st.integers(1, 6),
    num_finetune=st.integers(1, 6),
    weight=st.floats(0, 1),
    size=st.integers(1, 8),
    packed=st.booleans(),
    ranks=st.integers(1, 2),
)
def test_gradient_is_the_formulas_however_the_batch_is_split(
    architecture: str, classify: bool, seed: int, num_pretrain: int, num_finetune: int,
    weight: float, size: int, packed: bool, ranks: int,
) -> None:  # fmt: skip
    model = tiny_model(architecture, ["a", "b", "c"] if classify else None, seed).double()
    pretrain, finetune = make_segments(seed, num_pretrain, num_finetune, classify)
    wanted = reference(model, pretrain, finetune, weight)
    assert_equal(ours(model, pretrain, finetune, weight, size, packed, ranks), wanted, 1e-12)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_attention_never_crosses_a_document(architecture: str) -> None:
    model = tiny_model(architecture).eval()
    first, second, other = random_documents(3, 5, low=8)
    with torch.no_grad():
        losses = []
        for neighbour in (first, other):
            batch = collate([[Segment(neighbour, 1, key=0), Segment(second, 1, key=1)]], pad_id=0)
            logits = model.lm_logits(model.hidden(batch)[batch.lm_at])
            ce = F.cross_entropy(logits, batch.lm_target, reduction="none")
            losses.append(ce[batch.lm_key == 1])
        alone = model.lm(input_ids=torch.from_numpy(second)[None]).logits[0]
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(
        losses[0], F.cross_entropy(alone[:-1], torch.from_numpy(second[1:]), reduction="none"), rtol=1e-4, atol=1e-5
    )


def test_weight_zero_and_one_are_plain_fine_tuning_and_plain_pretraining() -> None:
    model = tiny_model().double()
    pretrain, finetune = make_segments(3, 4, 4, classify=False)
    assert_equal(ours(model, [], finetune, 0.0, 2, True, 1), reference(model, [], finetune, 0.0), 1e-12)
    assert_equal(ours(model, pretrain, [], 1.0, 2, True, 1), reference(model, pretrain, [], 1.0), 1e-12)


@given(lengths=st.lists(st.integers(1, 50), max_size=60))
def test_packing_keeps_every_item_once_and_within_capacity(lengths: list[int]) -> None:
    rows = pack(lengths, 50)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in row) <= 50 for row in rows)
    assert len(rows) <= -(-sum(lengths) // 50) * 2


def test_packing_refuses_what_fits_in_no_row() -> None:
    with pytest.raises(ValueError, match="51 tokens"):
        pack([51], 50)


@given(seed=st.integers(0, 99), count=st.integers(1, 9))
def test_supervised_tokens_are_counted_after_the_label_shift(seed: int, count: int) -> None:
    pretrain, finetune = make_segments(seed, count, count, classify=False)
    batch = collate([[*pretrain, *finetune]], pad_id=0)
    assert int(batch.lm_pretrain.sum()) == sum(s.num_supervised for s in pretrain)
    assert int((~batch.lm_pretrain).sum()) == sum(s.num_supervised for s in finetune)
    assert (batch.input_ids.flatten()[batch.lm_at + 1] == batch.lm_target).all()
