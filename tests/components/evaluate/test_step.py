"""The step on small real models, held against plain transformers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from mixtune.components.evaluate.windows import windows
from mixtune.components.shared.artifacts import Artifact, ModelCard
from mixtune.components.shared.config import Task
from mixtune.components.shared.data.prepared import Documents
from mixtune.components.shared.errors import MixtuneError, RefusedError
from mixtune.components.shared.model.loading import interpolate
from mixtune.components.shared.running.context import Context

from ..shared.tiny import tiny_model, tiny_tokenizer
from .made import LABELS, MAX_LENGTH, evaluate, write_labelled, write_model, write_text

pytestmark = pytest.mark.numeric


@pytest.fixture(autouse=True)
def _float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's native bf16 would hide small mistakes behind its rounding."""
    monkeypatch.setattr("mixtune.components.shared.model.precision.pick_precision", lambda precision: "float32")


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


@torch.no_grad()
def naive_nats(model: Any, tokens: np.ndarray, first: int = 1) -> float:
    """Loss of the tokens from `first` on, one window after the other, with transformers' own forward."""
    total = 0.0
    for window in windows(len(tokens), MAX_LENGTH):
        ids = torch.tensor(tokens[window.start : window.end].tolist())[None]
        scores = F.log_softmax(model(input_ids=ids).logits[0].double(), -1)
        for position in range(max(window.scored_from, first), window.end):
            total -= float(scores[position - window.start - 1, ids[0, position - window.start]])
    return total


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2"])
def test_document_losses_are_those_of_plain_transformers(tmp_path: Path, architecture: str) -> None:
    model = write_model(tmp_path / "model", "finetuned", "finetuned", LABELS, architecture=architecture)
    found, folder = evaluate(tmp_path, model, write_labelled(tmp_path / "labelled"))
    plain = AutoModelForCausalLM.from_pretrained(model.path).eval()
    for split in ("dev", "test"):
        documents = Documents(tmp_path / "text", split)
        measured = rows(folder / "finetuned", f"{split}.documents.jsonl")
        assert [row["tokens"] for row in measured] == [len(documents.tokens(i)) - 1 for i in range(len(documents))]
        for index, row in enumerate(measured):
            assert row["nats"] == pytest.approx(naive_nats(plain, documents.tokens(index)), rel=1e-5)
        summary = found["candidates"][0]["splits"][split]
        nats, size = sum(row["nats"] for row in measured), sum(row["bytes"] for row in measured)
        assert summary["bpb"] == pytest.approx(nats / size / math.log(2))
        assert summary["nats_per_token"] == pytest.approx(nats / sum(row["tokens"] for row in measured))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_predictions_are_those_of_plain_transformers(tmp_path: Path, architecture: str) -> None:
    model = write_model(tmp_path / "model", "finetuned", "finetuned", LABELS, seed=1, architecture=architecture)
    found, folder = evaluate(tmp_path, model, write_labelled(tmp_path / "labelled"))
    plain = AutoModelForSequenceClassification.from_pretrained(model.path).eval()
    examples = Documents(tmp_path / "labelled", "test")
    measured = rows(folder / "finetuned", "test.examples.jsonl")
    for index, row in enumerate(measured):
        with torch.no_grad():
            logits = plain(input_ids=torch.tensor(examples.tokens(index).tolist())[None]).logits[0]
        assert row["probabilities"] == pytest.approx(logits.softmax(-1).tolist(), abs=2e-6)
        assert row["prediction"] == LABELS[int(logits.argmax())]
        assert row["reference"] == LABELS[int(examples.labels[index])]
        assert row["score"] == float(row["prediction"] == row["reference"])
        assert row["contaminated"] == (index == 3)
        assert len(row["text"]) == 400
    test = found["candidates"][0]["splits"]["test"]
    assert test["task_score"] == test["accuracy"] == pytest.approx(np.mean([row["score"] for row in measured]))
    assert found["task"] == {"kind": "classification", "metric": "accuracy", "higher_is_better": True, "labels": LABELS}


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_answers_are_greedy_and_the_reference_is_scored(tmp_path: Path, architecture: str) -> None:
    """A pretrained language model can answer, so it gets a task score, too."""
    model = write_model(tmp_path / "model", "pretrained", "pretrained", architecture=architecture)
    found, folder = evaluate(
        tmp_path, model, write_labelled(tmp_path / "labelled", task="generation"), metric="token_f1"
    )
    plain = AutoModelForCausalLM.from_pretrained(model.path).eval()
    examples = Documents(tmp_path / "labelled", "dev")
    words = tiny_tokenizer()
    measured = rows(folder / "pretrained", "dev.examples.jsonl")
    for index, row in enumerate(measured):
        tokens = examples.tokens(index)
        start = int(examples.supervised_from[index])
        assert row["nats"] == pytest.approx(naive_nats(plain, tokens, start), rel=1e-5)
        assert row["tokens"] == len(tokens) - start
        ids = tokens[:start].tolist()
        for _ in range(6):
            with torch.no_grad():
                ids.append(int(plain(input_ids=torch.tensor(ids)[None]).logits[0, -1].argmax()))
            if ids[-1] == words.eos_token_id:
                break
        assert row["prediction"] == words.decode(ids[start:], skip_special_tokens=True)
    test = found["candidates"][0]["splits"]["dev"]
    assert test["task_score"] == test["token_f1"] == pytest.approx(np.mean([row["score"] for row in measured]))
    assert test["completion_nats_per_token"] > 0


