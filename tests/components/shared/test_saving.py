"""A saved model is a plain model: `transformers` loads it, as language model and for the task, and says what ours says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    pipeline,
)

from mixtune.components.shared.config import Task
from mixtune.components.shared.model.loading import load_model
from mixtune.components.shared.model.mixed_model import MixedModel
from mixtune.components.shared.model.packing import Segment, collate
from mixtune.components.shared.training.optimizer import is_task_head

from .test_loss import PAIRS
from .tiny import ENCODERS, LABELS, random_documents, tiny_model, tiny_tokenizer
from .trained import run, write_both

pytestmark = pytest.mark.numeric

SECOND_FROM = 6
Saved = tuple[MixedModel, Path, str, Task]


@pytest.fixture(scope="module", params=PAIRS, ids=lambda pair: "-".join(pair))
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A model after two steps of training, and the folder that it was saved in."""
    architecture, task = request.param
    folder = tmp_path_factory.mktemp("saved")
    model, _ = run(write_both(folder, task), task, architecture, steps=2)
    model.save(folder / "model", tokenizer_of(architecture))
    return model.eval(), folder / "model", architecture, task


def tokenizer_of(architecture: str) -> Any:
    """Ends for encoders; no token types for the others, of whose tokenizers none gives any."""
    tokenizer: Any = tiny_tokenizer(ends=architecture in ENCODERS)
    if architecture not in ENCODERS:
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
    return tokenizer


def say(what: str, folder: Path, architecture: str) -> Any:
    """A pipeline of transformers on the saved model."""
    # Of Qwen2, transformers takes no tokenizer file that is not byte-level BPE.
    return pipeline(what, model=str(folder), tokenizer=tokenizer_of(architecture))  # type: ignore[call-overload]


def document() -> np.ndarray:
    return random_documents(1, seed=11, low=12)[0]


def text_of(tokens: np.ndarray) -> str:
    return " ".join(f"w{token}" for token in tokens)


@torch.no_grad()
def ours(model: MixedModel, tokens: np.ndarray, second_from: int = -1) -> tuple[Tensor, Tensor | None]:
    """Logits of the language model at each token and of the task, behind another document in a packed row."""
    neighbour = random_documents(1, seed=12)[0]
    row = [Segment(neighbour, second_from=2), Segment(tokens, second_from=second_from)]
    batch = collate([row], 60, label_all=True)
    hidden = model.hidden(batch)
    of_language = model.lm_logits(hidden[len(neighbour) :])
    return of_language, model.task_logits(hidden, batch)[1] if model.task is not None else None


