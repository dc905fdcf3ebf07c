"""Chats the whole way: from messages in a file to the answers of plain transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, pipeline

from mixtune.components.evaluate.config import EvaluateStep
from mixtune.components.evaluate.step import run as run_evaluate
from mixtune.components.mixed.config import MixedCandidate, MixedStep, MixedTraining
from mixtune.components.mixed.step import run as run_mixed
from mixtune.components.pretrain.config import Pretrain, PretrainStep
from mixtune.components.pretrain.step import run as run_pretrain
from mixtune.components.shared.artifacts import Artifact, ModelCard, read_jsonl, write_json
from mixtune.components.shared.config import Model
from mixtune.components.shared.data.prepared import Documents
from mixtune.components.shared.running.context import Context
from mixtune.components.shared.serving.chats import end_of_turn
from mixtune.components.shared.serving.predictor import SETTINGS, Predictor
from tests.components.prepare.chat_families import tokenizer_of
from tests.components.prepare.prepared import jsonl, prepare_finetune, prepare_pretrain, tokenizer_options
from tests.components.stages import OPTIONS

pytestmark = pytest.mark.numeric
MAX_LENGTH, MAX_NEW_TOKENS = 64, 6
COLOURS = ("red", "blue", "green")


def turns(*contents: str) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)]


class Trained:
    """A tiny model with the template of Gemma, whose turns end in another token than texts, after training on chats."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.tokenizer = folder, tokenizer_of("gemma")
        torch.manual_seed(0)
        config: Any = LlamaConfig(
            vocab_size=len(self.tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
            eos_token_id=self.tokenizer.eos_token_id, bos_token_id=self.tokenizer.bos_token_id,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder / "base")
        self.tokenizer.save_pretrained(folder / "base")
        rows = []
        for n in range(48):
            colour = COLOURS[n % 3]
            asked = turns(f"{colour} {n}", colour)
            rows.append({"messages": [*turns("hello", "hi"), *asked] if n % 2 else asked})
        replay = [{"messages": turns(f"count {n}", f"{n} {n + 1}", "more", f"{n + 2}")} for n in range(40)]
        options = tokenizer_options(base=str(folder / "base"), max_length=MAX_LENGTH, vocabulary_size=None)
        self.text = prepare_pretrain(folder / "text", jsonl(folder / "replay.jsonl", replay), tokenizer=options)
        self.examples = prepare_finetune(
            folder / "examples", jsonl(folder / "chats.jsonl", rows), self.text, tokenizer=options, task="generation"
        )
        self._train()
        self.rows = self._evaluate()

    def artifact(self, name: str) -> Artifact:
        return Artifact(str(self.folder / name))

    def _train(self) -> None:
        context = Context.for_tests()
        run_pretrain(
            PretrainStep(
                seed=0, model=Model(base=str(self.folder / "base"), max_length=MAX_LENGTH), pretrain=Pretrain(steps=0),
                fingerprint="",
            ),
            context=context, data=self.text.train, tokenizer=self.text.tokenizer, model=self.artifact("pretrained"),
            metrics=self.artifact("metrics"),
        )  # fmt: skip
        training = MixedTraining.model_validate(OPTIONS | {"steps": 80, "learning_rate": 2e-2})
        run_mixed(
            MixedStep(seed=0, max_length=MAX_LENGTH, mixed=training), context=context,
            candidate=MixedCandidate(id="mixed-0.1", mix_weight=0.1).to_json(), start=self.artifact("pretrained"),
            pretrain_data=self.text.train, finetune_data=self.examples.train, pretrained=None,
            model=self.artifact("mixed"), metrics=self.artifact("metrics"),
        )  # fmt: skip

    def _evaluate(self) -> list[dict[str, Any]]:
        config = EvaluateStep(
            max_length=MAX_LENGTH, metric="exact_match", batch_size=4, max_tokens=None, max_new_tokens=MAX_NEW_TOKENS,
            precision="float32",
        )  # fmt: skip
        run_evaluate(
            config, context=Context.for_tests(), model=self.artifact("mixed"), other=None,
            pretrain_heldout=self.text.heldout, finetune_heldout=self.examples.heldout,
            evaluation=self.artifact("evaluation"), metrics=self.artifact("metrics"),
            classification=self.artifact("classification"),
        )  # fmt: skip
        return list(read_jsonl(self.folder / "evaluation" / "mixed-0.1" / "test.examples.jsonl"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tmp_path_factory.mktemp("chats"))


def test_evaluation_scores_the_turns_of_the_assistant(trained: Trained) -> None:
    documents = trained.examples.documents("test")
    records = {record["id"]: record for record in documents.records()}
    learned = [len(documents.supervised(*documents.offsets[i : i + 2].tolist())) for i in range(len(documents))]  # type: ignore[arg-type]
    assert [row["tokens"] for row in trained.rows] == learned
    for row in trained.rows:
        assert row["reference"] == records[row["id"]]["messages"][-1]["content"]
    assert np.mean([row["score"] for row in trained.rows]) > 0.5, "the model has learned the task"


def test_forgetting_is_measured_on_the_turns_of_the_assistant(trained: Trained) -> None:
    rows = list(read_jsonl(trained.folder / "evaluation" / "mixed-0.1" / "test.documents.jsonl"))
    lm = LlamaForCausalLM.from_pretrained(trained.folder / "mixed").eval()
    documents: Documents = trained.text.documents("test")
    for index, (row, record) in enumerate(zip(rows, documents.records(), strict=True)):
        said = [turn["content"] for turn in record["messages"][1::2]]
        assert row["bytes"] == len("".join(said).encode())
        ids = torch.from_numpy(documents.tokens(index).astype(np.int64))[None]
        with torch.inference_mode():
            losses = -lm(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        starts = [place for place in range(ids.shape[1]) if _follows_prompt(trained, ids[0, :place].tolist())]
        end = end_of_turn(trained.tokenizer)
        spans = [(start, ids[0].tolist().index(end, start) + 1) for start in starts]
        expected = sum(float(losses[start - 1 : stop - 1].sum()) for start, stop in spans)
        assert row["tokens"] == sum(stop - start for start, stop in spans)
        assert row["nats"] == pytest.approx(expected, rel=1e-4)


def _follows_prompt(trained: Trained, ids: list[int]) -> bool:
    return str(trained.tokenizer.decode(ids)).endswith("<start_of_turn>model\n")


def test_plain_transformers_answers_as_in_evaluation(trained: Trained) -> None:
    assert ModelCard.load(trained.folder / "mixed").chat
    answer = pipeline("text-generation", model=str(trained.folder / "mixed"))
    records = {record["id"]: record for record in trained.examples.documents("test").records()}
    for row in trained.rows:
        messages = records[row["id"]]["messages"][:-1]
        made = answer(messages, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        said = made[0]["generated_text"][-1]
        assert said["role"] == "assistant"
        assert said["content"].strip() == row["prediction"]


def test_the_registered_model_answers_as_in_evaluation(trained: Trained) -> None:
    import pandas as pd

    settings = {"auto_class": "AutoModelForCausalLM", "target": "text", "max_length": MAX_LENGTH, "chat": True}
    write_json(trained.folder / "mixed" / SETTINGS, settings | {"max_new_tokens": MAX_NEW_TOKENS})
    records = {record["id"]: record for record in trained.examples.documents("test").records()}
    asked = [records[row["id"]]["messages"][:-1] for row in trained.rows]
    texts = [one[0]["content"] if len(one) == 1 else json.dumps(one) for one in asked]
    found = Predictor(trained.folder / "mixed").predict(pd.DataFrame({"prompt": texts}))
    assert [one["prediction"] for one in found] == [row["prediction"] for row in trained.rows]