def test_a_prompt_that_fills_all_positions_is_answered_with_nothing(tmp_path: Path) -> None:
    from mixtune.components.shared.model.generation import generate

    model = tiny_model("gpt2").eval()
    progress = Context.for_tests().progress(1, "batches")
    full, short = np.arange(64) % 50, np.arange(5)
    answers = generate(model, tiny_tokenizer(), [short, full], 4, 1, progress)
    assert answers[1] == ""
    assert answers[0] != ""


def test_without_a_trained_head_there_is_no_task_score(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "pretrained", "pretrained")
    found, folder = evaluate(tmp_path, model, write_labelled(tmp_path / "labelled"))
    entry = found["candidates"][0]
    assert entry["splits"]["dev"]["task_score"] is None
    assert entry["splits"]["dev"]["bpb"] > 0
    assert not (folder / "pretrained" / "dev.examples.jsonl").exists()
    assert rows(folder / "pretrained", "training.jsonl")[0]["loss_finetune"] == 1.5
    assert entry["model_uri"] == str(tmp_path / "model")
    assert entry["mlflow_runs"] == {"pretrained": "run-1"}


def test_interpolated_candidates(tmp_path: Path) -> None:
    start = write_model(tmp_path / "pretrained", "pretrained", "pretrained", seed=1)
    tuned = write_model(tmp_path / "finetuned", "finetuned", "finetuned", LABELS, seed=2)
    labelled = write_labelled(tmp_path / "labelled")
    found, folder = evaluate(tmp_path, start, labelled, tuned, interpolation_alphas=[0.25, 0.5])
    assert [one["id"] for one in found["candidates"]] == ["interpolated-0.25", "interpolated-0.5"]
    entry = found["candidates"][0]
    assert (entry["kind"], entry["start"], entry["params"], entry["alpha"]) == (
        "interpolated", "pretrained", {"alpha": 0.25}, 0.25,
    )  # fmt: skip
    assert (entry["model_uri"], entry["other_uri"]) == (start.path, tuned.path)
    assert entry["splits"]["test"]["task_score"] is not None
    documents = Documents(tmp_path / "text", "dev")
    plain = interpolate(start.path, tuned.path, 0.25).lm.eval()
    for index, row in enumerate(rows(folder / "interpolated-0.25", "dev.documents.jsonl")):
        assert row["nats"] == pytest.approx(naive_nats(plain, documents.tokens(index)), rel=1e-5)


