"""Predictions of every task head, held against plain transformers, one example at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score
from transformers import AutoModelForQuestionAnswering, AutoModelForSequenceClassification

from mixtune.components.evaluate.config import EvaluateStep
from mixtune.components.shared.artifacts import Artifact, ModelCard, read_jsonl
from mixtune.components.shared.data.prepared import Documents
from mixtune.components.shared.errors import MixtuneError, RefusedError
from mixtune.components.shared.model.loading import load_model
from mixtune.components.shared.model.tokenizer import load_tokenizer
from mixtune.components.shared.runtime import OUTPUTS, launch
from mixtune.components.shared.serving.answers import ContextWindow, answer

from .made import LABELS, MAX_LENGTH, METRIC, WORDS, evaluate, write_labelled, write_model, write_text

pytestmark = pytest.mark.numeric


@pytest.fixture(autouse=True)
def _float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixtune.components.shared.model.precision.pick_precision", lambda precision: "float32")


def of_test(folder: Path) -> list[dict[str, Any]]:
    return list(read_jsonl(folder / "finetuned" / "test.examples.jsonl"))


@torch.no_grad()
def plain_logits(model: Any, tokens: np.ndarray) -> torch.Tensor:
    return model(input_ids=torch.tensor(tokens.tolist())[None]).logits[0]


@pytest.mark.parametrize("architecture", ["llama", "bert", "roberta"])
def test_labels_above_one_half(tmp_path: Path, architecture: str) -> None:
    model = write_model(tmp_path / "model", "finetuned", "finetuned", LABELS, 1, architecture, "multi_label")
    found, folder = evaluate(tmp_path, model, write_labelled(tmp_path / "labelled", "multi_label"))
    plain = AutoModelForSequenceClassification.from_pretrained(model.path).eval()
    examples = Documents(tmp_path / "labelled", "test")
    rows = of_test(folder)
    for index, row in enumerate(rows):
        shares = plain_logits(plain, examples.tokens(index)).sigmoid().tolist()
        assert row["probabilities"] == pytest.approx(shares, abs=2e-6)
        assert row["prediction"] == [label for label, share in zip(LABELS, shares, strict=True) if share > 0.5]
        assert row["reference"] == examples.records()[index]["label"]
        assert row["score"] == float(set(row["prediction"]) == set(row["reference"]))
        assert row["contaminated"] == (index == 3)
    truth, given = ([[label in row[side] for label in LABELS] for row in rows] for side in ("reference", "prediction"))
    test = found["candidates"][0]["splits"]["test"]
    assert test["task_score"] == test["micro_f1"] == pytest.approx(f1_score(truth, given, average="micro"))
    assert test["macro_f1"] == pytest.approx(f1_score(truth, given, average="macro", zero_division=np.nan))
    assert test["exact_match"] == pytest.approx(np.mean([row["score"] for row in rows]))
    assert found["task"]["labels"] == LABELS
    assert found["task"]["higher_is_better"] is True


@pytest.mark.parametrize("architecture", ["gpt2", "bert"])
@pytest.mark.parametrize("metric", ["pearson", "spearman"])
def test_numbers(tmp_path: Path, architecture: str, metric: str) -> None:
    model = write_model(tmp_path / "model", "finetuned", "finetuned", None, 1, architecture, "regression")
    found, folder = evaluate(tmp_path, model, write_labelled(tmp_path / "labelled", "regression"), metric=metric)
    plain = AutoModelForSequenceClassification.from_pretrained(model.path).eval()
    examples = Documents(tmp_path / "labelled", "test")
    rows = of_test(folder)
    for index, row in enumerate(rows):
        assert row["prediction"] == pytest.approx(plain_logits(plain, examples.tokens(index)).item(), abs=1e-5)
        assert row["reference"] == pytest.approx(examples.records()[index]["label"])
        assert row["score"] == -abs(row["prediction"] - row["reference"])
        assert "probabilities" not in row
    truth, given = ([row[side] for row in rows] for side in ("reference", "prediction"))
    test = found["candidates"][0]["splits"]["test"]
    assert test["pearson"] == pytest.approx(pearsonr(truth, given).statistic)
    assert test["spearman"] == pytest.approx(spearmanr(truth, given).statistic)
    assert test["task_score"] == test[metric]
    errors = np.subtract(truth, given)
    assert test["mae"] == pytest.approx(np.abs(errors).mean())
    assert test["rmse"] == pytest.approx(np.sqrt((errors**2).mean()))


@pytest.mark.parametrize("architecture", ["bert", "roberta"])
@pytest.mark.parametrize("metric", ["exact_match", "token_f1"])
def test_answers_of_all_windows_of_an_example(tmp_path: Path, architecture: str, metric: str) -> None:
    model = write_model(tmp_path / "model", "finetuned", "finetuned", None, 1, architecture, "question_answering")
    labelled = write_labelled(tmp_path / "labelled", "question_answering")
    found, folder = evaluate(tmp_path, model, labelled, metric=metric, batch_size=2)
    plain = AutoModelForQuestionAnswering.from_pretrained(model.path).eval()
    examples = Documents(tmp_path / "labelled", "test")
    records = examples.records()
    rows = of_test(folder)
    assert [row["id"] for row in rows] == [f"test-e{i}" for i in range(11)]
    assert len(records) > 11  # some have several windows
    for row in rows:
        windows = []
        for index in (i for i, record in enumerate(records) if record["id"] == row["id"]):
            ids = torch.tensor(examples.tokens(index).tolist())[None]
            types = (torch.arange(ids.shape[1]) >= int(examples.second_from[index])).long()[None]
            with torch.no_grad():
                made = plain(input_ids=ids, token_type_ids=types)
            logits = torch.stack([made.start_logits[0], made.end_logits[0]], -1).numpy()
            record = records[index]
            windows.append(ContextWindow(logits, record["context_from"], record["offsets"]))
        expected = answer(windows, record["context"])
        assert row["prediction"] == expected.text
        assert row["null_score"] == pytest.approx(expected.null_score, abs=1e-5)
        assert row["span_score"] == pytest.approx(expected.span_score, abs=1e-5)
        assert row["reference"] == record["answers"]
        assert row["text"].startswith("what? — w")
    test = found["candidates"][0]["splits"]["test"]
    assert test["examples"] == 11
    assert test["task_score"] == test[metric] == pytest.approx(np.mean([row["score"] for row in rows]))
    counts = found["data"]["finetune"]["splits"]["test"]
    assert (counts["examples"], counts["documents"]) == (11, len(records))
    assert "examples" not in found["data"]["pretrain"]["splits"]["test"]
    assert sum(row["contaminated"] for row in rows) == 1


def test_predictions_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "finetuned", "finetuned", None, 2, "bert", "question_answering")
    labelled = write_labelled(tmp_path / "labelled", "question_answering")
    found = []
    for size in (1, 64):
        _, folder = evaluate(tmp_path, model, labelled, batch_size=size)
        found.append(of_test(folder))
    for one, other in zip(*found, strict=True):
        assert one["prediction"] == other["prediction"]
        assert one["span_score"] == pytest.approx(other["span_score"], abs=1e-5)


@pytest.mark.parametrize(
    ("task", "labels"), [("multi_label", LABELS), ("regression", None), ("question_answering", None)]
)
def test_examples_whose_prediction_is_not_finite_are_named(tmp_path: Path, task: Any, labels: list[str] | None) -> None:
    model = write_model(tmp_path / "model", "finetuned", "finetuned", labels, 1, "bert", task)
    network = load_model(model.path)
    labelled = write_labelled(tmp_path / "labelled", task)
    examples = Documents(tmp_path / "labelled", "test")
    poisoned = next(int(token) for token in examples.tokens(4)[1:] if 10 <= token < WORDS)
    dict(network.lm.named_parameters())["bert.embeddings.word_embeddings.weight"].data[poisoned] = torch.nan
    network.save(tmp_path / "poisoned", load_tokenizer(model.path))
    ModelCard.load(model.path).save(tmp_path / "poisoned")
    write_text(tmp_path / "text", with_ends=True)
    with pytest.raises(MixtuneError, match="finetuned: the loss of example "):
        evaluate(tmp_path, Artifact(str(tmp_path / "poisoned")), labelled)
    manifest = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    bad = [record["id"] for i, record in enumerate(examples.records()) if poisoned in examples.tokens(i)]
    assert 0 < len(set(bad)) < 11
    named = [one["id"] for one in manifest["not_finite"] if one["what"] == "example" and one["split"] == "test"]
    assert named == list(dict.fromkeys(bad))
    test = manifest["candidates"][0]["splits"]["test"]
    assert test["task_score"] is None
    assert {row["id"] for row in of_test(tmp_path / "evaluation") if row["score"] is None} == set(bad)


def test_a_head_for_another_task_is_refused(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "finetuned", "finetuned", None, architecture="bert", task="regression")
    labelled = write_labelled(tmp_path / "labelled", "question_answering")
    with pytest.raises(RefusedError, match="is made for regression, the held-out data is for question_answering"):
        evaluate(tmp_path, model, labelled)


@pytest.mark.parametrize("task", ["regression", "question_answering"])
def test_interpolated_candidates_have_the_fine_tuned_head(tmp_path: Path, task: Any) -> None:
    start = write_model(tmp_path / "pretrained", "pretrained", "pretrained", architecture="bert")
    tuned = write_model(tmp_path / "finetuned", "finetuned", "finetuned", architecture="bert", task=task, seed=2)
    found, _ = evaluate(tmp_path, start, write_labelled(tmp_path / "labelled", task), tuned, interpolation_alphas=[0.5])
    entry = found["candidates"][0]
    assert (entry["id"], entry["name"]) == ("interpolated-0.5", "")
    assert entry["splits"]["test"]["task_score"] is not None
    assert found["likelihood"] == "fixed-mask pseudo-likelihood"


@pytest.mark.parametrize("task", ["classification", "multi_label", "regression", "question_answering", "generation"])
@pytest.mark.parametrize("examples", [(0, 1), (1, 0)])
def test_an_empty_split_and_a_single_example(tmp_path: Path, task: Any, examples: tuple[int, int]) -> None:
    """What there is none of has no score; a single one has."""
    labels = LABELS if task in ("classification", "multi_label") else None
    model = write_model(tmp_path / "model", "finetuned", "finetuned", labels, task=task, architecture="gpt2")
    found, folder = evaluate(tmp_path, model, write_labelled(tmp_path / "labelled", task, examples=examples))
    for split, count in zip(("dev", "test"), examples, strict=True):
        measured = found["candidates"][0]["splits"][split]
        assert measured["examples"] == count
        assert (measured["task_score"] is None) == (count == 0)
        assert (folder / "finetuned" / f"{split}.examples.jsonl").exists() == (count == 1)
    assert found["not_finite"] == []


def test_empty_held_out_text_has_no_loss(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "finetuned", "finetuned", LABELS)
    write_text(tmp_path / "text", lengths=())
    found, _ = evaluate(tmp_path, model, write_labelled(tmp_path / "labelled"))
    for split in ("dev", "test"):
        measured = found["candidates"][0]["splits"][split]
        assert (measured["bpb"], measured["documents"]) == (None, 0)
        assert measured["task_score"] is not None


def confusion_in(found: dict[str, Any], candidate: int = 0) -> Any:
    return found["candidates"][candidate]["splits"]["test"].get("confusion_matrix")


def test_the_confusion_matrix_is_shown_as_kfp_itself_does(tmp_path: Path) -> None:
    from kfp.dsl import ClassificationMetrics

    model = write_model(tmp_path / "model", "finetuned", "finetuned", LABELS, seed=3)
    artifact = Artifact(str(tmp_path / "classification"))
    found, folder = evaluate(tmp_path, model, write_labelled(tmp_path / "labelled"), classification=artifact)
    matrix = confusion_in(found)
    of_kfp = ClassificationMetrics(uri="there")
    of_kfp.log_confusion_matrix(LABELS, matrix)
    assert artifact.metadata == of_kfp.metadata
    rows = of_test(folder)
    assert np.sum(matrix) == len(rows)
    for number, label in enumerate(LABELS):
        assert sum(matrix[number]) == sum(row["reference"] == label for row in rows)
        assert sum(row[number] for row in matrix) == sum(row["prediction"] == label for row in rows)


def test_several_candidates_show_the_first_confusion_matrix(tmp_path: Path) -> None:
    start = write_model(tmp_path / "pretrained", "pretrained", "pretrained")
    tuned = write_model(tmp_path / "finetuned", "finetuned", "finetuned", LABELS, seed=2)
    artifact = Artifact(str(tmp_path / "classification"))
    found, _ = evaluate(
        tmp_path, start, write_labelled(tmp_path / "labelled"), tuned, artifact, interpolation_alphas=[0.9, 0.1]
    )
    assert [row["row"] for row in artifact.metadata["confusionMatrix"]["rows"]] == confusion_in(found, 0)
    assert np.sum(confusion_in(found, 1)) == 11


@pytest.mark.parametrize("task", ["multi_label", "generation", "classification"])
def test_without_classes_that_were_predicted_no_confusion_matrix_is_shown(tmp_path: Path, task: Any) -> None:
    """Other tasks; and a head that is not trained, which has no score either."""
    kind: Any = "pretrained" if task == "classification" else "finetuned"
    model = write_model(tmp_path / "model", kind, kind, None if task == "generation" else LABELS, task=task)
    artifact = Artifact(str(tmp_path / "classification"))
    found, _ = evaluate(tmp_path, model, write_labelled(tmp_path / "labelled", task), classification=artifact)
    assert artifact.metadata == {}
    assert confusion_in(found) is None
    if task == "classification":
        assert found["candidates"][0]["splits"]["test"]["task_score"] is None


def test_classes_that_are_not_finite_have_neither_score_nor_confusion_matrix(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "finetuned", "finetuned", LABELS)
    network = load_model(model.path)
    assert network.task is not None
    next(network.task.parameters()).data.fill_(torch.nan)
    network.save(tmp_path / "model", load_tokenizer(model.path))
    with pytest.raises(MixtuneError, match="finetuned: the loss of example test-e0"):
        evaluate(tmp_path, model, write_labelled(tmp_path / "labelled"))
    test = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())["candidates"][0]["splits"]["test"]
    assert {test[name] for name in ("task_score", "accuracy", "confusion_matrix", "calibration_error")} == {None}


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_the_classification_output_is_a_file_even_where_it_is_empty(tmp_path: Path, task: Any) -> None:
    """KFP's local cache takes an artifact without a file for a lost one."""
    labels = LABELS if task == "classification" else None
    given = {
        "model": write_model(tmp_path / "model", "finetuned", "finetuned", labels, task=task),
        "pretrain_heldout": write_text(tmp_path / "text"),
        "finetune_heldout": write_labelled(tmp_path / "labelled", task),
    }
    outputs = {name: Artifact(str(tmp_path / "out" / name)) for name in OUTPUTS["evaluate"]}
    config = EvaluateStep(
        max_length=MAX_LENGTH, metric=METRIC[task], max_new_tokens=None, batch_size=4, max_tokens=None
    )
    launch("evaluate", config.to_json(), {**given, "other": None, **outputs})
    shown = json.loads((tmp_path / "out" / "classification").read_text())
    assert shown == outputs["classification"].metadata
    assert ("confusionMatrix" in shown) == (task == "classification")
