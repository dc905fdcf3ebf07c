"""Tasks of lm-evaluation-harness on real small models, against log-likelihoods computed by hand."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from mixtune.components.evaluate.config import LmEvalStep
from mixtune.components.evaluate.harness import Harness
from mixtune.components.shared.artifacts import read_jsonl, write_jsonl
from mixtune.components.shared.errors import RefusedError, UnreachableError
from mixtune.components.shared.measures import Measure
from mixtune.components.shared.model.loading import load_model
from mixtune.components.shared.model.tokenizer import load_tokenizer
from mixtune.components.shared.running.context import Context

from ..shared.tiny import tiny_model, tiny_tokenizer
from .harness_made import TASKS, write_tasks
from .made import LABELS, evaluate, write_labelled, write_model

pytestmark = pytest.mark.numeric


@pytest.fixture(autouse=True)
def _float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixtune.components.evaluate.harness.pick_precision", lambda precision: "float32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("harness") / "tasks")


def measured(folder: Path, *tasks: str, batch_size: int = 3, seed: int = 0, **options: Any) -> dict[str, Measure]:
    """By task and metric."""
    settings = LmEvalStep(tasks=list(tasks), tasks_folder=str(folder), **options)
    model, words = tiny_model("llama", seed=seed).eval(), tiny_tokenizer()
    rows = Harness(settings, batch_size).measure(model, words, Context.for_tests(), "tiny")
    return {f"{row.task} {row.metric}": row for row in rows}


def nats(model: Any, prompt: str, continuation: str) -> float:
    """-log P(continuation | prompt), one text at a time."""
    before, all_of_it = (tiny_tokenizer()(text)["input_ids"] for text in (prompt, f"{prompt} {continuation}"))
    with torch.no_grad():
        log_p = model(torch.tensor([all_of_it])).logits[0].log_softmax(-1)
    return -sum(float(log_p[at - 1, all_of_it[at]]) for at in range(len(before), len(all_of_it)))


def asked(folder: Path) -> list[dict[str, Any]]:
    return list(read_jsonl(folder / "asked.jsonl"))


def test_multiple_choice_goes_by_the_log_likelihood(folder: Path) -> None:
    found = measured(folder, "tiny_choice")
    model = tiny_model("llama").eval().lm
    plain, by_length = [], []
    for row in asked(folder):
        of_each = np.array([nats(model, row["question"], choice) for choice in row["choices"]])
        plain.append(float(of_each.argmin() == row["answer"]))
        by_length.append(float((of_each / [len(choice) for choice in row["choices"]]).argmin() == row["answer"]))
    acc = found["tiny_choice acc"]
    assert acc.values == plain
    assert acc.value == pytest.approx(np.mean(plain))
    assert acc.stderr == pytest.approx(np.std(plain, ddof=1) / math.sqrt(7))
    assert acc.higher_is_better
    assert found["tiny_choice acc_norm"].values == by_length
    assert 0 < sum(plain) < 7


def test_a_perplexity_is_that_of_the_log_likelihoods_and_has_no_standard_error(folder: Path) -> None:
    found = measured(folder, "tiny_cloze")
    model = tiny_model("llama").eval().lm
    mean = np.mean([nats(model, row["question"], row["reference"]) for row in asked(folder)])
    perplexity = found["tiny_cloze perplexity"]
    assert perplexity.value == pytest.approx(math.exp(mean), rel=1e-4)
    assert (perplexity.stderr, perplexity.values, perplexity.higher_is_better) == (None, None, False)
    assert found["tiny_cloze acc"].stderr == 0.0


def test_bits_per_byte_of_whole_texts(folder: Path) -> None:
    """The first token is predicted, too, from the token that begins a text."""
    row = measured(folder, "tiny_text")["tiny_text bits_per_byte"]
    model = tiny_model("llama").eval().lm
    texts = [row["question"] for row in asked(folder)]
    whole = sum(nats(model, "<s>", text) for text in texts)
    assert row.value == pytest.approx(whole / math.log(2) / sum(len(text) for text in texts), rel=1e-4)
    assert (row.stderr, row.higher_is_better) == (None, False)


def test_text_is_generated_greedily(folder: Path, tmp_path: Path) -> None:
    """The references are made what the model writes, for all questions but one."""
    own = write_tasks(tmp_path / "tasks")
    model, words = tiny_model("llama").eval(), tiny_tokenizer()
    rows = asked(own)
    for row in rows:
        prompt = torch.tensor([words(row["question"])["input_ids"]])
        written = model.generate(input_ids=prompt, max_new_tokens=3, do_sample=False)[0, prompt.shape[1] :]
        row["reference"] = words.decode(written, skip_special_tokens=True)
    rows[2]["reference"] = "something else"
    write_jsonl(own / "asked.jsonl", rows)
    found = measured(own, "tiny_answer")["tiny_answer exact_match"]
    assert found.values == [1, 1, 0, 1, 1, 1, 1]
    assert found.stderr == pytest.approx(1 / 7)


def test_functions_of_the_users_own_word_the_prompt(folder: Path) -> None:
    by_function, by_template = measured(folder, "tiny_function"), measured(folder, "tiny_choice")
    assert by_function["tiny_function acc"].values == by_template["tiny_choice acc"].values


def test_a_group_has_one_row_over_all_its_examples(folder: Path) -> None:
    found = measured(folder, "tiny_group")
    parts = measured(folder, "tiny_part", "tiny_other_part")
    assert set(found) == {"tiny_group acc"}
    values = [*(parts["tiny_part acc"].values or []), *(parts["tiny_other_part acc"].values or [])]
    whole = found["tiny_group acc"]
    assert whole.values == values
    assert whole.examples == 14
    assert whole.value == pytest.approx(np.mean(values))


def test_the_batch_changes_nothing_and_again_is_the_same(folder: Path) -> None:
    once, again = (measured(folder, *TASKS, few_shot=2, batch_size=size) for size in (1, 4))
    for name, row in once.items():
        assert row.value == pytest.approx(again[name].value, rel=1e-5)
        assert row.model_dump(exclude={"value"}) == again[name].model_dump(exclude={"value"})


def test_limit_and_solved_examples(folder: Path) -> None:
    plain, few = (measured(folder, "tiny_cloze", few_shot=shots)["tiny_cloze perplexity"] for shots in (None, 3))
    assert (plain.few_shot, few.few_shot) == (0, 3)
    assert plain.value != few.value
    assert plain.digest != few.digest
    assert measured(folder, "tiny_cloze", limit=2)["tiny_cloze perplexity"].examples == 2


def test_precision_is_that_of_the_evaluation(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = measured(folder, "tiny_cloze")["tiny_cloze perplexity"].value
    monkeypatch.setattr("mixtune.components.evaluate.harness.pick_precision", lambda precision: "bf16")
    rough = measured(folder, "tiny_cloze")["tiny_cloze perplexity"].value
    assert rough != exact
    assert rough == pytest.approx(exact, rel=0.05)


def test_a_name_that_mlflow_takes() -> None:
    fields: dict[str, Any] = {"value": 1, "stderr": None, "examples": 1, "digest": "", "values": None}
    row = Measure(task="wmt16-ro-en", metric="chrf++", filter="strict|match", **fields)
    assert row.metric_name == "lm_eval.wmt16-ro-en.chrf__.strict_match"
    assert row.words == "wmt16-ro-en, chrf++ (strict|match)"


def test_unknown_tasks_are_all_named_with_near_ones(folder: Path) -> None:
    with pytest.raises(RefusedError) as refused:
        measured(folder, "hellaswagg", "tiny_choise", "tiny_choice")
    first, second = refused.value.problems
    assert first.startswith(
        "evaluate.lm_eval.tasks: lm-evaluation-harness knows no task hellaswagg; near it are hellaswag"
    )
    assert "tiny_choise; near it are tiny_choice" in second
    assert f"{folder} defines" in second


@pytest.mark.parametrize(
    ("task", "error", "words"),
    [
        ("tiny_invented_metric", RefusedError, "a metric that lm-evaluation-harness does not have"),
        ("tiny_foreign_metric", RefusedError, "the metric from_the_hub that"),
        ("tiny_hub_code", RefusedError, "it loads the metric exact_match from the hub"),
        ("tiny_unsafe", RefusedError, "runs code that the model wrote"),
        ("tiny_broken", RefusedError, "tiny_broken cannot be"),
        ("tiny_elsewhere", UnreachableError, "the data of tiny_elsewhere cannot be fetched"),
    ],
)
def test_what_cannot_be_measured_is_said_in_one_sentence(
    folder: Path, task: str, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words) as refused:
        measured(folder, task)
    assert "\n" not in str(refused.value)
    assert str(refused.value).startswith("evaluate.lm_eval.tasks: ")


def test_where_the_harness_is_not_installed_the_step_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(RefusedError, match=r"not installed here; install mixtune with the extra lm-eval"):
        measured(folder, "tiny_choice")


def test_a_masked_language_model_is_refused(tmp_path: Path, folder: Path) -> None:
    model = write_model(tmp_path / "model", "finetuned", "finetuned", LABELS, architecture="bert")
    with pytest.raises(RefusedError, match=r"evaluate.lm_eval.tasks: finetuned is a masked language model"):
        evaluate(
            tmp_path, model, write_labelled(tmp_path / "labelled"),
            lm_eval=LmEvalStep(tasks=["tiny_choice"], tasks_folder=str(folder)),
        )  # fmt: skip


def test_the_step_measures_a_model_with_a_head_and_each_interpolation(tmp_path: Path, folder: Path) -> None:
    """What is measured is what plain transformers loads from the folder; the rest of the evaluation is as without."""
    labelled = write_labelled(tmp_path / "labelled")
    models = [
        write_model(tmp_path / name, name, name, labels, seed)  # type: ignore[arg-type]
        for seed, (name, labels) in enumerate({"pretrained": None, "finetuned": LABELS}.items())
    ]
    lm_eval = LmEvalStep(tasks=["tiny_cloze", "tiny_choice"], tasks_folder=str(folder), limit=5)
    options: dict[str, Any] = {"precision": "float32", "lm_eval": lm_eval}

    without, _ = evaluate(tmp_path, models[1], labelled, precision="float32")
    assert without["candidates"][0]["lm_eval"] == {}
    assert not (tmp_path / "evaluation" / "finetuned" / "lm_eval.jsonl").exists()
    found, _ = evaluate(tmp_path, models[1], labelled, **options)
    (entry,) = found["candidates"]
    assert entry["splits"] == without["candidates"][0]["splits"]
    plain = AutoModelForCausalLM.from_pretrained(models[1].path).eval()
    mean = np.mean([nats(plain, row["question"], row["reference"]) for row in asked(folder)[:5]])
    assert entry["lm_eval"]["lm_eval.tiny_cloze.perplexity"]["value"] == pytest.approx(math.exp(mean), rel=1e-4)
    rows = list(read_jsonl(tmp_path / "evaluation" / "finetuned" / "lm_eval.jsonl"))
    assert [(row["task"], row["metric"], row["examples"]) for row in rows] == [
        ("tiny_cloze", "perplexity", 5), ("tiny_cloze", "acc", 5), ("tiny_choice", "acc", 5), ("tiny_choice", "acc_norm", 5),
    ]  # fmt: skip

    between, _ = evaluate(tmp_path, models[0], labelled, other=models[1], interpolation_alphas=[0.25, 0.75], **options)
    assert [one["id"] for one in between["candidates"]] == ["interpolated-0.25", "interpolated-0.75"]
    values = [one["lm_eval"]["lm_eval.tiny_cloze.perplexity"]["value"] for one in between["candidates"]]
    assert len({*values, entry["lm_eval"]["lm_eval.tiny_cloze.perplexity"]["value"]}) == 3


def test_measuring_leaves_model_and_tokenizer_as_they_were(tmp_path: Path, folder: Path) -> None:
    path = write_model(tmp_path / "model", "pretrained", "pretrained").path
    model, words = load_model(path).eval(), load_tokenizer(path)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    settings, side = repr(model.lm.generation_config), words.padding_side
    Harness(LmEvalStep(tasks=TASKS, tasks_folder=str(folder)), 3).measure(model, words, Context.for_tests(), "tiny")
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert repr(model.lm.generation_config) == settings
    assert words.padding_side == side