def test_the_largest_alpha_within_the_limit_is_found(tmp_path: Path) -> None:
    start = write_model(tmp_path / "pretrained", "pretrained", "pretrained", seed=1)
    tuned = write_model(tmp_path / "finetuned", "finetuned", "finetuned", LABELS, seed=2)
    labelled = write_labelled(tmp_path / "labelled")
    alphas = [0.0001, 0.9999]
    ends, _ = evaluate(tmp_path, start, labelled, tuned, interpolation_alphas=alphas)
    low, high = (one["splits"]["dev"]["bpb"] for one in ends["candidates"])
    rise = abs(high - low)  # these models learned nothing: the one that is worse on the text stands for fine-tuning
    if high < low:
        start, tuned = (
            write_model(tmp_path / "a", "pretrained", "pretrained", seed=2),
            write_model(tmp_path / "b", "finetuned", "finetuned", LABELS, seed=1),
        )
    for search, limit in (({"max_forgetting_share": 0.5}, 0.5 * rise), ({"max_forgetting": rise / 4}, rise / 4)):
        found, _ = evaluate(tmp_path, start, labelled, tuned, alpha_search=search)
        (one,) = found["candidates"]
        around = [one["alpha"], one["alpha"] + 0.01]
        both, _ = evaluate(tmp_path, start, labelled, tuned, interpolation_alphas=[0.0001, *around])
        before, inside, outside = (each["splits"]["dev"]["bpb"] for each in both["candidates"])
        assert inside - before <= limit * 1.01
        assert outside - before >= limit * 0.99
    none, _ = evaluate(tmp_path, start, labelled, tuned, alpha_search={"max_forgetting": 2 * rise})
    assert none["candidates"] == []


def test_no_alpha_leaves_a_valid_empty_evaluation(tmp_path: Path) -> None:
    start = write_model(tmp_path / "pretrained", "pretrained", "pretrained")
    tuned = write_model(tmp_path / "finetuned", "finetuned", "finetuned", LABELS)
    found, _ = evaluate(tmp_path, start, write_labelled(tmp_path / "labelled"), tuned)
    assert found["candidates"] == []
    assert found["format"] == "mixtune-evaluation/1"


def test_a_sample_of_the_text_is_read(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "pretrained", "pretrained")
    labelled = write_labelled(tmp_path / "labelled")
    whole, _ = evaluate(tmp_path, model, labelled)
    found, folder = evaluate(tmp_path, model, labelled, max_tokens=70)
    for split in ("dev", "test"):
        summary, everything = (one["candidates"][0]["splits"][split] for one in (found, whole))
        read = rows(folder / "pretrained", f"{split}.documents.jsonl")
        assert (summary["sampled"], everything["sampled"]) == (True, False)
        assert 0 < summary["tokens_read"] <= 70 + MAX_LENGTH < everything["tokens_read"]
        assert summary["documents"] == len(read) < 8 == summary["documents_in_split"] == everything["documents"]
        assert sum(row["bytes"] for row in read) == pytest.approx(everything["bytes"])
        assert summary["bpb"] == pytest.approx(everything["bpb"], rel=0.2)
    data = [one["data"]["pretrain"]["splits"]["dev"]["text_digest"] for one in (found, whole)]
    assert data[0] == data[1]


