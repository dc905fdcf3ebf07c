"""What each kind of task is registered as: loaded back from a real MLflow store, it answers as the folder did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForQuestionAnswering, AutoModelForSequenceClassification

from mixtune.components.register.config import RegisterStep
from mixtune.components.register.step import run
from mixtune.components.shared.artifacts import Artifact
from mixtune.components.shared.config import Task
from mixtune.components.shared.running.context import Context
from mixtune.components.shared.tracking.connection import connect
from mixtune.components.shared.tracking.tracker import Tracker
from tests.components.evaluate.made import LABELS, MAX_LENGTH, write_model
from tests.stores import new_store

from .made import write_report

TEXT = "w3 w1 w4 w1 w5"


def register(folder: Path, model: Artifact, task: Task) -> str:
    """Registers a fine-tuned model; the URI of its version."""
    write_report(folder / "comparison", "finetuned", task)
    comparison = Artifact(str(folder / "comparison"))
    run(
        RegisterStep(registered_model="tiny", alias="candidate", max_length=MAX_LENGTH, max_new_tokens=4),
        context=Context("register", Tracker.open("register", "register", "run-1"), "run-1", quiet=True),
        selected=model, other=comparison, comparison=comparison, model=Artifact(str(folder / "registered")),
    )  # fmt: skip
    return "models:/tiny@candidate"


@pytest.mark.parametrize("task", ["classification", "multi_label", "regression"])
def test_what_classifies_is_a_text_classification_pipeline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: Task
) -> None:
    import mlflow

    uri = new_store(tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    labels = None if task == "regression" else LABELS
    model = write_model(tmp_path / "model", "finetuned", "finetuned", labels, architecture="bert", task=task)
    pipeline: Any = mlflow.transformers.load_model(register(tmp_path, model, task))
    assert type(pipeline).__name__ == "TextClassificationPipeline"
    assert connect(uri).get_model_version_by_alias("tiny", "candidate").tags["mixtune.task"] == task
    plain = AutoModelForSequenceClassification.from_pretrained(model.path).eval()
    with torch.no_grad():
        logits = plain(**pipeline.tokenizer(TEXT, return_tensors="pt")).logits[0]
    expected = {"classification": logits.softmax(-1), "multi_label": logits.sigmoid(), "regression": logits}[task]
    found = pipeline(TEXT, top_k=None)
    names = ["value"] if labels is None else LABELS
    assert {one["label"]: one["score"] for one in found} == pytest.approx(
        dict(zip(names, expected.tolist(), strict=True)), abs=1e-5
    )


def test_question_answering_is_a_model_and_its_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    uri = new_store(tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    model = write_model(tmp_path / "model", "finetuned", "finetuned", architecture="bert", task="question_answering")
    version = register(tmp_path, model, "question_answering")
    tags = connect(uri).get_model_version_by_alias("tiny", "candidate").tags
    assert tags["mixtune.task"] == "question_answering"
    assert tags["mixtune.load"] == 'mlflow.transformers.load_model(uri, return_type="components")'
    found = mlflow.transformers.load_model(version, return_type="components")
    plain = AutoModelForQuestionAnswering.from_pretrained(model.path).eval()
    assert type(found["model"]) is type(plain)
    words = found["tokenizer"]("w3 w1", TEXT, return_tensors="pt", return_token_type_ids=True)
    assert words["token_type_ids"].sum() == 6
    with torch.no_grad():
        ours, theirs = found["model"].eval()(**words), plain(**words)
    assert torch.equal(ours.start_logits, theirs.start_logits)
    assert torch.equal(ours.end_logits, theirs.end_logits)


def test_the_same_question_answering_model_twice_is_one_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = new_store(tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    model = write_model(tmp_path / "model", "finetuned", "finetuned", architecture="bert", task="question_answering")
    for _ in range(2):
        register(tmp_path, model, "question_answering")
    assert len(connect(uri).search_model_versions("name = 'tiny'")) == 1


def test_what_writes_answers_is_a_text_generation_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", new_store(tmp_path / "mlflow.db"))
    model = write_model(tmp_path / "model", "finetuned", "finetuned", task="generation")
    pipeline: Any = mlflow.transformers.load_model(register(tmp_path, model, "generation"))
    assert type(pipeline).__name__ == "TextGenerationPipeline"
    assert pipeline(TEXT, max_new_tokens=2)[0]["generated_text"].startswith("w3")
