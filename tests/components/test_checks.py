"""What is found wrong with a base model, and with tasks that are asked for, before anything heavy starts."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from mixtune.components.checks import few_control_documents, find_problems, fingerprints, missing_here
from mixtune.components.config import Config, load
from mixtune.components.prepare.config import Tokenizer
from mixtune.components.prepare.tokenization import load_tokenizer
from mixtune.components.shared.data.sources import count_records
from mixtune.components.shared.errors import RefusedError
from tests.components.evaluate.harness_made import write_tasks
from tests.components.shared.tiny import tiny_model, tiny_tokenizer


def config(base: str | Path, lm_eval: dict[str, Any] | None = None, **model: Any) -> Config:
    stream: dict[str, Any] = {"source": "embedded"}
    return load(
        {"model": {"base": str(base), **model}, "data": {"pretrain": stream, "finetune": stream},
         "pretrain": {"steps": 1}, "evaluate": {"lm_eval": lm_eval or {}}}
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good model folder."""
    tiny_model().save(tmp_path / "model", tiny_tokenizer())
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("rows", "options", "noted", "refused"),
    [
        (1000, {}, False, False),
        (200, {}, True, False),
        (20, {}, True, True),
        (1000, {"control_fraction": 0}, True, True),
        (1000, {"max_documents": 100}, True, False),
    ],
)
def test_a_budget_needs_control_text(
    tmp_path: Path, rows: int, options: dict[str, Any], noted: bool, refused: bool
) -> None:
    file = tmp_path / "text.jsonl"
    file.write_text("".join(f'{{"text": "text {number}"}}\n' for number in range(rows)))
    text = {"source": str(file), **options}
    values = {"model": {"base": "scratch"}, "data": {"pretrain": text, "finetune": {"source": "embedded"}}}
    with_budget = load({**values, "pretrain": {"steps": 1}, "mixed": {"forgetting_budgets": [0.05]}})
    of_adapters = load(
        {**values, "pretrain": {"steps": 1}, "mixed": {"controls": {"lora_ranks": [4], "lora_budgets": [0.05]}}}
    )
    without = load({**values, "pretrain": {"steps": 1}})
    watched = load({**values, "pretrain": {"steps": 1}, "watch": {"every_steps": 5}})
    assert (few_control_documents(with_budget) is not None) == noted
    assert any("control_fraction" in problem for problem in find_problems(with_budget)) == refused
    assert (few_control_documents(of_adapters) is not None) == noted
    assert any("mixed.controls.lora_budgets needs some" in problem for problem in find_problems(of_adapters)) == refused
    assert any("watch.every_steps needs some" in problem for problem in find_problems(watched)) == refused
    assert few_control_documents(without) is None
    assert not any("control_fraction" in problem for problem in find_problems(without))


@pytest.mark.parametrize("ending", ["jsonl", "csv", "tsv", "parquet", "txt"])
def test_records_are_counted_without_being_parsed(tmp_path: Path, ending: str) -> None:
    table = pd.DataFrame({"text": ["one", "two", "three"], "label": ["a", "b", "a"]})
    file = tmp_path / f"labels.{ending}"
    if ending == "txt":
        file.write_text("one\n\ntwo\nthree")
    elif ending == "parquet":
        table.to_parquet(file)
    elif ending == "jsonl":
        table.to_json(file, orient="records", lines=True)
    else:
        table.to_csv(file, index=False, sep="\t" if ending == "tsv" else ",")
    assert count_records(str(file), "source") == 3
    assert count_records(str(tmp_path), "source") == 3
    assert count_records("s3://bucket/labels.jsonl", "source") is None
    (tmp_path / "labels.json").write_text("[]")
    assert count_records(str(tmp_path), "source") is None


def test_a_good_folder_a_hub_name_and_scratch_are_good(folder: Path) -> None:
    for base in (folder, "scratch", "owner/name", "gpt2", "owner/name-1.5_b"):
        assert find_problems(config(base)) == []


def test_chats_need_a_template(folder: Path, tmp_path: Path) -> None:
    source, template = tmp_path / "chats.jsonl", tmp_path / "own.jinja"
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    source.write_text(json.dumps({"messages": turns}) + "\n")
    template.write_text("{{ messages }}")
    chats = {"source": str(source)}

    def problems(base: str | Path, **model: Any) -> list[str]:
        data = {"pretrain": chats, "finetune": {**chats, "task": "generation"}}
        return find_problems(load({"model": {"base": str(base), **model}, "data": data, "pretrain": {"steps": 1}}))

    for base in ("scratch", folder):
        assert problems(base) == [
            f"data.{stream}: holds chats, but the tokenizer of {base} has no chat template; set model.chat_template to a Jinja "
            "file with one, for example that of the chat model whose format you want"
            for stream in ("pretrain", "finetune")
        ]
        assert problems(base, chat_template=str(template)) == []
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert problems(folder) == []


