"""Tokenizers with any of the special tokens and without them: `check` refuses them, or the whole way works."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from mixtune.components.checks import find_problems
from mixtune.components.config import load
from mixtune.components.evaluate.config import EvaluateStep
from mixtune.components.evaluate.step import run as run_evaluate
from mixtune.components.finetune.config import Finetune, FinetuneStep
from mixtune.components.finetune.step import run as run_finetune
from mixtune.components.pretrain.config import Pretrain, PretrainStep
from mixtune.components.pretrain.step import run as run_pretrain
from mixtune.components.shared.artifacts import Artifact
from mixtune.components.shared.config import Model, Task
from mixtune.components.shared.running.context import Context
from tests.components.prepare.prepared import jsonl, prepare_finetune, prepare_pretrain, tokenizer_options
from tests.components.stages import OPTIONS

from .shared.tiny import tiny_model

pytestmark = pytest.mark.numeric

NAMES = ("pad", "eos", "bos", "unk")
COMBINATIONS = [frozenset(chosen) for count in range(len(NAMES) + 1) for chosen in itertools.combinations(NAMES, count)]


def write_base(folder: Path, special: frozenset[str]) -> Path:
    """A Llama whose tokenizer knows the words w0 to w56 and has these special tokens."""
    lm: Any = tiny_model("llama").lm
    lm.generation_config.eos_token_id = lm.config.eos_token_id = 57 + NAMES.index("eos") if "eos" in special else None
    lm.save_pretrained(folder)
    words = {f"w{i}": i for i in range(57)} | {f"<{name}>": 57 + NAMES.index(name) for name in special}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>" if "unk" in special else "w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer: Any = PreTrainedTokenizerFast
    tokenizer(tokenizer_object=inner, **{f"{name}_token": f"<{name}>" for name in special}).save_pretrained(folder)
    return folder


def write_sources(folder: Path, task: Task) -> tuple[Path, Path]:
    texts = [{"text": " ".join(f"w{(i * 7 + j * j) % 57}" for j in range(6 + i % 5))} for i in range(40)]
    labelled = []
    for i in range(40):
        text = " ".join(f"w{2 + (i * 11 + j * 3) % 55}" for j in range(4 + i % 4))
        of_task = {"text": text, "label": ["no", "yes"][i % 2]}
        labelled.append({"prompt": text, "completion": "w0"} if task == "generation" else of_task)
    return jsonl(folder / "texts.jsonl", texts), jsonl(folder / "labelled.jsonl", labelled)


@pytest.mark.parametrize("task", ["classification", "generation"])
@pytest.mark.parametrize("special", COMBINATIONS, ids=lambda special: "-".join(sorted(special)) or "none")
def test_every_combination_works_or_is_refused(tmp_path: Path, special: frozenset[str], task: Task) -> None:
    base = write_base(tmp_path / "base", special)
    texts, labelled = write_sources(tmp_path, task)
    config = load(
        {"model": {"base": str(base), "max_length": 32},
         "data": {"pretrain": {"source": str(texts)}, "finetune": {"source": str(labelled), "task": task}}}
    )  # fmt: skip
    problems = find_problems(config)
    if not special & {"eos", "bos"}:
        (problem,) = problems
        assert "neither an EOS nor a BOS token" in problem
        return
    assert problems == []
    tokenizer = tokenizer_options(base=str(base), vocabulary_size=None)
    text = prepare_pretrain(tmp_path / "text", texts, tokenizer=tokenizer)
    examples = prepare_finetune(tmp_path / "examples", labelled, text, tokenizer=tokenizer, task=task)
    pretrained, finetuned = Artifact(str(tmp_path / "pretrained")), Artifact(str(tmp_path / "finetuned"))
    context, metrics = Context.for_tests(), Artifact(str(tmp_path / "metrics"))
    run_pretrain(
        PretrainStep(
            seed=0, model=Model(base=str(base), max_length=32), pretrain=Pretrain(steps=0), fingerprint=""
        ),
        context=context, data=text.train, tokenizer=text.tokenizer, model=pretrained, metrics=metrics,
    )  # fmt: skip
    steps = 80 if task == "generation" else 4
    run_finetune(
        FinetuneStep(seed=0, max_length=32, finetune=Finetune.model_validate(OPTIONS | {"steps": steps})),
        context=context, start=pretrained, data=examples.train, model=finetuned, metrics=metrics,
    )  # fmt: skip
    run_evaluate(
        EvaluateStep(
            max_length=32, metric="exact_match" if task == "generation" else "accuracy", batch_size=4,
            max_tokens=None, max_new_tokens=6 if task == "generation" else None, precision="float32",
        ),
        context=context, model=finetuned, other=None, pretrain_heldout=text.heldout,
        finetune_heldout=examples.heldout, evaluation=Artifact(str(tmp_path / "evaluation")), metrics=metrics,
        classification=Artifact(str(tmp_path / "classification")),
    )  # fmt: skip
    (entry,) = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())["candidates"]
    assert entry["splits"]["test"]["task_score"] is not None
    if task == "generation":
        _stops_as_trained(tmp_path, examples.texts("test")[0])


def _stops_as_trained(folder: Path, prompt: str) -> None:
    """Plain transformers ends the answers where mixtune does."""
    rows = [json.loads(line) for line in (folder / "evaluation/finetuned/test.examples.jsonl").read_text().splitlines()]
    assert {row["prediction"] for row in rows} == {"w0"}
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "finetuned")
    tokenizer = AutoTokenizer.from_pretrained(folder / "finetuned")
    given = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    made = model.generate(**given, max_new_tokens=6, do_sample=False)[0, given["input_ids"].shape[1] :]
    assert str(tokenizer.decode(made, skip_special_tokens=True)).strip() == rows[0]["prediction"]
    assert len(made) == 2
