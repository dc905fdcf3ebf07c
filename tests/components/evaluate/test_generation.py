"""Where answers end, what the model's own settings do, and logits that are not finite."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from mixtune.components.evaluate.scores import exact_match
from mixtune.components.shared.artifacts import Artifact, ModelCard, read_jsonl
from mixtune.components.shared.data.prepared import DataManifest, Document, write_split
from mixtune.components.shared.errors import MixtuneError
from mixtune.components.shared.model.generation import generate
from mixtune.components.shared.model.loading import load_model
from mixtune.components.shared.model.mixed_model import MixedModel
from mixtune.components.shared.model.packing import Segment, collate
from mixtune.components.shared.model.tokenizer import load_tokenizer
from mixtune.components.shared.running.context import Context
from mixtune.components.shared.serving.decoding import plain_text, stop_ids

from ..shared.tiny import tiny_model, tiny_tokenizer
from .made import evaluate, write_labelled, write_model, write_text

pytestmark = pytest.mark.numeric

PROMPTS = [np.arange(length) % 50 for length in (4, 9, 6, 3)]


@pytest.fixture(autouse=True)
def _float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixtune.components.shared.model.precision.pick_precision", lambda precision: "float32")


def answers(model: MixedModel, batch_size: int = 4) -> list[str | None]:
    progress = Context.for_tests().progress(1, "batches")
    return generate(model.eval(), tiny_tokenizer(), PROMPTS, 8, batch_size, progress)


def own(model: MixedModel, **settings: Any) -> MixedModel:
    lm: Any = model.lm
    lm.generation_config = GenerationConfig(**settings)
    return model


def test_answers_end_before_the_models_own_stop_token(tmp_path: Path) -> None:
    """It need not be a special token, and it is still known after the model was written and read."""
    free = answers(tiny_model("llama"))
    stop = int((free[0] or "").split()[2][1:])
    own(tiny_model("llama"), eos_token_id=[59, stop]).save(tmp_path / "model", tiny_tokenizer())
    stopped = answers(load_model(tmp_path / "model"))
    for before, after in zip(free, stopped, strict=True):
        words = (before or "").split()
        end = words.index(f"w{stop}") if f"w{stop}" in words else len(words)
        assert after == " ".join(words[:end])
    assert len((stopped[0] or "").split()) < len((free[0] or "").split())


def test_nothing_but_the_likeliest_token_counts(tmp_path: Path) -> None:
    """Whatever a model's own settings ask for, and they are still there afterwards."""
    free = answers(tiny_model("llama"))
    asked = {
        "repetition_penalty": 5.0,
        "do_sample": True,
        "temperature": 3.0,
        "no_repeat_ngram_size": 1,
        "min_length": 40,
    }
    model = own(tiny_model("llama"), **asked)
    plain = AutoModelForCausalLM.from_config(model.config)
    plain.load_state_dict(model.lm.state_dict())
    plain.generation_config = GenerationConfig(**{**asked, "do_sample": False, "temperature": None})
    penalised = plain.eval().generate(torch.tensor(PROMPTS[0])[None], max_new_tokens=8)[0, len(PROMPTS[0]) :]
    assert tiny_tokenizer().decode(penalised, skip_special_tokens=True) != free[0]
    assert answers(model) == free
    settings: Any = model.lm.generation_config
    assert settings.repetition_penalty == 5.0


def few_positions(architecture: str) -> MixedModel:
    """A random model for texts of 64 tokens."""
    model = tiny_model(architecture)
    if architecture == "llama":
        config: Any = model.config
        config.max_position_embeddings = 64
    outputs: Any = model.lm.get_output_embeddings()
    outputs.weight.data[57:] = 0  # other tokens are likelier than special ones
    return model


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_answers_do_not_depend_on_the_batch(architecture: str) -> None:
    """Also where a long prompt leaves less room than the others need; it has what room it leaves itself."""
    assert answers(tiny_model(architecture), 1) == answers(tiny_model(architecture), 4)
    prompts = [np.arange(length) * 7 % 50 for length in (4, 60, 9, 62, 6, 62, 56, 57, 3, 64, 40)]
    model = own(few_positions(architecture)).eval()
    found = {
        size: generate(model, tiny_tokenizer(), prompts, 8, size, Context.for_tests().progress(11, "prompts"))
        for size in (1, 2, 3, 32)
    }
    assert found[1] == found[2] == found[3] == found[32]
    rooms = [len((text or "").split()) for text in found[1]]
    assert rooms == [min(8, 64 - len(prompt)) for prompt in prompts]


def test_an_answer_whose_logits_are_not_finite_is_none_and_the_others_stay() -> None:
    free = answers(tiny_model("llama"))
    model = tiny_model("llama")
    poisoned = 8  # in the second prompt alone
    dict(model.lm.named_parameters())["model.embed_tokens.weight"].data[poisoned] = torch.nan
    found = answers(model)
    expected = [None if number == 1 or "w8 " in f"{text} " else text for number, text in enumerate(free)]
    assert found == expected
    assert None in found
    assert found != [None] * 4


