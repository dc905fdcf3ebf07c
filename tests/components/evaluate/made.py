"""Small models and held-out data on disk, and a run of `evaluate` over them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from mixtune.components.evaluate.config import EvaluateStep
from mixtune.components.evaluate.step import run
from mixtune.components.shared.artifacts import Artifact, Kind, ModelCard, write_jsonl
from mixtune.components.shared.context import Context
from mixtune.components.shared.data import DataManifest, Document, write_split

from ..shared.tiny import VOCABULARY_SIZE, tiny_model, tiny_tokenizer

LABELS = ["no", "perhaps", "yes"]
MAX_LENGTH = 16


def write_model(
    folder: Path, name: str, kind: Kind, labels: list[str] | None = None, seed: int = 0, architecture: str = "llama"
) -> Artifact:
    tiny_model(architecture, labels, seed).save(folder, tiny_tokenizer())
    write_jsonl(folder / "training.jsonl", [{"step": 10, "loss": 1.5, "loss_pretrain": None, "loss_finetune": 1.5}])
    ModelCard(
        id=name, kind=kind, mix_weight=0.0, has_task_head=kind != "pretrained", labels=labels, base="tiny",
        tokens={"finetune": 70}, seconds=1.5, mlflow_runs={name: "run-1"},
    ).save(folder)  # fmt: skip
    return Artifact(str(folder))


def write_text(folder: Path, lengths: tuple[int, ...] = (2, 5, 16, 17, 40, 61, 3, 9)) -> Artifact:
    splits: dict[Any, Any] = {}
    for number, split in enumerate(("dev", "test")):
        draw = np.random.default_rng(number)
        splits[split] = write_split(
            folder,
            split,  # type: ignore[arg-type]
            [
                Document(
                    draw.integers(0, VOCABULARY_SIZE - 3, length).tolist(),
                    {"id": f"{split}-{i}", "source": "made", "bytes": 4 * length, "text": f"text {i}"},
                )
                for i, length in enumerate(lengths)
            ],
        )
    DataManifest(
        stream="pretrain", max_length=MAX_LENGTH, vocabulary_size=VOCABULARY_SIZE, source="made", splits=splits
    ).save(folder)
    return Artifact(str(folder))


def write_labelled(folder: Path, generation: bool, labels: list[str] | None = None) -> Artifact:
    splits: dict[Any, Any] = {}
    for number, split in enumerate(("dev", "test")):
        draw = np.random.default_rng(10 + number)
        documents = []
        for i in range(11):
            ids = draw.integers(0, VOCABULARY_SIZE - 3, draw.integers(4, MAX_LENGTH - 2)).tolist()
            record: dict[str, Any] = {"id": f"{split}-e{i}", "source": "made", "bytes": 4 * len(ids)}
            record["contaminated"] = i == 3
            if generation:
                words = [f"w{token}" for token in ids]
                record |= {"prompt": " ".join(words[:-2]), "completion": " " + " ".join(words[-2:])}
                documents.append(Document([58, *ids, 59], record, supervised_from=1 + len(ids) - 2))
            else:
                label = int(ids[0]) % 3
                record |= {"text": "long " * 200, "label": LABELS[label]}
                documents.append(Document([58, *ids, 59], record, label=label))
        splits[split] = write_split(folder, split, documents)  # type: ignore[arg-type]
    DataManifest(
        stream="finetune", task="generation" if generation else "classification",
        labels=None if generation else labels or LABELS, max_length=MAX_LENGTH, vocabulary_size=VOCABULARY_SIZE,
        source="made", splits=splits,
    ).save(folder)  # fmt: skip
    return Artifact(str(folder))


def evaluate(
    folder: Path, model: Artifact, labelled: Artifact, other: Artifact | None = None, **options: Any
) -> tuple[dict[str, Any], Path]:
    """Runs the step; gives evaluation.json and its folder."""
    metric = options.pop("metric", None) or (
        "exact_match" if DataManifest.load(labelled.path).labels is None else "accuracy"
    )
    config = EvaluateStep(
        max_length=MAX_LENGTH, metric=metric, max_new_tokens=6,
        **{"max_documents": None, "batch_size": 3, **options},
    )  # fmt: skip
    evaluation = Artifact(str(folder / "evaluation"))
    text = Artifact(str(folder / "text"))
    if not (folder / "text" / "manifest.json").is_file():
        text = write_text(folder / "text")
    run(
        config, context=Context.for_tests(), model=model, other=other, pretrain_heldout=text,
        finetune_heldout=labelled, evaluation=evaluation, metrics=Artifact(str(folder / "metrics")),
    )  # fmt: skip
    found = json.loads((folder / "evaluation" / "evaluation.json").read_text())
    assert evaluation.metadata["candidates"] == [one["id"] for one in found["candidates"]]
    return found, folder / "evaluation"
