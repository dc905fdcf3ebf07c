"""Registered models answer as `evaluate` scored them: from text files to MLflow's predictions, for every task."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mixtune.components.evaluate.config import EvaluateStep
from mixtune.components.evaluate.step import run as run_evaluate
from mixtune.components.register.config import RegisterStep
from mixtune.components.register.step import run as run_register
from mixtune.components.shared.artifacts import Artifact, ModelCard, read_jsonl
from mixtune.components.shared.config import Task
from mixtune.components.shared.running.context import Context
from mixtune.components.shared.task_kinds import TASK_KINDS
from mixtune.components.shared.tracking.tracker import Tracker
from tests.components.evaluate.made import METRIC
from tests.components.prepare.prepared import Prepared, jsonl, prepare_finetune, prepare_pretrain, tokenizer_options
from tests.components.shared.tiny import ENCODERS, SPECIAL, tiny_model, tiny_tokenizer
from tests.stores import new_store

from .made import write_report
from .served import sent, served

MAX_LENGTH = 16
MAX_NEW_TOKENS = 5
WORDS = [f"w{number}" for number in range(min(SPECIAL.values()))]
LABELS = ["blue", "green", "red"]


def words(draw: random.Random, low: int, high: int) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(low, high)))


def question(draw: random.Random) -> dict[str, Any]:
    context = words(draw, 6, 40)  # up to several windows
    return {"question": words(draw, 2, 4), "context": context, "answers": [context.split()[draw.randrange(5)]]}


# Texts are longer than the maximum length, too; one is of words that the tokenizer does not know.
EXAMPLES: dict[Task, Callable[[random.Random], dict[str, Any]]] = {
    "classification": lambda draw: {"text": words(draw, 1, 24), "label": draw.choice(LABELS)},
    "multi_label": lambda draw: {"text": words(draw, 1, 24), "label": draw.sample(LABELS, draw.randint(0, 3))},
    "regression": lambda draw: {"text": words(draw, 1, 24), "label": draw.gauss(0, 1)},
    "question_answering": question,
    "generation": lambda draw: {"prompt": words(draw, 1, 9), "completion": " " + words(draw, 1, 4)},
}


class Scored:
    """A model that was evaluated on a small data set and registered.

    Attributes:
        inputs: the input columns of each test example.
        predictions: what `evaluate` says that the model predicts for them.
        uri: the registered version.
        key: name of the inputs in a request to MLflow's server.
    """

    def __init__(self, folder: Path, task: Task, architecture: str) -> None:
        encoder = architecture in ENCODERS
        labels = LABELS if TASK_KINDS[task].has_label_names else None
        network = tiny_model(architecture)
        if TASK_KINDS[task].head is not None:
            network.add_head(task, labels, 0)
            assert network.task is not None
            for name, parameter in network.task.named_parameters():
                if name.endswith("weight") and parameter.dim() > 1:
                    torch.nn.init.normal_(parameter, std=1.0, generator=torch.Generator().manual_seed(0))
        tokenizer = tiny_tokenizer(ends=encoder)
        network.save(folder / "model", tokenizer)
        ModelCard(id="finetuned", kind="finetuned", has_task_head=True, labels=labels, base="tiny").save(
            folder / "model"
        )
        jsonl(folder / "model" / "training.jsonl", [{"step": 1, "loss": 1.0}])
        draw = random.Random(7)
        base = tokenizer_options(str(folder / "model"), MAX_LENGTH, None)
        texts = jsonl(folder / "text.jsonl", [{"text": words(draw, 3, 12)} for _ in range(30)])
        pretrain = prepare_pretrain(folder / "pretrain", texts, tokenizer=base)
        labelled = jsonl(folder / "labelled.jsonl", [EXAMPLES[task](draw) for _ in range(60)])
        finetune = prepare_finetune(
            folder / "finetune", labelled, pretrain, tokenizer=base, task=task, dev_fraction=0.2, test_fraction=0.4
        )
        self.predictions = self._evaluate(folder, task, pretrain, finetune)
        records = {record["id"]: record for record in finetune.documents("test").records()}
        roles = TASK_KINDS[task].inputs
        self.inputs = [{role: records[name][role] for role in roles} for name in self.predictions]
        self.uri = self._register(folder, task)
        self.key = "inputs" if len(roles) == 1 else "dataframe_records"

    @staticmethod
    def _evaluate(folder: Path, task: Task, pretrain: Prepared, finetune: Prepared) -> dict[str, Any]:
        config = EvaluateStep(
            max_length=MAX_LENGTH, metric=METRIC[task], max_new_tokens=MAX_NEW_TOKENS, batch_size=4, max_tokens=None,
            precision="float32",
        )  # fmt: skip
        outputs = {name: Artifact(str(folder / name)) for name in ("evaluation", "metrics", "classification")}
        run_evaluate(
            config, context=Context.for_tests(), model=Artifact(str(folder / "model")), other=None,
            pretrain_heldout=pretrain.heldout, finetune_heldout=finetune.heldout, **outputs,
        )  # fmt: skip
        rows = read_jsonl(folder / "evaluation" / "finetuned" / "test.examples.jsonl")
        return {row["id"]: row["prediction"] for row in rows}

    @staticmethod
    def _register(folder: Path, task: Task) -> str:
        write_report(folder / "comparison", "finetuned", task)
        comparison = Artifact(str(folder / "comparison"))
        run_register(
            RegisterStep(registered_model="tiny", alias="candidate", max_length=MAX_LENGTH, max_new_tokens=MAX_NEW_TOKENS),
            context=Context("register", Tracker.open("register", "register", "run-1"), "run-1", quiet=True),
            selected=Artifact(str(folder / "model")), other=comparison, comparison=comparison,
            model=Artifact(str(folder / "registered")),
        )  # fmt: skip
        return "models:/tiny@candidate"

    def rows(self) -> list[Any]:
        """The inputs as MLflow takes them: texts alone, or one object for each question."""
        return [next(iter(row.values())) if len(row) == 1 else row for row in self.inputs]


def assert_as_scored(scored: Scored, answers: list[dict[str, Any]]) -> None:
    found, expected = [row["prediction"] for row in answers], list(scored.predictions.values())
    assert found == (pytest.approx(expected, abs=1e-5) if isinstance(expected[0], float) else expected)
    assert len({str(one) for one in expected}) > 2, "the model tells its inputs apart"


@pytest.mark.parametrize(
    ("task", "architecture"),
    [
        ("classification", "llama"), ("classification", "gpt2"), ("multi_label", "llama"), ("regression", "llama"),
        ("question_answering", "bert"), ("question_answering", "roberta"), ("generation", "llama"),
    ],
)  # fmt: skip
def test_a_registered_model_predicts_what_was_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: Task, architecture: str
) -> None:
    import mlflow
    import pandas as pd
    from mlflow.pyfunc.scoring_server import invocations

    monkeypatch.setenv("MLFLOW_TRACKING_URI", new_store(tmp_path / "mlflow.db"))
    scored = Scored(tmp_path, task, architecture)
    folder = Path(mlflow.artifacts.download_artifacts(scored.uri))
    assert (folder / "model" / "training.jsonl").is_file()
    assert {file.suffix for file in (folder / "components" / "tokenizer").iterdir()} == {".json"}
    model = mlflow.pyfunc.load_model(scored.uri)
    request = json.dumps({scored.key: scored.rows()})
    answer = invocations(request, "application/json", model, model.metadata.get_input_schema())
    assert_as_scored(scored, json.loads(answer.response)["predictions"])
    assert_as_scored(
        scored, model.predict(pd.DataFrame(scored.inputs) if task == "question_answering" else scored.rows())
    )
    if task == "generation":
        (short,) = model.predict(scored.rows()[:1], params={"max_new_tokens": 1})
        assert len(short["prediction"].split()) <= 1


@pytest.mark.parametrize(("task", "architecture"), [("multi_label", "llama"), ("question_answering", "bert")])
def test_mlflows_server_answers_what_was_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: Task, architecture: str
) -> None:
    uri = new_store(tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    scored = Scored(tmp_path, task, architecture)
    with served(scored.uri, uri) as address:
        assert_as_scored(scored, sent(address, {scored.key: scored.rows()})["predictions"])
