"""Small models and held-out data on disk, and a run of `evaluate` over them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mixtune.components.evaluate.config import EvaluateStep
from mixtune.components.evaluate.step import run
from mixtune.components.shared.artifacts import Artifact, Kind, ModelCard, write_jsonl
from mixtune.components.shared.config import Task
from mixtune.components.shared.data.prepared import DataManifest, Document, write_split
from mixtune.components.shared.running.context import Context
from mixtune.components.shared.task_kinds import Metric

from ..shared.tiny import ENCODERS, SPECIAL, VOCABULARY_SIZE, tiny_model, tiny_tokenizer

LABELS = ["no", "perhaps", "yes"]
MAX_LENGTH = 16
FIRST, LAST, MASK = (SPECIAL[token] for token in ("<s>", "</s>", "<mask>"))
"""Tokens at the ends of a text, and what stands in for a masked one."""
WORDS = min(SPECIAL.values())
METRIC: dict[str, Metric] = {
    "classification": "accuracy",
    "multi_label": "micro_f1",
    "regression": "pearson",
    "question_answering": "exact_match",
    "generation": "exact_match",
}


def write_model(
    folder: Path,
    name: str,
    kind: Kind,
    labels: list[str] | None = None,
    seed: int = 0,
    architecture: str = "llama",
    task: Task = "classification",
) -> Artifact:
    """A model folder; with a head for the task, unless it is `pretrained` or has a classification task and no labels."""
    network = tiny_model(architecture, seed=seed)
    if kind != "pretrained" and (labels or task not in ("classification", "generation")):
        network.add_head(task, labels, seed)
        assert network.task is not None
        for parameter in network.task.parameters():  # biases too, which start at zero
            torch.nn.init.normal_(parameter, std=0.5)
    network.save(folder, tiny_tokenizer(ends=architecture in ENCODERS))
    write_jsonl(folder / "training.jsonl", [{"step": 10, "loss": 1.5, "loss_pretrain": None, "loss_finetune": 1.5}])
    ModelCard(
        id=name, kind=kind, mix_weight=0.0, has_task_head=kind != "pretrained", labels=labels, base="tiny",
        tokens={"finetune": 70}, seconds=1.5, mlflow_runs={name: "run-1"},
    ).save(folder)  # fmt: skip
    return Artifact(str(folder))


def write_text(
    folder: Path, lengths: tuple[int, ...] = (2, 5, 16, 17, 40, 61, 3, 9), with_ends: bool = False
) -> Artifact:
    splits: dict[Any, Any] = {}
    for number, split in enumerate(("dev", "test")):
        draw = np.random.default_rng(number)
        documents = []
        for i, length in enumerate(lengths):
            tokens = draw.integers(0, WORDS, length).tolist()
            if with_ends:
                tokens = [FIRST, *tokens, LAST]
            documents.append(
                Document(tokens, {"id": f"{split}-{i}", "source": "made", "bytes": 4 * length, "text": f"text {i}"})
            )
        splits[split] = write_split(folder, split, documents)  # type: ignore[arg-type]
    DataManifest(
        stream="pretrain", max_length=MAX_LENGTH, vocabulary_size=VOCABULARY_SIZE, source="made", splits=splits
    ).save(folder)
    return Artifact(str(folder))


def write_labelled(
    folder: Path, task: Task = "classification", labels: list[str] | None = None, examples: tuple[int, int] = (11, 11)
) -> Artifact:
    """Eleven examples in each split, dev and test; the fourth is contaminated."""
    splits: dict[Any, Any] = {}
    for number, split in enumerate(("dev", "test")):
        draw = np.random.default_rng(10 + number)
        documents: list[Document] = []
        for i in range(examples[number]):
            record: dict[str, Any] = {"id": f"{split}-e{i}", "source": "made", "contaminated": i == 3}
            if task == "question_answering":
                documents += _windows_of_a_question(record, draw, without_answer=i % 4 == 1)
                continue
            ids = draw.integers(0, WORDS, draw.integers(4, MAX_LENGTH - 2)).tolist()
            record["bytes"] = 4 * len(ids)
            how: dict[str, Any] = {}
            if task == "generation":
                words = [f"w{token}" for token in ids]
                record |= {"prompt": " ".join(words[:-2]), "completion": " " + " ".join(words[-2:])}
                how["supervised_from"] = 1 + len(ids) - 2
            elif task == "classification":
                how["label"] = int(ids[0]) % 3
                record |= {"text": "long " * 200, "label": LABELS[how["label"]]}
            elif task == "multi_label":
                how["targets"] = [float(token % 2) for token in ids[: len(LABELS)]]
                record |= {"text": "a text", "label": [LABELS[j] for j in np.flatnonzero(how["targets"])]}
            else:
                how["targets"] = [float(draw.normal())]
                record |= {"text": "a text", "label": how["targets"][0]}
            documents.append(Document([FIRST, *ids, LAST], record, **how))
        splits[split] = write_split(folder, split, documents)  # type: ignore[arg-type]
    if task in ("classification", "multi_label"):
        labels = labels or LABELS
    DataManifest(
        stream="finetune", task=task, labels=labels, max_length=MAX_LENGTH, vocabulary_size=VOCABULARY_SIZE,
        source="made", splits=splits,
    ).save(folder)  # fmt: skip
    return Artifact(str(folder))


def _windows_of_a_question(record: dict[str, Any], draw: np.random.Generator, without_answer: bool) -> list[Document]:
    """A question about a context of up to three windows, which overlap by three tokens."""
    question = draw.integers(0, WORDS, 3).tolist()
    context_ids = draw.integers(0, WORDS, draw.integers(5, 22)).tolist()
    words = [f"w{token}" for token in context_ids]
    context = " ".join(words)
    starts = np.cumsum([0, *(len(word) + 1 for word in words[:-1])]).tolist()
    answers = [] if without_answer else [words[2], " ".join(words[3:5])]
    record |= {"question": "what?", "context": context, "answers": answers, "bytes": len(context)}
    room = MAX_LENGTH - len(question) - 3
    documents = []
    for first in range(0, max(1, len(words) - 3), room - 3):
        chosen = range(first, min(first + room, len(words)))
        inside = not without_answer and first <= 2 < first + room
        head = [FIRST, *question, LAST]
        documents.append(
            Document(
                [*head, *(context_ids[i] for i in chosen), LAST],
                {
                    **record,
                    "context_from": len(head),
                    "offsets": [[starts[i], starts[i] + len(words[i])] for i in chosen],
                },
                targets=[len(head) + 2 - first] * 2 if inside else [0, 0],
                second_from=len(head),
            )
        )
    return documents


def evaluate(
    folder: Path,
    model: Artifact,
    labelled: Artifact,
    other: Artifact | None = None,
    classification: Artifact | None = None,
    pretrained: Artifact | None = None,
    **options: Any,
) -> tuple[dict[str, Any], Path]:
    """Runs the step; gives evaluation.json and its folder."""
    metric = options.pop("metric", None) or METRIC[str(DataManifest.load(labelled.path).task)]
    config = EvaluateStep(
        metric=metric, max_new_tokens=6, **{"max_length": MAX_LENGTH, "max_tokens": None, "batch_size": 3, **options},
    )  # fmt: skip
    evaluation = Artifact(str(folder / "evaluation"))
    text = Artifact(str(folder / "text"))
    if not (folder / "text" / "manifest.json").is_file():
        text = write_text(folder / "text")
    run(
        config, context=Context.for_tests(), model=model, other=other, pretrained=pretrained, pretrain_heldout=text,
        finetune_heldout=labelled, evaluation=evaluation, metrics=Artifact(str(folder / "metrics")),
        classification=classification or Artifact(str(folder / "classification")),
    )  # fmt: skip
    found = json.loads((folder / "evaluation" / "evaluation.json").read_text())
    assert evaluation.metadata["candidates"] == [one["id"] for one in found["candidates"]]
    return found, folder / "evaluation"
