"""The mixed loss: gradients against a naive float64 reference, however a global batch is split."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from transformers import AttentionInterface

from mixtune.components.shared.config import Task
from mixtune.components.shared.errors import RefusedError
from mixtune.components.shared.model.checks import check_model
from mixtune.components.shared.model.heads import instead_of_backbone
from mixtune.components.shared.model.loading import load_model
from mixtune.components.shared.model.mixed_model import MixedModel
from mixtune.components.shared.model.packing import Segment, collate, pack, width_of
from mixtune.components.shared.training.mix_weight import split
from mixtune.components.shared.training.streams import StepData

from .compared import assert_close
from .tiny import ARCHITECTURES, ENCODERS, random_documents, targets_of, tiny_masking, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.numeric

Gradients = dict[str, torch.Tensor]
TASKS: tuple[Task, ...] = ("generation", "classification", "multi_label", "regression", "question_answering")


def tasks_of(architecture: str) -> list[Task]:
    """What transformers has a head for, and can keep in one folder with the language model."""
    if architecture in ENCODERS:
        return [task for task in TASKS if task != "generation"]
    return [task for task in TASKS if task != "question_answering" or architecture == "gpt2"]


PAIRS = [(architecture, task) for architecture in (*ARCHITECTURES, *ENCODERS) for task in tasks_of(architecture)]


@dataclass
class Streams:
    """Segments of both streams, the text masked where the model is an encoder."""

    pretrain: list[Segment]
    finetune: list[Segment]

    @property
    def all(self) -> list[Segment]:
        return [*self.pretrain, *self.finetune]

    def data(self, packed: bool) -> StepData:
        """An optimizer step of them."""
        rows = pack([len(s.tokens) for s in self.all], 40) if packed else [[i] for i in range(len(self.all))]
        packed_rows = [[self.all[i] for i in row] for row in rows]
        return StepData(
            rows=packed_rows,
            num_pretrain=sum(s.num_supervised for s in self.pretrain),
            num_finetune=sum(1 if s.labelled else s.num_supervised for s in self.finetune),
            tokens_pretrain=0,
            tokens_finetune=0,
            max_length=max(map(width_of, packed_rows)),  # so that micro-batches are of as many rows as asked for
            sum_finetune=sum(s.weight * (1 if s.labelled else s.num_supervised) for s in self.finetune),
        )

    def weighted(self, seed: int) -> Streams:
        """The same, with a random weight for each example."""
        draw = np.random.default_rng(seed)
        return Streams(self.pretrain, [replace(one, weight=float(draw.uniform(0.05, 3))) for one in self.finetune])


def make_streams(seed: int, num_pretrain: int, num_finetune: int, architecture: str, task: Task) -> Streams:
    documents = random_documents(num_pretrain + num_finetune, seed, low=4)
    pretrain = [Segment(tokens, 1, pretrain=True) for tokens in documents[:num_pretrain]]
    if architecture in ENCODERS:
        draw = np.random.default_rng(seed)
        pretrain = [masked for one in pretrain if (masked := tiny_masking()(one, draw)) is not None]
    finetune = []
    for tokens in documents[num_pretrain:]:
        if task == "generation":
            finetune.append(Segment(tokens, 1 + int(tokens[0]) % 3))
        else:
            label = int(tokens[0]) % 3 if task == "classification" else -1
            second = len(tokens) // 2 if task == "question_answering" else -1
            finetune.append(Segment(tokens, len(tokens), label, targets=targets_of(task, tokens), second_from=second))
    return Streams(pretrain, finetune)


def language_loss(model: MixedModel, segment: Segment) -> list[torch.Tensor]:
    """Cross-entropy of each supervised token, from transformers' own forward pass over the document alone."""
    ids = torch.from_numpy(np.asarray(segment.tokens))[None]
    logits = model.lm(input_ids=ids).logits[0]
    if segment.masked is not None:
        return list(F.cross_entropy(logits[segment.masked], torch.tensor(segment.originals), reduction="none"))
    return list(F.cross_entropy(logits[:-1], ids[0, 1:], reduction="none")[segment.supervised_from - 1 :])


