"""Runs the `prepare` step on small data in a test's folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixtune.components.prepare import portion, portions
from mixtune.components.prepare.config import FinetuneData, PrepareStep, PretrainData, Tokenizer
from mixtune.components.prepare.step import run
from mixtune.components.shared.artifacts import Artifact
from mixtune.components.shared.config import Objective
from mixtune.components.shared.data.prepared import DataManifest, Documents, Split
from mixtune.components.shared.running.context import Context


@dataclass
class Prepared:
    """The outputs of one run of the step."""

    train: Artifact
    heldout: Artifact
    tokenizer: Artifact
    report: Artifact

    @property
    def manifest(self) -> DataManifest:
        return DataManifest.load(self.train.path)

    @property
    def page(self) -> str:
        return Path(self.report.path).read_text(encoding="utf-8")

    def count(self, kind: str, part: str | None = None) -> int:
        """The number of affected units of one kind, in one part or in all."""
        found = [row for row in self.manifest.tallies if row.kind == kind and row.source is None]
        assert found
        return sum(row.count for row in found if part in (None, row.part))

    def documents(self, split: Split) -> Documents:
        return Documents(self.train.path if split in ("train", "control") else self.heldout.path, split)

    def texts(self, split: Split) -> list[str]:
        roles = ("text", "prompt", "question")
        return [next(record[role] for role in roles if role in record) for record in self.documents(split).records()]


def outputs(folder: Path) -> Prepared:
    """Artifacts that nothing has been written to."""
    parts = {name: Artifact(str(folder / name)) for name in ("train", "heldout", "tokenizer")}
    return Prepared(**parts, report=Artifact(str(folder / "report")))


def tokenizer_options(
    base: str = "scratch",
    max_length: int = 32,
    vocabulary_size: int | None = 400,
    objective: Objective = "causal_lm",
) -> Tokenizer:
    return Tokenizer(
        base=base, revision=None, max_length=max_length, vocabulary_size=vocabulary_size, objective=objective
    )


def read_in_portions(
    config: PrepareStep, workers: int, folder: Path, tokenizer_in: Artifact | None = None
) -> list[Artifact]:
    """Reads the files of a stream as `workers` tasks do. Returns their outputs, in another order than that of the files."""
    made: list[Artifact] = []
    for one in portions.run(config, context=Context.for_tests(), workers=workers):
        rows, given = Artifact(str(folder / f"portion-{len(made)}")), PrepareStep.from_json(one["config"])
        portion.run(given, context=Context.for_tests(), portion=one["portion"], tokenizer_in=tokenizer_in, rows=rows)
        made.append(rows)
    return made[::-1]


def _run(folder: Path, config: PrepareStep, workers: int, **inputs: Any) -> Prepared:
    made, context = outputs(folder), Context.for_tests()
    if workers > 1:
        inputs["portions"] = read_in_portions(config, workers, folder / "read", inputs["tokenizer_in"])
    run(config, context=context, **inputs, **vars(made))
    return made


def prepare_pretrain(
    folder: Path, source: str | Path | None, seed: int = 0, workers: int = 1, **options: Any
) -> Prepared:
    """Prepares a pretraining stream; `tokenizer` among the options is the tokenizer's."""
    tokenizer = options.pop("tokenizer", tokenizer_options())
    stream = PretrainData(source=None if source is None else str(source), **options)
    config = PrepareStep(stream="pretrain", seed=seed, tokenizer=tokenizer, pretrain=stream, fingerprint="")
    return _run(folder, config, workers, tokenizer_in=None, pretraining_data=None)


def prepare_finetune(
    folder: Path, source: str | Path | None, pretrained: Prepared, seed: int = 0, workers: int = 1, **options: Any
) -> Prepared:
    """Prepares a fine-tuning stream after a pretraining stream."""
    tokenizer = options.pop("tokenizer", tokenizer_options())
    stream = FinetuneData(source=None if source is None else str(source), **options)
    config = PrepareStep(stream="finetune", seed=seed, tokenizer=tokenizer, finetune=stream, fingerprint="")
    return _run(folder, config, workers, tokenizer_in=pretrained.tokenizer, pretraining_data=pretrained.train)


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Writes rows as JSON lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path
