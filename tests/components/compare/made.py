"""Evaluation folders as `evaluate` writes them, with drawn measurements, and a run of `compare` over them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mixtune.components.compare.config import CompareStep, Gate
from mixtune.components.compare.step import run
from mixtune.components.evaluate.trivial import best_trivial_answer
from mixtune.components.shared.artifacts import Artifact, write_json, write_jsonl
from mixtune.components.shared.data.tallies import Tally
from mixtune.components.shared.running.context import Context

LABELS = ["kfp", "mlflow", "pandas", "rich"]


REFERENCES: dict[str, Callable[[np.random.Generator], Any]] = {
    "classification": lambda draw: LABELS[int(draw.integers(0, len(LABELS)))],
    "multi_label": lambda draw: [label for label in LABELS if draw.uniform() < 0.4],
    "regression": lambda draw: float(draw.normal(3, 1)),
    "question_answering": lambda draw: [] if draw.uniform() < 0.2 else [f"answer {draw.integers(0, 9)}", "an answer"],
}
RIGHT: dict[str, Callable[[Any], Any]] = {
    "classification": lambda reference: reference,
    "multi_label": lambda reference: reference,
    "regression": lambda reference: reference + 0.1,
    "question_answering": lambda reference: reference[0] if reference else "",
}
WRONG: dict[str, Callable[[Any], Any]] = {
    "classification": lambda reference: LABELS[(LABELS.index(reference) + 1) % len(LABELS)],
    "multi_label": lambda reference: [label for label in LABELS[:2] if label not in reference],
    "regression": lambda reference: 3.0 - reference / 3,
    "question_answering": lambda reference: "" if reference else "something",
}


def _score(kind: str, prediction: Any, reference: Any) -> float:
    if kind == "regression":
        return -abs(float(prediction) - float(reference))
    if kind == "question_answering":
        return float(prediction in (reference or [""]))
    return float(prediction == reference)


@dataclass
class Made:
    """One candidate to write.

    Attributes:
        forgets: added to the loss of every document, in nats per token.
        right: share of the examples that it gets right; None for a model with no trained head.
        name: in plain words; empty where its kind says all.
        realised: λ that its gradients had; `mix_weight` where it is None.
        budget: forgetting budget, in bits per byte.
        tried: λ and forgetting of its trainings to the budget.
        seed: a further seed that it was trained with.
        replay_share: share of its tokens that was pretraining text.
        stopped: when and why its training was stopped early.
        generation: what it took to write its training data.
        divergence: KL(pretrained ‖ candidate) on the task's inputs, nats per token; not measured where it is None.
    """

    id: str
    kind: str
    forgets: float = 0.0
    right: float | None = None
    mix_weight: float | None = None
    alpha: float | None = None
    predict: Callable[[int, Any], Any] | None = None
    curve: list[dict[str, Any]] = field(default_factory=list)
    name: str = ""
    realised: float | None = None
    budget: float | None = None
    tried: Sequence[tuple[float, float]] = ()
    seed: int | None = None
    replay_share: float | None = None
    divergence: float | None = None
    generation: dict[str, Any] | None = None
    utilisation: dict[str, float] = field(default_factory=dict)
    stopped: dict[str, Any] | None = None


PRETRAINED = Made("pretrained", "pretrained", mix_weight=1.0)
FINETUNED = Made("finetuned", "finetuned", forgets=2.0, right=0.55, mix_weight=0.0)
MIXED = Made("mixed-0.3", "mixed", forgets=0.4, right=0.65, mix_weight=0.3)
BASE = Made("base", "base", forgets=0.3)
CHAMPION = Made("champion", "champion", forgets=0.5, right=0.6, mix_weight=0.2)
INTERPOLATED = Made("interpolated-0.5", "interpolated", forgets=0.2, right=0.4, alpha=0.5)
CURVE = [
    {"step": step, "loss": 1.0, "loss_pretrain": 4.0 + step / 100, "loss_finetune": None if step == 10 else 2.0}
    for step in (10, 20, 30)
]
STRONGER = Made("mixed-0.5", "mixed", forgets=0.2, right=0.64, mix_weight=0.5, curve=CURVE)


def write_evaluation(
    folder: Path,
    candidates: list[Made],
    documents: int = 60,
    examples: int = 300,
    metric: str = "accuracy",
    kind: str = "classification",
    likelihood: str = "causal",
    source: Callable[[int], str | None] = lambda index: "random",
    origin: str = "embedded",
    tallies: Sequence[Tally] = (),
    group: Callable[[int], str] | None = None,
    in_split: int | None = None,
) -> Artifact:
    """Writes one evaluation folder; the same documents and examples for every call with the same counts.

    With `in_split`, the examples are a sample of so many.
    """
    entries = []
    for one in candidates:
        splits: dict[str, dict[str, Any]] = {}
        for number, split in enumerate(("dev", "test")):
            splits[split] = _write_split(
                folder / one.id, split, number, one, documents, examples, kind, metric, source, group, in_split
            )
        if one.curve:
            write_jsonl(folder / one.id / "training.jsonl", one.curve)
        if one.divergence is not None:
            rows = [{"id": f"dev-e{i}", "tokens": 10 + i, "nats": one.divergence * (10 + i)} for i in range(5)]
            write_jsonl(folder / one.id / "dev.kl.jsonl", rows)
        entries.append(
            {
                "format": "mixtune-model/1", "id": one.id, "kind": one.kind,
                "start": None if one.kind == "pretrained" else "pretrained", "mix_weight": one.mix_weight,
                "name": one.name, "forgetting_budget": one.budget,
                "tried": [{"mix_weight": weight, "forgetting": forgetting} for weight, forgetting in one.tried],
                "realised_mix_weight": one.mix_weight if one.realised is None else one.realised,
                "has_task_head": one.right is not None,
                "params": _params(one), "steps": 200, "seconds": 31.5,
                "utilisation": one.utilisation, "generation": one.generation, "stopped": one.stopped,
                "tokens": {"pretrain": 100_000 if one.mix_weight else 0, "finetune": 200_000}, "base": "scratch",
                "data": {"pretrain": "a" * 64, "finetune": "b" * 64}, "mlflow_runs": {one.id: f"run-of-{one.id}"},
                "device": "cpu", "precision": "bf16",
                "model_uri": "/models/pretrained" if one.alpha else f"/models/{one.id}",
                "other_uri": "/models/finetuned" if one.alpha else None, "alpha": one.alpha, "splits": splits,
                "evaluate_seconds": 4.2, "evaluate_run": None,
            }
        )  # fmt: skip
    data: dict[str, dict[str, Any]] = {
        stream: {
            "digest": digest * 64,
            "source": origin,
            "splits": {
                split: {"documents": count, "tokens": 50 * count, "text_digest": f"{split}{count}"}
                for split in ("dev", "test")
            },
        }
        for stream, digest, count in (("pretrain", "c", documents), ("finetune", "d", examples))
    }
    if kind == "question_answering":
        for split in data["finetune"]["splits"].values():
            split |= {"documents": 3 * examples, "examples": examples}
    labels = LABELS if kind in ("classification", "multi_label") else None
    task = {"kind": kind, "metric": metric, "higher_is_better": True, "labels": labels}
    write_json(
        folder / "evaluation.json",
        {"format": "mixtune-evaluation/1", "likelihood": likelihood if candidates else None, "task": task,
         "candidates": entries, "data": data, "not_finite": [],
         "tallies": {stream: [row.model_dump(mode="json") for row in tallies if stream == "finetune"] for stream in data}},
    )  # fmt: skip
    return Artifact(str(folder))


def _params(one: Made) -> dict[str, Any]:
    if one.alpha:
        return {"alpha": one.alpha}
    own = {"mix_weight": one.mix_weight, "seed": one.seed, "replay_share": one.replay_share}
    candidate = {name: value for name, value in own.items() if value is not None and one.kind == "mixed"}
    return {"steps": 200, "replay_share": one.replay_share or 0.5, "candidate": candidate}


def _write_split(
    folder: Path,
    split: str,
    number: int,
    one: Made,
    documents: int,
    examples: int,
    kind: str,
    metric: str,
    source: Callable[[int], str | None],
    group: Callable[[int], str] | None,
    in_split: int | None,
) -> dict[str, Any]:
    draw = np.random.default_rng(number)  # the same documents and examples for every candidate
    tokens = draw.integers(20, 200, documents)
    nats = tokens * draw.gamma(20, 0.2, documents)
    own = np.random.default_rng([number, *one.id.encode()])
    rise = one.forgets * tokens * own.uniform(0.6, 1.4, documents) if one.forgets else 0 * tokens
    write_jsonl(
        folder / f"{split}.documents.jsonl",
        [
            {"id": f"{split}-d{i}", "source": source(i), "bytes": int(4 * tokens[i]), "tokens": int(tokens[i]),
             "nats": float(nats[i] + rise[i]), **({"group": group(i)} if group else {})}
            for i in range(documents)
        ],
    )  # fmt: skip
    summary: dict[str, Any] = {"documents_in_split": documents, "tokens_read": int(tokens.sum()), "sampled": False}
    if one.right is None:
        return summary
    references = [REFERENCES[kind](draw) for _ in range(examples)]
    hard = draw.uniform(size=examples)  # what one candidate gets right, a better one mostly does, too
    hard = np.clip(hard + own.normal(0, 0.1, examples), 0, 1)
    rows = []
    for i, reference in enumerate(references):
        prediction = RIGHT[kind](reference) if hard[i] < one.right else WRONG[kind](reference)
        if one.predict:
            prediction = one.predict(i, reference)
        rows.append(
            {"id": f"{split}-e{i}", "reference": reference, "prediction": prediction,
             "score": _score(kind, prediction, reference), "contaminated": i % 50 == 0, "text": f"what does {i} <do>?",
             **({"group": group(i)} if group else {})}
        )  # fmt: skip
    write_jsonl(folder / f"{split}.examples.jsonl", rows)
    if not rows:
        return summary
    summary["examples_in_split"] = in_split or examples
    summary["accuracy"] = float(np.mean([row["score"] for row in rows]))
    if one.kind == "finetuned":
        trivial = best_trivial_answer(kind, metric, rows, {}, None)  # type: ignore[arg-type]
        write_jsonl(folder / f"{split}.trivial.jsonl", trivial.rows)
        summary["trivial"] = {"name": trivial.name, "task_score": trivial.score}
    return summary


@dataclass
class Outcome:
    """What a run of `compare` left."""

    passed: bool
    folder: Path
    artifacts: dict[str, Artifact]
    context: Context
    uris: dict[str, str]

    @property
    def report(self) -> dict[str, Any]:
        """The content of report.json."""
        return json.loads((self.folder / "report.json").read_text(encoding="utf-8"))

    def row(self, candidate: str) -> dict[str, Any]:
        """A candidate's row in report.json."""
        return next(row for row in self.report["candidates"] if row["id"] == candidate)


