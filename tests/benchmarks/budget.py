"""Compares trainings to a forgetting budget with fixed λ and with fine-tuning alone: forgetting and task score on dev.

python -m tests.benchmarks.budget --folder /tmp/budget [--tasks demo encoder] [--seeds 0 1 2] [--budgets 0.02 0.05 0.1]
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mixtune.components.config import Parts
from mixtune.components.evaluate.held_out import HeldOut
from mixtune.components.evaluate.likelihood import batches, example_segments, losses
from mixtune.components.evaluate.measuring import LoadedCandidate
from mixtune.components.evaluate.subject import Subject
from mixtune.components.finetune import step as finetune
from mixtune.components.mixed import step as mixed
from mixtune.components.mixed.config import MixedCandidate
from mixtune.components.prepare import step as prepare
from mixtune.components.pretrain import step as pretrain
from mixtune.components.shared.artifacts import Artifact, ModelCard, read_jsonl
from mixtune.components.shared.config import Budget
from mixtune.components.shared.data.prepared import DataManifest, Documents
from mixtune.components.shared.running.context import Context

from .budget_tasks import TASKS, parts_of

LAMBDAS = (0.01, 0.03, 0.1, 0.3)
BUDGETS = (0.02, 0.05, 0.1)


@dataclass
class Bench:
    """One task with one seed: data, pretrained model and results, each made once."""

    task: str
    seed: int
    folder: Path
    parts: Parts
    shared: Bench | None = None

    def __post_init__(self) -> None:
        self.context = Context.for_tests()
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.shared is not None:
            for source in self.shared.folder.iterdir():
                if (
                    source.is_dir()
                    and source.name not in ("results", "model")
                    and not (self.folder / source.name).exists()
                ):
                    (self.folder / source.name).symlink_to(source)
        if not (self.folder / "pretrained" / "mixtune.json").is_file():
            for config, stream in ((self.parts.prepare_pretrain, "text"), (self.parts.prepare_finetune, "labels")):
                text = stream == "text"
                prepare.run(
                    config, context=self.context, tokenizer_in=None if text else self.at("tokenizer"),
                    pretraining_data=None if text else self.at("text"), train=self.at(stream),
                    heldout=self.at(f"{stream}-heldout"), tokenizer=self.at("tokenizer" if text else "tokenizer-2"),
                    report=self.at(f"{stream}.html"),
                )  # fmt: skip
            pretrain.run(
                self.parts.pretrain, context=self.context, data=self.at("text"), tokenizer=self.at("tokenizer"),
                model=self.at("pretrained"), metrics=self.at("metrics"),
            )  # fmt: skip

    def at(self, name: str) -> Artifact:
        return Artifact(str(self.folder / name))

    def measured(self, name: str, train: Callable[[Path], None] | None) -> dict[str, Any]:
        """Returns a model's losses and scores on dev; trains it unless it is on record."""
        file = self.folder / "results" / f"{name}.json"
        if not file.is_file():
            folder = self.folder / ("pretrained" if train is None else "model")
            if train is not None:
                shutil.rmtree(folder, ignore_errors=True)
                train(folder)
            file.parent.mkdir(exist_ok=True)
            file.write_text(json.dumps(self._measure(folder)), encoding="utf-8")
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return found

    def _measure(self, folder: Path) -> dict[str, Any]:
        text, labels = self.folder / "text-heldout", self.folder / "labels-heldout"
        held_out = HeldOut(DataManifest.load(text), DataManifest.load(labels), str(text), str(labels))
        card = ModelCard.load(folder)
        subject = Subject(card, str(folder), "")
        candidate = LoadedCandidate(
            subject, subject.load("float32"), subject.words(), self.parts.evaluate, held_out, self.context
        )
        documents = candidate.documents(("dev",))["dev"][0]
        scores: list[float] = []
        if held_out.with_head and card.has_task_head:
            scores = [float(row["score"]) for row in candidate.labelled()["dev"]]
        elif (
            not held_out.with_head
        ):  # the log-probability of the completion, since models this small write nothing right
            scores = self._log_probabilities(candidate)
        curve = folder / "training.jsonl"
        return {
            "nats": [row["nats"] for row in documents],
            "bytes": sum(row["bytes"] for row in documents),
            "scores": scores,
            "seconds": card.seconds,
            "curve": list(read_jsonl(curve)) if curve.is_file() else [],
        }

    def _log_probabilities(self, candidate: LoadedCandidate) -> list[float]:
        examples = Documents(self.folder / "labels-heldout", "dev")
        work = batches(example_segments(examples, with_head=False), self.parts.evaluate.max_length, 32)
        with self.context.progress(len(work), "batches") as progress:
            nats, tokens = losses(candidate.model, work, len(examples), int(candidate.tokenizer.pad_token_id), progress)
        scores: list[float] = (-nats / tokens).tolist()
        return scores

    def finetune(self, model: Path) -> None:
        finetune.run(
            self.parts.finetune.model_copy(update={"seed": self.seed}), context=self.context,
            start=self.at("pretrained"), data=self.at("labels"),
            model=Artifact(str(model)), metrics=self.at("metrics"),
        )  # fmt: skip

    def mixed(self, candidate: MixedCandidate, model: Path) -> None:
        candidate = candidate.model_copy(update={"seed": self.seed})
        options = self.parts.mixed.mixed.model_copy(update={"log_every_steps": 1})
        mixed.run(
            self.parts.mixed.model_copy(update={"mixed": options}), context=self.context,
            candidate=candidate.to_json(), start=self.at("pretrained"), pretrain_data=self.at("text"),
            finetune_data=self.at("labels"), model=Artifact(str(model)), metrics=self.at("metrics"),
        )  # fmt: skip

    def fixed(self, weight: float) -> dict[str, Any]:
        candidate = MixedCandidate(id=f"mixed-{weight:g}", mix_weight=weight)
        return self.measured(candidate.id, lambda model: self.mixed(candidate, model))

    def budget(self, budget: float, name: str = "budget") -> dict[str, Any]:
        candidate = MixedCandidate(id=f"mixed-{name}-{budget:g}", forgetting_budget=budget, budget=Budget())
        return self.measured(candidate.id, lambda model: self.mixed(candidate, model))

    def forgetting(self, found: dict[str, Any]) -> float:
        """Returns the rise of the loss on dev text over the pretrained model, in bits per byte."""
        before = self.measured("pretrained", None)
        return float(np.sum(found["nats"]) - np.sum(before["nats"])) / np.log(2) / float(before["bytes"])


