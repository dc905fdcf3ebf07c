"""The base model and the model in use, measured beside `pretrained`."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from mixtune.components.evaluate.config import EvaluateStep, References
from mixtune.components.evaluate.step import run
from mixtune.components.shared.artifacts import Artifact, ModelCard, read_json, read_jsonl
from mixtune.components.shared.errors import RefusedError
from mixtune.components.shared.model.loading import interpolate
from mixtune.components.shared.model.tokenizer import append_eos, load_tokenizer
from mixtune.components.shared.running.context import Context
from mixtune.components.shared.tracking.connection import connect
from mixtune.components.shared.tracking.tracker import Tracker
from tests.components.prepare.prepared import jsonl, prepare_finetune, prepare_pretrain, tokenizer_options
from tests.components.register.made import write_report
from tests.components.shared.tiny import tiny_model, tiny_tokenizer
from tests.components.stages import Stages
from tests.stores import new_store

from .made import write_model

pytestmark = pytest.mark.numeric


@pytest.fixture
def stages(tmp_path: Path) -> Stages:
    stages = Stages(tmp_path)
    stages.pretrain(name="brought")
    stages.pretrain(base=str(tmp_path / "brought"))
    stages.finetune()
    return stages


def evaluate(stages: Stages, references: References, context: Context | None = None) -> list[dict[str, Any]]:
    """The entries of the evaluation of `pretrained` and what is measured beside it."""
    config = EvaluateStep(
        max_length=32, metric="accuracy", max_new_tokens=None, precision="float32", batch_size=8, max_tokens=None,
        references=references,
    )  # fmt: skip
    run(
        config, context=context or Context.for_tests(), model=stages.artifact("pretrained"), other=None,
        pretrain_heldout=stages.artifact("text"), finetune_heldout=stages.artifact("labels"),
        evaluation=stages.artifact("evaluation"), metrics=stages.artifact("numbers"),
        classification=stages.artifact("classification"),
    )  # fmt: skip
    entries: list[dict[str, Any]] = read_json(stages.folder / "evaluation" / "evaluation.json", "x")["candidates"]
    return entries


def test_what_pretraining_further_forgot_is_visible(stages: Stages) -> None:
    pretrained, base = evaluate(stages, References(base=str(stages.folder / "brought"), fingerprint="x"))
    assert (base["id"], base["kind"], base["has_task_head"]) == ("base", "base", False)
    assert base["splits"]["test"]["bpb"] != pretrained["splits"]["test"]["bpb"]
    assert base["splits"]["test"]["documents"] == pretrained["splits"]["test"]["documents"]
    # `pretrained` of a run that only brings the model in is the same model.
    stages.pretrain(base=str(stages.folder / "brought"), steps=0)
    (only,) = evaluate(stages, References())
    assert only["splits"]["test"]["bpb"] == base["splits"]["test"]["bpb"]


def test_the_model_in_use_from_a_folder(stages: Stages) -> None:
    _, champion = evaluate(stages, References(champion=str(stages.folder / "finetuned"), fingerprint="x"))
    assert (champion["id"], champion["kind"]) == ("champion", "champion")
    assert champion["splits"]["test"]["task_score"] is not None
    assert (stages.folder / "evaluation" / "champion" / "test.examples.jsonl").is_file()


def test_one_with_another_tokenizer_or_other_labels_is_refused(stages: Stages) -> None:
    other = write_model(stages.folder / "other", "finetuned", "finetuned", ["a", "b", "c"])
    with pytest.raises(RefusedError, match=r"champion.*(another tokenizer|labels)"):
        evaluate(stages, References(champion=other.path, fingerprint="x"))


def test_a_champion_reads_texts_as_it_was_trained_on_them(tmp_path: Path) -> None:
    """Its tokenizer ends texts with EOS, which that of this run's base model does not."""
    draw = random.Random(1)
    words = [f"w{number}" for number in range(50)]
    labels = ["no", "yes"]
    network = tiny_model("llama")
    network.save(tmp_path / "pretrained", tiny_tokenizer())
    ModelCard(id="pretrained", kind="pretrained", base="tiny").save(tmp_path / "pretrained")
    network.add_head("classification", labels, 0)
    assert network.task is not None
    for parameter in network.task.parameters():
        torch.nn.init.normal_(parameter, std=1.0)
    tokenizer = append_eos(tiny_tokenizer())
    network.save(tmp_path / "champion", tokenizer)
    ModelCard(id="finetuned", kind="finetuned", has_task_head=True, labels=labels, base="tiny").save(
        tmp_path / "champion"
    )
    base = tokenizer_options(str(tmp_path / "pretrained"), 16, None)
    rows = [
        {"text": " ".join(draw.choices(words, k=draw.randint(2, 20))), "label": draw.choice(labels)} for _ in range(60)
    ]
    text = prepare_pretrain(tmp_path / "text", jsonl(tmp_path / "text.jsonl", rows), tokenizer=base)
    labelled = prepare_finetune(tmp_path / "labels", jsonl(tmp_path / "labels.jsonl", rows), text, tokenizer=base)
    config = EvaluateStep(
        max_length=16, metric="accuracy", max_new_tokens=None, precision="float32", batch_size=8, max_tokens=None,
        references=References(champion=str(tmp_path / "champion"), fingerprint="x"),
    )  # fmt: skip
    outputs = {name: Artifact(str(tmp_path / name)) for name in ("evaluation", "metrics", "classification")}
    run(
        config, context=Context.for_tests(), model=Artifact(str(tmp_path / "pretrained")), other=None,
        pretrain_heldout=text.heldout, finetune_heldout=labelled.heldout, **outputs,
    )  # fmt: skip
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "champion").eval()
    texts = {record["id"]: record["text"] for record in labelled.documents("test").records()}
    found = list(read_jsonl(tmp_path / "evaluation" / "champion" / "test.examples.jsonl"))
    assert found
    for row in found:
        with torch.no_grad():
            logits = plain(**tokenizer(texts[row["id"]], truncation=True, max_length=16, return_tensors="pt")).logits[0]
        assert row["probabilities"] == pytest.approx(logits.softmax(-1).tolist(), abs=1e-5)


