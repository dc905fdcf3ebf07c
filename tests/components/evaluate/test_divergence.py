"""KL(pretrained ‖ candidate) on the task's inputs, against plain transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from mixtune.components.evaluate import divergence
from mixtune.components.evaluate.windows import mask, mask_passes
from mixtune.components.shared.data.prepared import Documents

from .made import LABELS, MASK, WORDS, evaluate, write_labelled, write_model

pytestmark = pytest.mark.numeric


@pytest.fixture(autouse=True)
def _float32(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("shared.model.precision", "evaluate.divergence", "evaluate.measuring"):
        monkeypatch.setattr(f"mixtune.components.{module}.pick_precision", lambda precision: "float32")


def rows(folder: Path, candidate: str) -> dict[str, dict[str, Any]]:
    lines = (folder / candidate / "dev.kl.jsonl").read_text().splitlines()
    return {row["id"]: row for row in map(json.loads, lines)}


@torch.no_grad()
def naive(before: Any, after: Any, ids: list[int], at: Any, **given: Any) -> float:
    """Sum of the divergences of the distributions at some positions, in float64."""
    p, q = (
        model(input_ids=torch.tensor(ids)[None], **given).logits[0].double().log_softmax(-1)
        for model in (before, after)
    )
    return float((p.exp() * (p - q)).sum(-1)[at].sum())


@pytest.mark.parametrize("task", ["classification", "generation"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_divergence_of_a_causal_model(tmp_path: Path, task: Any, architecture: str) -> None:
    start = write_model(tmp_path / "start", "pretrained", "pretrained", seed=1, architecture=architecture)
    labels = LABELS if task == "classification" else None
    tuned = write_model(tmp_path / "tuned", "finetuned", "finetuned", labels, 2, architecture, task)
    labelled = write_labelled(tmp_path / "labelled", task)
    found, folder = evaluate(tmp_path, tuned, labelled, pretrained=start)
    before, after = (AutoModelForCausalLM.from_pretrained(model.path).eval() for model in (start, tuned))
    examples = Documents(tmp_path / "labelled", "dev")
    measured = rows(folder, "finetuned")
    assert len(measured) == len(examples)
    for index, record in enumerate(examples.records()):
        ids = examples.tokens(index).tolist()
        # The distributions at the prompt's tokens; without a task head the last is that of the answer's first token.
        size = len(ids) - 1 if task == "classification" else int(examples.supervised_from[index])
        row = measured[record["id"]]
        assert row["tokens"] == size
        assert row["nats"] == pytest.approx(naive(before, after, ids, slice(0, size)), rel=1e-4)
    mean = sum(row["nats"] for row in measured.values()) / sum(row["tokens"] for row in measured.values())
    assert found["candidates"][0]["kl_from_pretrained"] == pytest.approx(mean)
    assert mean > 0.01


def test_divergence_of_an_encoder_is_that_of_the_masked_tokens(tmp_path: Path) -> None:
    start = write_model(tmp_path / "start", "pretrained", "pretrained", seed=1, architecture="bert")
    tuned = write_model(tmp_path / "tuned", "finetuned", "finetuned", LABELS, 2, "bert")
    _, folder = evaluate(tmp_path, tuned, write_labelled(tmp_path / "labelled"), pretrained=start)
    before, after = (AutoModelForMaskedLM.from_pretrained(model.path).eval() for model in (start, tuned))
    examples = Documents(tmp_path / "labelled", "dev")
    measured = rows(folder, "finetuned")
    for index, record in enumerate(examples.records()):
        ids = np.array(examples.tokens(index))
        at = mask(np.flatnonzero(ids < WORDS), mask_passes(0.15), index, 0, 0)
        ids[at] = MASK
        row = measured[record["id"]]
        assert row["tokens"] == len(at) > 0
        assert row["nats"] == pytest.approx(naive(before, after, ids.tolist(), at), rel=1e-4)


def test_interpolations_are_between_the_ends_and_the_pretrained_model_has_none(tmp_path: Path) -> None:
    start = write_model(tmp_path / "start", "pretrained", "pretrained", seed=1)
    tuned = write_model(tmp_path / "tuned", "finetuned", "finetuned", LABELS, seed=2)
    labelled = write_labelled(tmp_path / "labelled")
    found, _ = evaluate(tmp_path, start, labelled, tuned, interpolation_alphas=[0.001, 0.5, 0.999])
    near, middle, far = (one["kl_from_pretrained"] for one in found["candidates"])
    assert 0 <= near < 1e-4 < middle < far
    alone, folder = evaluate(tmp_path, start, labelled)
    assert alone["candidates"][0]["kl_from_pretrained"] is None
    assert not (folder / "pretrained" / "dev.kl.jsonl").exists()
    without, _ = evaluate(tmp_path, tuned, labelled)
    assert without["candidates"][0]["kl_from_pretrained"] is None


@pytest.mark.parametrize("at_most", ["MOST_TOKENS", "max_tokens"])
def test_a_sample_is_read_that_is_the_same_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_most: str
) -> None:
    options: dict[str, Any] = {}
    if at_most == "MOST_TOKENS":
        monkeypatch.setattr(divergence, "MOST_TOKENS", 40)
    else:
        options["max_tokens"] = 40
    start = write_model(tmp_path / "start", "pretrained", "pretrained", seed=1)
    labelled = write_labelled(tmp_path / "labelled")
    read = []
    for seed in (2, 3):
        tuned = write_model(tmp_path / f"tuned-{seed}", "finetuned", "finetuned", LABELS, seed)
        _, folder = evaluate(tmp_path, tuned, labelled, pretrained=start, **options)
        read.append({name: row["tokens"] for name, row in rows(folder, "finetuned").items()})
    assert read[0] == read[1]
    assert 1 <= len(read[0]) < 11
    assert sum(read[0].values()) <= 40