def task_loss(model: MixedModel, segment: Segment) -> torch.Tensor:
    """The loss that transformers' own task class gives for the example alone."""
    assert model.task is not None
    ids = torch.from_numpy(np.asarray(segment.tokens))[None]
    given: dict[str, Any] = {"input_ids": ids}
    if model.kind == "question_answering":
        start, end = (torch.tensor([int(target)]) for target in segment.targets)
        given |= {"start_positions": start, "end_positions": end}
        if model.takes_token_types and model.objective == "masked_lm":
            types = torch.zeros_like(ids)
            types[:, segment.second_from :] = 1
            given["token_type_ids"] = types
    elif model.kind == "classification":
        given["labels"] = torch.tensor([segment.label])
    else:
        given["labels"] = torch.tensor([segment.targets], dtype=next(model.parameters()).dtype)
    with instead_of_backbone(model.task, model.lm.base_model):
        loss: torch.Tensor = model.task(**given).loss
    return loss


def reference(model: MixedModel, streams: Streams, weight: float) -> Gradients:
    """λ · mean(ce over text) + (1 - λ) · weighted mean(loss over labels), one document at a time, by transformers."""
    model.zero_grad()
    losses: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    counts = {True: 0.0, False: 0.0}
    for segment in streams.all:
        found = [task_loss(model, segment)] if segment.labelled else language_loss(model, segment)
        losses[segment.pretrain] += [segment.weight * loss for loss in found]
        counts[segment.pretrain] += segment.weight * len(found)
    total = torch.zeros((), dtype=next(model.parameters()).dtype)
    if losses[True]:
        total = total + weight * torch.stack(losses[True]).sum() / counts[True]
    if losses[False]:
        total = total + (1 - weight) * torch.stack(losses[False]).sum() / counts[False]
    torch.autograd.backward(total)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def ours(model: MixedModel, streams: Streams, weight: float, size: int, packed: bool, ranks: int) -> Gradients:
    """The engine's weights, rows and micro-batches; several ranks one after the other, averaged as DDP averages."""
    model.zero_grad()
    data = streams.data(packed)
    weights = split(weight, data.num_pretrain, data.sum_finetune)
    for rank in range(ranks):
        for rows in data.share(rank, ranks, size):
            losses = model(collate(rows, pad_id=60).to(model.device), *weights)
            (losses["weighted"] * ranks).backward()
    return {name: p.grad / ranks for name, p in model.named_parameters() if p.grad is not None}


@settings(max_examples=60, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    pair=st.sampled_from(PAIRS),
    seed=st.integers(0, 1000),
    num_pretrain=st.integers(0, 6),
    num_finetune=st.integers(0, 6),
    # A tiny one would make gradients that no float32 can hold, which Llama's norms compute in, also here.
    weight=st.just(0.0) | st.floats(1e-6, 1),
    size=st.integers(1, 8),
    packed=st.booleans(),
    ranks=st.integers(1, 2),
    weighted=st.booleans(),
)
def test_gradient_is_the_formulas_however_the_batch_is_split(
    pair: tuple[str, Task], seed: int, num_pretrain: int, num_finetune: int, weight: float, size: int, packed: bool,
    ranks: int, weighted: bool,
) -> None:  # fmt: skip
    architecture, task = pair
    if not num_pretrain + num_finetune:
        num_pretrain = 1
    model = tiny_model(architecture, task=task, seed=seed).double()
    streams = make_streams(seed, num_pretrain, num_finetune, architecture, task)
    if weighted:
        streams = streams.weighted(seed)
    wanted = reference(model, streams, weight)
    assert_close(ours(model, streams, weight, size, packed, ranks), wanted, 1e-12)


@pytest.mark.parametrize(("architecture", "task"), PAIRS)
def test_in_float32_the_error_is_rounding(architecture: str, task: Task) -> None:
    model = tiny_model(architecture, task=task, seed=5)
    streams = make_streams(5, 6, 6, architecture, task)
    found = ours(model, streams, 0.3, 3, True, 2)
    assert_close(found, reference(model.double(), streams, 0.3), 1e-5)


@pytest.mark.parametrize(("architecture", "task"), PAIRS)
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_weight_zero_and_one_are_transformers_own_loss(architecture: str, task: Task, weight: float) -> None:
    model = tiny_model(architecture, task=task, seed=3).double()
    both = make_streams(3, 4, 4, architecture, task)
    alone = Streams(both.pretrain, []) if weight == 1 else Streams([], both.finetune)
    assert_close(ours(model, alone, weight, 2, True, 1), reference(model, alone, weight), 1e-12)
    data = alone.data(packed=True)
    losses = model(collate(data.rows, 60), *split(weight, data.num_pretrain, data.num_finetune))
    per_example = [
        loss for s in alone.all for loss in ([task_loss(model, s)] if s.labelled else language_loss(model, s))
    ]
    torch.testing.assert_close(losses["weighted"], torch.stack(per_example).mean(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *ENCODERS])
