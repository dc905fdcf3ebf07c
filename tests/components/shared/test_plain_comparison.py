"""A trained model and plain transformers on the saved one say the same, whatever token a text ends in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import processors
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from mixtune.components.evaluate.likelihood import batches, example_segments, head_logits
from mixtune.components.shared.config import Task
from mixtune.components.shared.data.prepared import DataManifest, Document, Documents, write_split
from mixtune.components.shared.errors import RefusedError
from mixtune.components.shared.model.loading import load_model
from mixtune.components.shared.model.tokenizer import load_tokenizer
from mixtune.components.shared.running.context import Context
from mixtune.components.shared.training.plain_comparison import chosen_examples, compare_with_transformers
from mixtune.components.shared.training.streams import FinetuneStream
from tests.components.stages import Stages

from .test_loss import PAIRS
from .tiny import ENCODERS, SPECIAL, VOCABULARY_SIZE, random_documents, targets_of, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.numeric

EOS, PAD = SPECIAL["</s>"], SPECIAL["<pad>"]


def write_examples(folder: Path, task: Task, endings: list[list[int]], count: int = 24) -> Path:
    """Labelled examples in all splits; the i-th ends in the tokens `endings[i % len(endings)]`."""
    splits: dict[Any, Any] = {}
    for number, split in enumerate(("train", "dev", "test")):
        documents = []
        for index, tokens in enumerate(random_documents(count, 3 + number)):
            label = int(tokens[0]) % 2 if task == "classification" else -1
            documents.append(
                Document(
                    tokens=[*tokens.tolist(), *endings[index % len(endings)]],
                    record={"id": f"{split}-{index}", "source": "random", "bytes": 9, "text": "a text"},
                    supervised_from=2 if task == "generation" else 1,
                    label=label,
                    targets=targets_of(task, tokens),
                    second_from=len(tokens) // 2 if task == "question_answering" else -1,
                )
            )
        splits[split] = write_split(folder, split, documents)  # type: ignore[arg-type]
    labels = ["no", "yes"] if task == "classification" else None
    DataManifest(
        stream="finetune", task=task, labels=labels, max_length=32, vocabulary_size=VOCABULARY_SIZE, source="random",
        splits=splits,
    ).save(folder)  # fmt: skip
    return folder


def without_padding(append_eos: bool = True) -> Any:
    """A tokenizer as many Llamas have it: EOS behind every text, no padding token."""
    tokenizer: Any = tiny_tokenizer()
    tokenizer.pad_token = None
    if append_eos:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", EOS)]
        )
    return tokenizer


def test_a_head_is_trained_on_the_token_that_transformers_reads(tmp_path: Path) -> None:
    """Padding is EOS here, so transformers skips the EOS at the end of every text."""
    stages = Stages(tmp_path)
    stages.pretrain()
    without_padding().save_pretrained(tmp_path / "pretrained")
    examples = write_examples(tmp_path / "labels", "classification", [[EOS]])
    folder = stages.finetune(steps=30)
    model, tokenizer = load_model(folder).eval(), load_tokenizer(folder)
    model.precision = "float32"
    assert tokenizer.pad_token_id == EOS
    documents = Documents(examples, "dev")
    work = batches(example_segments(documents, with_head=True), 32, 4)
    ours = head_logits(model, work, EOS, Context.for_tests().progress(1, "batches"))
    plain = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    given = AutoTokenizer.from_pretrained(folder)(
        [" ".join(f"w{token}" for token in documents.tokens(i)[:-1]) for i in range(len(documents))],
        padding=True, return_tensors="pt", return_token_type_ids=False,
    )  # fmt: skip
    assert int(given["input_ids"][0, len(documents.tokens(0)) - 1]) == EOS
    with torch.no_grad():
        theirs = plain(**given).logits.numpy()
    wanted = np.stack([ours[i] for i in range(len(documents))])
    np.testing.assert_allclose(wanted, theirs, rtol=1e-3, atol=1e-4)
    right = [int(row.argmax()) == int(label) for row, label in zip(theirs, documents.labels, strict=True)]
    assert np.mean(right) == np.mean(wanted.argmax(-1) == documents.labels)


@pytest.mark.parametrize(("architecture", "task"), PAIRS, ids=lambda value: str(value))
@pytest.mark.parametrize("side", ["left", "right"])
def test_texts_that_hold_the_padding_token_are_read_alike(
    tmp_path: Path, architecture: str, task: Task, side: str
) -> None:
    """At the end, in the middle, and behind each other; alone and beside longer ones."""
    examples = write_examples(tmp_path / "labels", task, [[], [PAD], [3, PAD, PAD], [PAD, 4]])
    tokenizer: Any = tiny_tokenizer(ends=architecture in ENCODERS)
    tokenizer.padding_side = side
    model = tiny_model(architecture, task=task)
    if task == "classification":
        model.add_head(task, ["no", "yes"], 0)
    model.save(tmp_path / "model", tokenizer)
    saved = AutoTokenizer.from_pretrained(tmp_path / "model") if architecture != "qwen2" else tokenizer
    assert task == "generation" or saved.padding_side == "right"
    stream = FinetuneStream(Documents(examples, "train"), 0, task)
    assert any(segment.tokens[-1] == PAD for segment in chosen_examples(stream, PAD))
    compare_with_transformers(model, tmp_path / "model", tokenizer, stream)


@pytest.mark.parametrize("change", ["padding", "weights", "language model"])
def test_a_saved_model_that_answers_differently_is_refused(tmp_path: Path, change: str) -> None:
    task: Task = "generation" if change == "language model" else "classification"
    examples = write_examples(tmp_path / "labels", task, [[5], []])
    model = tiny_model("llama", labels=None if task == "generation" else ["no", "yes"])
    model.save(tmp_path / "model", tiny_tokenizer())
    if change == "padding":
        config = tmp_path / "model" / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"pad_token_id": 5}))
    else:
        changed: Any = model.lm if task == "generation" else model.task
        changed.get_parameter("lm_head.weight" if task == "generation" else "score.weight").data.mul_(1.5)
    stream = FinetuneStream(Documents(examples, "train"), 0, task)
    with pytest.raises(RefusedError, match=r"transformers' Llama\w+ gives other outputs .* read alone: they"):
        compare_with_transformers(model, tmp_path / "model", tiny_tokenizer(), stream)