def compare(folder: Path, evaluations: dict[str, Any], context: Context | None = None, **gate: Any) -> Outcome:
    """Runs the step on evaluation artifacts, given as `pretrained`, `finetuned`, `interpolated` and `mixed`."""
    names = ("summary", "metrics", "comparison")
    outputs: dict[str, Any] = {name: Artifact(str(folder / "out" / name)) for name in names}
    outputs["report"] = Artifact(str(folder / "out" / "page" / "report.html"))
    outputs["summary"] = Artifact(str(folder / "out" / "page" / "report.md"))
    config = CompareStep(name="trial", seed=3, gate=Gate(**{"resamples": 300, **gate}))
    context = context or Context.for_tests()
    uris: dict[str, Any] = {name: str(folder / "out" / name) for name in ("selected_uri", "other_uri")}
    passed = run(config, context=context, **evaluations, **outputs, **uris)
    put_out = {name: Path(file).read_text(encoding="utf-8") for name, file in uris.items()}
    return Outcome(passed, folder / "out" / "comparison", outputs, context, put_out)


def write_all(
    folder: Path, *mixed: Made, finetuned: Made = FINETUNED, alphas: tuple[Made, ...] = (), **how: Any
) -> Any:
    """Writes the evaluations of a whole run: pretrained, fine-tuned, each mixed, all interpolated."""
    return {
        "pretrained": write_evaluation(folder / "pretrained", [PRETRAINED], **how),
        "finetuned": write_evaluation(folder / "finetuned", [finetuned], **how),
        "mixed": [write_evaluation(folder / one.id, [one], **how) for one in mixed],
        "interpolated": write_evaluation(folder / "interpolated", list(alphas), **how),
    }