def test_attention_never_crosses_a_document(architecture: str, attention: str) -> None:
    model = tiny_model(architecture, attention=attention).eval()
    assert model.config._attn_implementation == attention
    first, second, other = random_documents(3, 5, low=10)
    with torch.no_grad():
        found = []
        for neighbour in (first, other):
            for row in ([neighbour, second], [second, neighbour]):
                segments = [Segment(tokens, 1, key=int(tokens is second)) for tokens in row]
                batch = collate([segments, [Segment(first)]], pad_id=60)
                at = batch.lm_at[batch.lm_key == 1]
                found.append(model.lm_logits(model.hidden(batch)[at]))
        alone = model.lm(input_ids=torch.from_numpy(second)[None]).logits[0, :-1]
    assert len(second) > 8, "longer than ModernBERT's local attention here"
    for logits in found:
        torch.testing.assert_close(logits, alone, rtol=1e-4, atol=1e-5)


def varlen_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int = 0,
    **given: Any,
) -> tuple[torch.Tensor, None]:
    """What FlashAttention's kernels for sequences of different lengths compute: each of the flat pieces by itself."""
    assert attention_mask is None
    rows, heads, width, size = query.shape
    ends = list(range(0, rows * width + 1, width))
    if cu_seq_lens_q is not None:
        assert max_length_q == int(cu_seq_lens_q.diff().max())
        ends = cu_seq_lens_q.tolist()
    key, value = (one.repeat_interleave(heads // one.shape[1], dim=1) for one in (key, value))
    q, k, v = (one.transpose(0, 1).reshape(heads, rows * width, size) for one in (query, key, value))
    pieces = [
        F.scaled_dot_product_attention(q[:, a:b], k[:, a:b], v[:, a:b], is_causal=True, scale=scaling)
        for a, b in pairwise(ends)
    ]
    return torch.cat(pieces, dim=1).view(heads, rows, width, size).permute(1, 2, 0, 3).contiguous(), None


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_for_flat_sequences_get_the_boundaries_of_the_documents(architecture: str) -> None:
    AttentionInterface.register("varlen_of_the_tests", varlen_attention)
    model = tiny_model(architecture, task="generation").double()
    streams = make_streams(4, 5, 5, architecture, "generation")
    wanted = ours(model, streams, 0.3, 3, True, 1)
    model.lm.set_attn_implementation("varlen_of_the_tests")
    assert_close(ours(model, streams, 0.3, 3, True, 1), wanted, 1e-12)
    check_model(model, "it")

    def deaf(*given: Any, cu_seq_lens_q: object = None, max_length_q: object = None, **named: Any) -> Any:
        return varlen_attention(*given, **named)

    AttentionInterface.register("varlen_of_the_tests", deaf)
    with pytest.raises(RefusedError, match="packed documents see each other"):
        check_model(model, "it")


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
    streams = make_streams(seed, count, count, "llama", "generation")
    batch = collate([streams.all], pad_id=60)
    assert int(batch.lm_pretrain.sum()) == sum(s.num_supervised for s in streams.pretrain)
    assert int((~batch.lm_pretrain).sum()) == sum(s.num_supervised for s in streams.finetune)
    assert (batch.input_ids.flatten()[batch.lm_at + 1] == batch.lm_target).all()


def test_a_padding_token_that_is_also_eos_has_its_gradient(tmp_path: Path) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    model.config.pad_token_id = None
    tokenizer.pad_token = tokenizer.eos_token
    model.save(tmp_path, tokenizer)
    again = load_model(tmp_path)
    eos = int(tokenizer.eos_token_id)
    losses = again(collate([[Segment(np.array([1, eos, 2]), 1, pretrain=True)]], eos), 1.0, 0.0)
    losses["weighted"].backward()
    gradient = dict(again.named_parameters())["lm.model.embed_tokens.weight"].grad
    assert gradient is not None
    assert float(gradient[eos].abs().sum()) > 0