def plain(auto: Any, folder: Path) -> Any:
    """The model as plain transformers loads it, which must find every weight."""
    model, found = auto.from_pretrained(folder, output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["mismatched_keys"]
    return model.eval()


def theirs(architecture: str) -> tuple[dict[str, Tensor], int]:
    """The document as transformers takes it, with a second part where models of this type know one, and where that begins."""
    tokens = torch.from_numpy(document())[None]
    if architecture not in ("bert", "roberta"):
        return {"input_ids": tokens}, -1
    types = (torch.arange(tokens.shape[1]) >= SECOND_FROM).long()[None]
    return {"input_ids": tokens, "token_type_ids": types}, SECOND_FROM


@torch.no_grad()
def test_the_language_model_loads_with_plain_transformers(saved: Saved) -> None:
    model, folder, architecture, _ = saved
    lm = plain(AutoModelForMaskedLM if architecture in ENCODERS else AutoModelForCausalLM, folder)
    given, second = theirs(architecture)
    torch.testing.assert_close(ours(model, document(), second)[0], lm(**given).logits[0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_task_model_loads_with_plain_transformers(saved: Saved) -> None:
    model, folder, architecture, task = saved
    given, second = theirs(architecture)
    wanted = ours(model, document(), second)[1]
    if wanted is None:
        assert task == "generation"
        return
    if task == "question_answering":
        answer = plain(AutoModelForQuestionAnswering, folder)(**given)
        found = torch.stack([answer.start_logits[0], answer.end_logits[0]], -1)
        torch.testing.assert_close(wanted[: len(found)], found, rtol=1e-4, atol=1e-4)
        return
    classifier = plain(AutoModelForSequenceClassification, folder)
    torch.testing.assert_close(wanted, classifier(**given).logits[0], rtol=1e-4, atol=1e-4)
    labels = LABELS.get(task, ["value"])
    assert [classifier.config.id2label[index] for index in range(classifier.config.num_labels)] == labels


def test_pipelines_say_what_the_model_says(saved: Saved) -> None:
    model, folder, architecture, task = saved
    tokens = document()
    whole = np.array([58, *tokens, 59]) if architecture in ENCODERS else tokens
    of_task = ours(model, whole)[1]
    if of_task is not None and task != "question_answering":
        said = say("text-classification", folder, architecture)(text_of(tokens), top_k=None)
        scores = {"classification": of_task.softmax(-1), "multi_label": of_task.sigmoid(), "regression": of_task}[task]
        wanted = dict(zip(LABELS.get(task, ["value"]), scores.tolist(), strict=True))
        assert {one["label"]: one["score"] for one in said} == pytest.approx(wanted, abs=1e-4)
    if architecture in ENCODERS:
        whole[4] = 57
        likely = ours(model, whole)[0][4].softmax(-1)
        text = text_of(tokens).replace(f"w{tokens[3]}", "<mask>", 1) if tokens[3] not in tokens[:3] else None
        assert text is not None, "choose another document"
        for one in say("fill-mask", folder, architecture)(text, top_k=7):
            assert one["score"] == pytest.approx(float(likely[one["token"]]), abs=1e-4)
    else:
        generate = say("text-generation", folder, architecture)
        said = generate(text_of(tokens), max_new_tokens=4, do_sample=False, return_tensors=True)
        continued = said[0]["generated_token_ids"][len(tokens) :]
        assert 1 <= len(continued) <= 4
        for token in continued:
            likely = ours(model, tokens)[0][-1]
            assert float(likely[token]) == pytest.approx(float(likely.max()), abs=1e-4), (
                "the likeliest one, or as likely"
            )
            tokens = np.append(tokens, token)


def test_the_folder_holds_safetensors_and_gives_back_the_same_model(saved: Saved) -> None:
    model, folder, _, task = saved
    assert {path.suffix for path in folder.iterdir()} <= {".safetensors", ".json"}
    again = load_model(folder)
    assert (again.kind, again.labels) == (None if task == "generation" else task, LABELS.get(task))
    assert again.new_weights == []
    before, after = dict(model.named_parameters()), dict(again.named_parameters())
    assert before.keys() == after.keys()
    for name, weight in before.items():
        assert torch.equal(weight, after[name]), name


def test_a_head_of_another_task_is_left_behind(tmp_path: Path) -> None:
    """A model that has been trained for one task can be trained for another."""
    three = ["a", "b", "c"]
    tiny_model("bert", labels=three).save(tmp_path / "classifier", tiny_tokenizer(ends=True))
    model = load_model(tmp_path / "classifier")
    model.add_head("question_answering", None, 0)
    model.save(tmp_path / "answers", tiny_tokenizer(ends=True))
    assert plain(AutoModelForQuestionAnswering, tmp_path / "answers").config.num_labels == 2
    again = load_model(tmp_path / "answers")
    assert (again.kind, again.labels) == ("question_answering", None)
    again.add_head("regression", None, 0)
    again.save(tmp_path / "value", tiny_tokenizer(ends=True))
    assert (load_model(tmp_path / "value").kind, load_model(tmp_path / "value").labels) == ("regression", None)


def test_the_seed_alone_decides_the_weights_of_a_fresh_head() -> None:
    found = []
    for drawn_before, seed in ((0, 3), (1, 3), (0, 4)):
        model = tiny_model("bert")
        torch.manual_seed(drawn_before)
        model.add_head("classification", ["a", "b"], seed)
        found.append({name: weight.clone() for name, weight in model.named_parameters() if is_task_head(name)})
    assert found[0].keys() == {
        "task.classifier.weight", "task.classifier.bias", "lm.bert.pooler.dense.weight", "lm.bert.pooler.dense.bias",
    }  # fmt: skip
    assert all(torch.equal(weight, found[1][name]) for name, weight in found[0].items())
    assert not torch.equal(found[0]["task.classifier.weight"], found[2]["task.classifier.weight"])