def test_a_mixed_model_is_interpolated_too_where_asked(stages: Stages) -> None:
    stages.mixed(0.3)
    config = EvaluateStep(
        max_length=32, metric="accuracy", max_new_tokens=None, precision="float32", batch_size=8, max_tokens=None,
        interpolation_alphas=[0.25, 0.5],
    )  # fmt: skip
    given: dict[str, Any] = {
        name: stages.artifact(folder)
        for name, folder in {
            "model": "mixed", "pretrain_heldout": "text", "finetune_heldout": "labels", "evaluation": "evaluation",
            "metrics": "numbers", "classification": "classification",
        }.items()
    }  # fmt: skip
    with pytest.raises(RefusedError, match="pretrained: is required where interpolation_alphas are given"):
        run(config, context=Context.for_tests(), other=None, **given)
    run(config, context=Context.for_tests(), other=None, pretrained=stages.artifact("pretrained"), **given)
    entries = read_json(stages.folder / "evaluation" / "evaluation.json", "x")["candidates"]
    assert [entry["id"] for entry in entries] == [
        "mixed-0.3", "interpolated-0.25-mixed-0.3", "interpolated-0.5-mixed-0.3",
    ]  # fmt: skip
    assert entries[1]["name"] == "interpolated, α = 0.25, of mixed-0.3"
    assert (entries[1]["model_uri"], entries[1]["other_uri"]) == (
        str(stages.folder / "pretrained"), str(stages.folder / "mixed"),
    )  # fmt: skip
    assert len({entry["splits"]["test"]["bpb"] for entry in entries}) == 3
    # It is what register would write out.
    written = interpolate(str(stages.folder / "pretrained"), str(stages.folder / "mixed"), 0.5)
    written.save(stages.folder / "written", load_tokenizer(stages.folder / "mixed"))
    ModelCard.load(stages.folder / "mixed").model_copy(update={"id": "written"}).save(stages.folder / "written")
    plain = config.model_copy(update={"interpolation_alphas": []})
    run(plain, context=Context.for_tests(), other=None, **{**given, "model": stages.artifact("written")})
    (again,) = read_json(stages.folder / "evaluation" / "evaluation.json", "x")["candidates"]
    assert again["splits"]["test"]["bpb"] == pytest.approx(entries[2]["splits"]["test"]["bpb"], abs=1e-9)


def test_the_model_in_use_from_the_registry(stages: Stages, monkeypatch: pytest.MonkeyPatch) -> None:
    from mixtune.components.register.config import RegisterStep
    from mixtune.components.register.step import run as register
    from mixtune.components.shared.tracking.registry import version_behind

    uri = new_store(stages.folder / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert version_behind(connect(uri), "models:/tiny@candidate") is None
    write_report(stages.folder / "comparison", "finetuned", "classification", ["no", "yes"])
    tracker = Tracker.open("register", "register", "run-1")
    register(
        RegisterStep(registered_model="tiny", alias="candidate", max_length=16),
        context=Context("register", tracker, "run-1", quiet=True),
        selected=stages.artifact("finetuned"), other=stages.artifact("comparison"), comparison=stages.artifact("comparison"),
        model=stages.artifact("registered"),
    )  # fmt: skip
    assert version_behind(connect(uri), "models:/tiny@candidate") == "models:/tiny/1"
    assert version_behind(connect(uri), "models:/tiny@other") is None
    with pytest.raises(RefusedError, match="the registry has no models:/tiny/7"):
        version_behind(connect(uri), "models:/tiny/7")
    context = Context("evaluate", Tracker.open("evaluate", "evaluate pretrained", "run-1"), "run-1", quiet=True)
    _, champion = evaluate(stages, References(champion="models:/tiny/1", fingerprint="models:/tiny/1"), context)
    _, same = evaluate(stages, References(champion=str(stages.folder / "finetuned"), fingerprint="x"))
    assert champion["splits"] == same["splits"], "what was registered is what was trained, to the last digit"