def test_a_written_answer_that_is_not_finite_has_no_score_and_is_named(tmp_path: Path) -> None:
    network = tiny_model("llama")
    network.save(tmp_path / "model", tiny_tokenizer())
    ModelCard(id="finetuned", kind="finetuned", has_task_head=True).save(tmp_path / "model")
    dict(network.lm.named_parameters())["lm_head.weight"].data[3] = torch.inf
    network.save(tmp_path / "model", tiny_tokenizer())
    write_text(tmp_path / "text")
    with pytest.raises(MixtuneError, match=r"finetuned: the loss of example test-e0 \(test\) is not finite"):
        evaluate(
            tmp_path,
            Artifact(str(tmp_path / "model")),
            write_labelled(tmp_path / "labelled", "generation"),
            metric="bleu",
        )
    test = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())["candidates"][0]["splits"]["test"]
    metrics = ("task_score", "exact_match", "token_f1", "rouge_1", "rouge_2", "rouge_l", "bleu", "chrf")
    assert {test[name] for name in metrics} == {None}
    rows = list(read_jsonl(tmp_path / "evaluation" / "finetuned" / "test.examples.jsonl"))
    assert {row["score"] for row in rows} == {None}


def lowering() -> Any:
    """A tokenizer that changes its texts: lower case, and a name and a literal EOS that are special tokens."""
    words = [
        *(chr(letter) for letter in range(ord("a"), ord("z") + 1)),
        "<pad>",
        "<s>",
        "</s>",
        "<TOWN>",
        "<CITY>",
        "winter",
    ]
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="a"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrap: Any = PreTrainedTokenizerFast
    return wrap(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        additional_special_tokens=["<TOWN>", "<CITY>"],
    )  # fmt: skip


COMPLETIONS = ["<TOWN>", "to <TOWN> b", "winter</s>", "Winter", "winter </s> winter", " A  b "]


def test_the_tokens_of_the_reference_are_a_right_answer(tmp_path: Path) -> None:
    """A model that has learned the completions by heart has every score in full."""
    tokenizer, model = lowering(), tiny_model("llama")
    documents = []
    for number, completion in enumerate(COMPLETIONS):
        tokens = [number, *tokenizer(completion, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        record = {"id": str(number), "source": "made", "bytes": 9, "prompt": chr(97 + number), "completion": completion}
        documents.append(Document(tokens, record, supervised_from=1))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(60):
        losses = model(collate([[Segment(np.array(one.tokens), 1)] for one in documents], 60), 0.0, 1.0)
        losses["weighted"].backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save(tmp_path / "model", tokenizer)
    ModelCard(id="finetuned", kind="finetuned", has_task_head=True).save(tmp_path / "model")
    splits: dict[Any, Any] = {split: write_split(tmp_path / "labelled", split, documents) for split in ("dev", "test")}
    DataManifest(
        stream="finetune", task="generation", max_length=16, vocabulary_size=61, source="made", splits=splits
    ).save(tmp_path / "labelled")
    found, folder = evaluate(tmp_path, Artifact(str(tmp_path / "model")), Artifact(str(tmp_path / "labelled")))
    test = found["candidates"][0]["splits"]["test"]
    rows = list(read_jsonl(folder / "finetuned" / "test.examples.jsonl"))
    assert [row["prediction"] for row in rows] == ["<TOWN>", "a <TOWN> b", "winter", "winter", "winter", "a b"]
    assert {test[name] for name in ("exact_match", "token_f1", "rouge_l", "chrf")} == {1.0}


def test_another_special_token_is_a_wrong_answer() -> None:
    tokenizer = lowering()
    stops = stop_ids(tiny_model("llama").lm.generation_config, tokenizer)
    town, city = (
        plain_text(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"], stops)
        for text in ("<TOWN>", "<CITY>")
    )
    assert exact_match(town, city) == 0.0


def test_rows_carry_what_compare_resamples(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "pretrained", "pretrained")
    assert load_tokenizer(model.path).pad_token_id is not None
    for metric in ("rouge_l", "chrf", "bleu"):
        found, folder = evaluate(tmp_path, model, write_labelled(tmp_path / "labelled", "generation"), metric=metric)
        rows = list(read_jsonl(folder / "pretrained" / "test.examples.jsonl"))
        assert [(len(row["bleu_counts"]), len(row["chrf_counts"])) for row in rows] == [(10, 18)] * 11
        assert [row["score"] for row in rows] == [row[metric] for row in rows]
        test = found["candidates"][0]["splits"]["test"]
        assert test["task_score"] == test[metric]
        assert "version:2.6.0" in found["task"]["signatures"]["chrf"]
        if metric == "rouge_l":
            assert test[metric] == pytest.approx(np.mean([row["score"] for row in rows]))


def test_the_references_of_both_splits_choose_bleus_tokenizer(tmp_path: Path) -> None:
    """Chinese test references alone make it that of Chinese; then every character is a word."""
    labelled = write_labelled(tmp_path / "labelled", "generation", examples=(2, 3))
    path = tmp_path / "labelled" / "test" / "records.jsonl"

    def chinese(word: str) -> str:
        return "今天的" + chr(0x4E00 + int(word[1:]))

    records = list(read_jsonl(path))
    for record in records:
        record["completion"] = " ".join(chinese(word) for word in record["completion"].split())
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    model = write_model(tmp_path / "model", "pretrained", "pretrained")
    tokenizer = tmp_path / "model" / "tokenizer.json"
    settings = json.loads(tokenizer.read_text())
    words = settings["model"]["vocab"]
    settings["model"]["vocab"] = {
        chinese(word) if word.startswith("w") else word: number for word, number in words.items()
    }
    settings["model"]["unk_token"] = chinese("w0")
    tokenizer.write_text(json.dumps(settings))
    found, folder = evaluate(tmp_path, model, labelled, metric="rouge_l")
    assert "tok:zh|" in found["task"]["signatures"]["bleu"]
    rows = list(read_jsonl(folder / "pretrained" / "test.examples.jsonl"))
    assert [row["bleu_counts"][1] for row in rows] == [8, 8, 8]