@pytest.mark.parametrize("task", ["classification", "question_answering", "generation"])
def test_a_sample_of_the_labelled_examples_is_answered(tmp_path: Path, task: Task) -> None:
    labels = LABELS if task == "classification" else None
    architecture = "bert" if task == "question_answering" else "llama"
    model = write_model(tmp_path / "model", "finetuned", "finetuned", labels, architecture=architecture, task=task)
    labelled = write_labelled(tmp_path / "labelled", task)
    whole, folder = evaluate(tmp_path, model, labelled)
    everything = {split: rows(folder / "finetuned", f"{split}.examples.jsonl") for split in ("dev", "test")}
    found, folder = evaluate(tmp_path, model, labelled, max_examples=5)
    for split, all_rows in everything.items():
        read = rows(folder / "finetuned", f"{split}.examples.jsonl")
        ids = {row["id"] for row in read}
        assert len(read) == len(ids) == 5
        alike = ("id", "reference", "prediction", "score", "text", "contaminated")
        expected = [row for row in all_rows if row["id"] in ids]
        assert [[row[name] for name in alike] for row in read] == [[row[name] for name in alike] for row in expected]
        summary, before = (one["candidates"][0]["splits"][split] for one in (found, whole))
        assert (summary["examples"], summary["examples_in_split"]) == (5, 11)
        assert (before["examples"], before["examples_in_split"]) == (11, 11)
        assert len(rows(folder / "finetuned", f"{split}.trivial.jsonl")) == 5
    assert found["data"] == whole["data"]


def test_losses_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "finetuned", "finetuned", LABELS)
    labelled = write_labelled(tmp_path / "labelled")
    nats = []
    for size in (1, 64):
        _, folder = evaluate(tmp_path, model, labelled, batch_size=size)
        nats.append([row["nats"] for row in rows(folder / "finetuned", "test.documents.jsonl")])
    assert nats[0] == pytest.approx(nats[1], rel=1e-5)


def test_a_loss_that_is_not_finite_is_named(tmp_path: Path) -> None:
    network = tiny_model("llama", LABELS)
    poisoned = 7
    dict(network.lm.named_parameters())["model.embed_tokens.weight"].data[poisoned] = math.nan
    network.save(tmp_path / "model", tiny_tokenizer())
    ModelCard(id="mixed-0.3", kind="mixed", has_task_head=True, labels=LABELS).save(tmp_path / "model")
    write_text(tmp_path / "text")
    bad = {
        split: [i for i in range(8) if poisoned in Documents(tmp_path / "text", split).tokens(i)[:-1]]
        for split in ("dev", "test")
    }
    assert 0 < len(bad["dev"]) < 8
    labelled = write_labelled(tmp_path / "labelled")
    with pytest.raises(MixtuneError) as raised:
        evaluate(tmp_path, Artifact(str(tmp_path / "model")), labelled)
    named = [f"mixed-0.3: the loss of document {s}-{i} ({s}) is not finite" for s in bad for i in bad[s]]
    assert [problem for problem in raised.value.problems if "document" in problem] == named
    manifest = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    documents = [one["id"] for one in manifest["not_finite"] if one["what"] == "document"]
    assert documents == [f"{s}-{i}" for s in bad for i in bad[s]]
    examples = [one["id"] for one in manifest["not_finite"] if one["what"] == "example" and one["split"] == "dev"]
    held = Documents(tmp_path / "labelled", "dev")
    assert examples == [f"dev-e{i}" for i in range(len(held)) if poisoned in held.tokens(i)]
    assert manifest["candidates"][0]["splits"]["dev"]["bpb"] is None


def test_labels_of_another_task_are_refused(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "finetuned", "finetuned", LABELS)
    labelled = write_labelled(tmp_path / "labelled", labels=["a", "b", "c"])
    with pytest.raises(RefusedError, match=r"finetuned: was trained on the labels .*'no'.* has \['a', 'b', 'c'\]"):
        evaluate(tmp_path, model, labelled)
    assert not (tmp_path / "evaluation" / "evaluation.json").exists()


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    labelled = write_labelled(tmp_path / "labelled")
    with pytest.raises(RefusedError, match=r"has no mixtune\.json, so it is not a model made by mixtune"):
        evaluate(tmp_path, Artifact(str(tmp_path / "model")), labelled)