def make(folder: Path, task: str, seed: int) -> Bench:
    """Makes a task's data and pretrained model. The seeds of the encoder share theirs, since it takes minutes to pretrain."""
    shared = make(folder, task, 0) if task == "encoder" and seed else None
    of = folder / task
    return Bench(task, seed, of / str(seed), parts_of(task, of, 0 if shared else seed), shared)


def row(bench: Bench, found: dict[str, Any], best: dict[str, Any] | None, budget: float | None) -> dict[str, Any]:
    """Summarises a candidate, and compares its score with that of another, paired by example."""
    forgetting, scores = bench.forgetting(found), np.array(found["scores"])
    values: dict[str, Any] = {"forgetting": forgetting, "score": float(scores.mean()), "seconds": found["seconds"]}
    if budget is not None:
        values["use"] = forgetting / budget
        values["lambda"] = found["curve"][-1]["mix_weight"]
    if best is not None:
        difference = scores - np.array(best["scores"])
        mean, half = float(difference.mean()), float(1.96 * difference.std() / np.sqrt(len(difference)))
        values["vs_best_fixed"] = [mean - half, mean, mean + half]
    return values


def rows_of(bench: Bench, budgets: list[float], name: str) -> Iterator[dict[str, Any]]:
    """Yields fine-tuning alone, the fixed λ, and the budgets. A budget's rival is the best of the others that keep to it."""
    common = {"task": bench.task, "seed": bench.seed}
    rivals = {"finetuned": bench.measured("finetuned", bench.finetune)}
    for weight in LAMBDAS:
        rivals[f"mixed-{weight:g}"] = bench.fixed(weight)
    for candidate, found in rivals.items():
        yield {**common, "candidate": candidate, **row(bench, found, None, None)}
    for budget in budgets:
        keeping = [one for one in rivals.values() if bench.forgetting(one) <= budget]
        best = max(keeping, key=lambda one: float(np.mean(one["scores"])), default=None)
        yield {**common, "candidate": f"budget-{budget:g}", **row(bench, bench.budget(budget, name), best, budget)}


def table(rows: list[dict[str, Any]]) -> str:
    """Returns a Markdown table with a line for each task, seed and budget."""
    lines = [
        "| task | seed | fine-tuning alone forgets | budget | λ found | used | score "
        "| minus that of the best fixed λ that keeps it |",
        "|---|---|---|---|---|---|---|---|",
    ]
    alone = {(one["task"], one["seed"]): one for one in rows if one["candidate"] == "finetuned"}
    for one in rows:
        if "use" not in one:
            continue
        low, mean, high = one.get("vs_best_fixed") or [None] * 3
        difference = f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]" if mean is not None else "none keeps it"
        forgets = alone[one["task"], one["seed"]]["forgetting"]
        use = f"{one['use']:.2f}"
        lines.append(
            f"| {one['task']} | {one['seed']} | {forgets:.3f} | {one['candidate'].removeprefix('budget-')} "
            f"| {one['lambda']:.3g} | {use} | {one['score']:.3f} | {difference} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--budgets", nargs="+", type=float, default=list(BUDGETS))
    parser.add_argument("--name", default="budget", help="name under which the trainings to a budget are stored")
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for task in given.tasks:
        for seed in given.seeds:
            for one in rows_of(make(given.folder, task, seed), given.budgets, given.name):
                rows.append(one)
                ends = " ".join(f"{value:+.3f}" for value in one.get("vs_best_fixed", []))
                use = f"use {one['use']:.2f} " if "use" in one else ""
                line = (
                    f"{task} {seed} {one['candidate']}: {one['forgetting']:+.4f} {use}score {one['score']:.3f} {ends}"
                )
                sys.stdout.write(f"{line} {one['seconds']:.0f} s\n")
                sys.stdout.flush()
    sys.stdout.write("\n" + table(rows))
    (given.folder / f"{given.name}.json").write_text(json.dumps(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
