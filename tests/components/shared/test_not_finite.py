"""A loss or a gradient that is not finite: the training stops with the weights from before, and names what it comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mixtune.components.shared.config import Task
from mixtune.components.shared.data.prepared import DataManifest, Document, Documents, write_split
from mixtune.components.shared.errors import MixtuneError
from mixtune.components.shared.model.mixed_model import MixedModel
from mixtune.components.shared.model.packing import Segment
from mixtune.components.shared.training.streams import Mix

from .tiny import VOCABULARY_SIZE, tiny_model, weight_of
from .trained import both, run, write_both

ODD = 56  # a token that stands in one document alone
STEPS = 4


def rewrite(folder: Path, chosen: int | None, place: int = 1) -> None:
    """Takes the odd token out of all documents of a split, and puts it into one."""
    old, manifest = Documents(folder, "train"), DataManifest.load(folder)
    documents = []
    for index, record in enumerate(old.records()):
        tokens = [55 if token == ODD else token for token in old.tokens(index).tolist()]
        if index == chosen:
            tokens[place] = ODD
        documents.append(
            Document(
                tokens, record, int(old.supervised_from[index]), int(old.labels[index]), old.targets[index].tolist(),
                int(old.second_from[index]),
            )
        )  # fmt: skip
    del old
    info = write_split(folder, "train", documents)
    manifest.model_copy(update={"splits": {**manifest.splits, "train": info}}).save(folder)


def prepare(folder: Path, task: Task, stream: str, place: int = 1) -> str:
    """Both streams, with the odd token in one document of one of them; gives what it is called."""
    write_both(folder, task, text=12, labels=12)
    for name in ("text", "labels"):
        rewrite(folder / name, 5 if name == stream else None, place)
    return "train-5 (random)"


def reading(what: Mix, steps: int = STEPS) -> tuple[int, list[Segment]]:
    """The first step in which the odd token is read, and what is packed into the same row."""
    for step in range(steps):
        for row in what.step(step).rows:
            if any(ODD in segment.tokens for segment in row):
                return step, row
    raise AssertionError("it is not read at all; choose another seed")


def odd_model(architecture: str, task: Task) -> MixedModel:
    """One in which nothing but the odd token has an infinite embedding."""
    model = tiny_model(architecture, task=task)
    with torch.no_grad():
        embedding = weight_of(model.lm.get_input_embeddings(), "weight")
        assert embedding.shape[0] == VOCABULARY_SIZE
        embedding[ODD, 0] = float("inf")
    return model


@pytest.mark.parametrize(
    ("architecture", "task", "weight", "stream"),
    [
        ("llama", "classification", 0.3, "text"),
        ("llama", "classification", 0.3, "labels"),
        ("qwen2", "generation", 0.3, "labels"),
        ("qwen2", "generation", 0.3, "text"),
        ("llama", "regression", 1.0, "text"),
        ("bert", "multi_label", 0.0, "labels"),
        ("roberta", "question_answering", 0.0, "labels"),
    ],
)
def test_the_document_is_named_and_its_packed_neighbours_are_not(
    tmp_path: Path, architecture: str, task: Task, weight: float, stream: str
) -> None:
    name = prepare(tmp_path, task, stream)
    step, row = reading(both(tmp_path, task, weight, batch_size=5))
    assert len(row) > 1, "there are neighbours"
    options: dict[str, Any] = {"schedule": "constant", "micro_batch_size": 2, "learning_rate": 1e-3}
    model = odd_model(architecture, task)
    with pytest.raises(MixtuneError) as raised:
        run(tmp_path, task, architecture, weight, model=model, batch_size=5, steps=STEPS, **options)
    (sentence,) = raised.value.problems
    called = {"text": "pretraining", "labels": "fine-tuning"}[stream]
    assert f"step {step + 1}: the loss of the {called} stream (the documents: {name}) is not finite" in sentence
    assert sentence.count("train-") == 1
    assert sentence.count("stream") == 1
    unharmed = odd_model(architecture, task)
    if step:
        run(tmp_path, task, architecture, weight, model=unharmed, batch_size=5, steps=step, **options)
    wanted = dict(unharmed.named_parameters())
    for parameter, value in model.named_parameters():
        assert torch.equal(value, wanted[parameter]), "the weights are those before the step"
        assert value.grad is None


@pytest.mark.parametrize("stream", ["text", "labels"])
def test_a_gradient_that_is_not_finite_is_told_from_a_loss(tmp_path: Path, stream: str) -> None:
    """An embedding so large that its square overflows: normalised it is zero, which is finite, but its derivative is not."""
    name = prepare(tmp_path, "generation", stream)
    step, _ = reading(both(tmp_path, "generation", batch_size=5))
    model = tiny_model()
    with torch.no_grad():
        weight_of(model.lm.get_input_embeddings(), "weight")[ODD] = 3e38
        weight_of(model.lm.base_model, "norm.weight").fill_(1e4)
    with pytest.raises(MixtuneError) as raised:
        run(tmp_path, "generation", model=model, batch_size=5, steps=STEPS)
    called = {"text": "pretraining", "labels": "fine-tuning"}[stream]
    assert f"step {step + 1}: the gradient of the {called} stream (the documents: {name})" in str(raised.value)


def test_where_everything_is_wrong_all_documents_are_said(tmp_path: Path) -> None:
    write_both(tmp_path, "classification")
    model = tiny_model(task="classification")
    with torch.no_grad():
        weight_of(model.lm.base_model, "norm.weight")[0] = float("nan")
    with pytest.raises(MixtuneError) as raised:
        run(tmp_path, model=model)
    sentence = str(raised.value)
    assert "the pretraining stream (all its documents: " in sentence
    assert "and of the fine-tuning stream (all its documents: " in sentence
    assert " more) is not finite" in sentence
    assert raised.value.kind == "failed"


def test_in_bf16_it_is_found_too(tmp_path: Path) -> None:
    name = prepare(tmp_path, "classification", "labels")
    with pytest.raises(MixtuneError, match=r"step \d: the loss of the fine-tuning stream") as raised:
        run(tmp_path, model=odd_model("llama", "classification"), precision="bf16", steps=STEPS, batch_size=5)
    assert name in str(raised.value)