@pytest.mark.parametrize(
    ("base", "words"),
    [("./nowhere", "no folder"), ("a/b/c", "neither"), ("embedded", "not a model"), ("what?", "neither")],
)
def test_what_names_no_model_is_refused(base: str, words: str) -> None:
    (problem,) = find_problems(config(base))
    assert problem.startswith("model.base:")
    assert words in problem


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "no folder" in find_problems(config(tmp_path / "file"))[0]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "cannot be read as JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "cannot be read as JSON"),
        (lambda f: (f / "model.safetensors").unlink(), "no .safetensors"),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "can run code"),
        (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer"),
    ],
)
def test_a_folder_that_lacks_something_is_refused(folder: Path, spoil: Any, words: str) -> None:
    spoil(folder)
    (problem,) = find_problems(config(folder))
    assert words in problem


def test_a_tokenizer_that_does_not_fit_the_model_is_refused(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"vocab_size": 10}))
    of_weights, problem = find_problems(config(folder))
    assert "model.embed_tokens.weight has the shape 61 x 16, but config.json asks for 10 x 16" in of_weights
    assert "gives the token <pad> the id 60, but the model has 10 embeddings" in problem


def test_a_token_id_beyond_the_embeddings_is_refused(folder: Path) -> None:
    """The number of entries says nothing: ids can have gaps."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["far"] = 600
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (problem,) = find_problems(config(folder))
    assert "gives the token far the id 600, but the model has 61 embeddings" in problem
    with pytest.raises(RefusedError, match="the token far the id 600, but the model has 61 embeddings"):
        load_tokenizer(Tokenizer(base=str(folder), max_length=32, vocabulary_size=None, revision=None))
    lm: Any = tiny_model().lm
    lm.resize_token_embeddings(601)
    lm.save_pretrained(folder)
    assert find_problems(config(folder)) == []


def test_a_model_with_too_few_positions_is_refused(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"max_position_embeddings": 100}))
    (problem,) = find_problems(config(folder))
    assert "only 100 positions" in problem


def test_changed_weights_change_the_fingerprint(folder: Path) -> None:
    before = fingerprints(config(folder)).base
    assert fingerprints(config(folder)).base == before
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    assert fingerprints(config(folder)).base != before


def test_tasks_of_ones_own_are_known_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"tasks": ["tiny_choice"], "tasks_folder": str(write_tasks(tmp_path / "tasks"))}
    monkeypatch.setitem(sys.modules, "torch", None)
    assert find_problems(config("scratch", asked)) == []
    asked["tasks_folder"] = str(tmp_path / "nowhere")
    assert find_problems(config("scratch", asked)) == [
        f"evaluate.lm_eval.tasks_folder: there is no folder {tmp_path / 'nowhere'}"
    ]
    asked["tasks"] = []
    assert find_problems(config("scratch", asked)) == []


def test_an_unknown_task_is_found_before_anything_starts() -> None:
    (problem,) = find_problems(config("scratch", {"tasks": ["helaswag", "arc_easy"]}))
    assert "knows no task helaswag" in problem
    assert "hellaswag" in problem


def test_a_masked_language_model_and_tasks_do_not_go_together(tmp_path: Path) -> None:
    asked = {"tasks": ["tiny_choice"], "tasks_folder": str(write_tasks(tmp_path / "tasks"))}
    tiny_model("bert").save(tmp_path / "model", tiny_tokenizer())
    chosen = config("scratch", asked, objective="masked_lm"), config(tmp_path / "model", asked, max_length=64)
    for one in chosen:
        (problem,) = find_problems(one)
        assert problem.startswith("evaluate.lm_eval.tasks: the model is a masked language model")
    assert find_problems(config("scratch", objective="masked_lm")) == []


def test_without_the_harness_plan_goes_on_and_a_run_here_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container `plan` has no need of it: `evaluate` has an image of its own."""
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    asked = config("scratch", {"tasks": ["hellaswag"]})
    assert find_problems(asked) == []
    (sentence,) = missing_here(asked)
    assert "is not installed here" in sentence
    assert missing_here(config("scratch")) == []


def test_changed_task_files_and_data_change_the_fingerprint(tmp_path: Path) -> None:
    folder = write_tasks(tmp_path / "tasks")
    asked = config("scratch", {"tasks": ["tiny_choice"], "tasks_folder": str(folder)})
    before = fingerprints(asked).tasks_folder
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "utils.pyc").write_bytes(b"1")
    assert fingerprints(asked).tasks_folder == before
    with (folder / "asked.jsonl").open("a") as file:
        file.write(" ")
    assert fingerprints(asked).tasks_folder != before
    assert fingerprints(config("scratch", {"tasks_folder": str(folder)})).tasks_folder == ""
