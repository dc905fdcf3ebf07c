"""From measurements to `report.json`: every candidate's values with their intervals, the decision, and where all came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..shared.context import Context
from .config import CompareStep
from .evaluations import SPLITS, Candidate, Entry, Evaluations, Measurements, Task
from .selection import Decision, Measured, decide, measurably_forgets, pareto
from .statistics import Bootstrap, Statistic, Value, bleu, chrf, indicators, macro_f1, micro_f1, pearson, spearman

SCHEMA_VERSION = 1
SAMPLES = 6
EXTRA_METRICS = (
    *("nats_per_token", "accuracy", "macro_f1", "micro_f1", "exact_match", "token_f1", "completion_nats_per_token"),
    *("rouge_1", "rouge_2", "rouge_l", "bleu", "chrf", "pearson", "spearman", "mae", "rmse", "calibration_error"),
)
BUDGET_SHARE = 0.1
"""A forgetting budget is kept where it is not exceeded by more than this share of it, since it is held to by measuring, on
other text, while the model is trained; or, where the budget is small, by more than `BUDGET_LEAST`."""
BUDGET_LEAST = 0.005
"""Bits per byte; see `BUDGET_SHARE`."""


@dataclass(frozen=True)
class Scores:
    """Values of one candidate on one split."""

    bpb: Value
    delta_bpb: Value
    task_score: Value | None
    task_score_vs_finetuned: Value | None
    task_score_clean: Value | None
    """Without contaminated examples."""
    extra: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """As `report.json` has it."""
        values = {
            name: value.to_json() if isinstance(value, Value) else None
            for name, value in vars(self).items()
            if name != "extra"
        }
        return {**values, **self.extra}


@dataclass(frozen=True)
class Comparison:
    """All that the report shows.

    Attributes:
        report: the content of `report.json`.
        scores: by candidate and split.
        decision: made on dev.
    """

    evaluations: Evaluations
    scores: dict[str, dict[str, Scores]]
    decision: Decision
    report: dict[str, Any]

    @property
    def selected(self) -> Candidate:
        """The selected candidate."""
        return next(one for one in self.evaluations.candidates if one.id == self.decision.selected)


def compare(config: CompareStep, evaluations: Evaluations, context: Context) -> Comparison:
    """Measures every candidate against `pretrained` and `finetuned`, decides on dev, reports test."""
    gate = config.gate
    draw = Bootstrap(config.seed, gate.resamples, gate.interval)
    scores: dict[str, dict[str, Scores]] = {}
    with context.progress(len(evaluations.candidates), "candidates") as progress:
        for one in evaluations.candidates:
            scores[one.id] = {split: _scores(one, evaluations, split, draw) for split in SPLITS}
            progress.advance()
    dev = [_measured(one, scores[one.id]["dev"]) for one in evaluations.candidates]
    decision = decide(dev, gate, words(evaluations.task.metric))
    report = _report(config, evaluations, scores, decision, pareto(dev))
    return Comparison(evaluations, scores, decision, report)


def words(metric: str) -> str:
    """A metric's name in plain words."""
    return {
        "macro_f1": "macro-F1",
        "micro_f1": "micro-F1",
        "token_f1": "token F1",
        "exact_match": "exact match",
        "rouge_l": "ROUGE-L",
        "bleu": "BLEU",
        "chrf": "chrF",
        "pearson": "Pearson correlation",
        "spearman": "Spearman correlation",
    }.get(metric, metric)


def name_of(entry: Entry) -> str:
    """A candidate in plain words, such as `mixed, λ = 0.3`."""
    if entry.name:
        return entry.name
    if entry.kind == "mixed" and entry.mix_weight is not None:
        return f"mixed, λ = {entry.mix_weight:g}"
    if entry.kind == "interpolated":
        return f"interpolated, α = {entry.alpha:g}"
    return {"finetuned": "fine-tuning alone", "pretrained": "pretrained"}.get(entry.kind, entry.id)


def _measured(one: Candidate, scores: Scores) -> Measured:
    return Measured(one.id, one.entry.kind, scores.task_score, scores.task_score_vs_finetuned, scores.delta_bpb)


def _scores(one: Candidate, evaluations: Evaluations, split: str, draw: Bootstrap) -> Scores:
    ours = one.splits[split]
    before = evaluations.of_kind("pretrained").splits[split]
    baseline = evaluations.of_kind("finetuned").splits[split].examples or []
    score = difference = clean = None
    if ours.examples:
        task = evaluations.task
        score = _task_score(task, ours.examples, draw)
        difference = _task_difference(task, ours.examples, baseline, draw)
        uncontaminated = [row for row in ours.examples if not row.get("contaminated")]
        if len(uncontaminated) == len(ours.examples):
            clean = score
        elif uncontaminated:
            clean = _task_score(task, uncontaminated, draw)
    summary = one.entry.splits.get(split, {})
    return Scores(
        bpb=draw.bits_per_byte(ours.nats, ours.num_bytes),
        delta_bpb=draw.forgetting(ours.nats, before.nats, ours.num_bytes),
        task_score=score,
        task_score_vs_finetuned=difference,
        task_score_clean=clean,
        extra={name: summary[name] for name in EXTRA_METRICS if summary.get(name) is not None},
    )


def _task_score(task: Task, examples: Sequence[dict[str, Any]], draw: Bootstrap) -> Value:
    metric = _of_split(task, examples)
    return draw.mean(_per_example(examples)) if metric is None else draw.of_split(metric, len(examples))


def _task_difference(
    task: Task, examples: Sequence[dict[str, Any]], baseline: Sequence[dict[str, Any]], draw: Bootstrap
) -> Value:
    if all(mine["prediction"] == other["prediction"] for mine, other in zip(examples, baseline, strict=True)):
        return Value(0.0, 0.0, 0.0)  # exactly, whatever the rounding
    ours, theirs = _of_split(task, examples), _of_split(task, baseline)
    if ours is None or theirs is None:
        return draw.mean_difference(_per_example(examples), _per_example(baseline))
    return draw.difference(ours, theirs, len(examples))


def _of_split(task: Task, examples: Sequence[dict[str, Any]]) -> Statistic | None:
    """The task's metric, where it is no mean over examples."""
    truth, given = ([row[name] for row in examples] for name in ("reference", "prediction"))
    if task.metric in ("pearson", "spearman"):
        correlation = {"pearson": pearson, "spearman": spearman}[task.metric]
        return correlation(np.array(truth, np.float64), np.array(given, np.float64))
    if task.metric in ("bleu", "chrf"):
        return {"bleu": bleu, "chrf": chrf}[task.metric]([row[f"{task.metric}_counts"] for row in examples])
    if task.metric in ("micro_f1", "macro_f1"):
        labels = task.labels or []
        columns = truth, given
        if task.kind == "classification":
            columns = [[label] for label in truth], [[label] for label in given]
        score = {"micro_f1": micro_f1, "macro_f1": macro_f1}[task.metric]
        return score(*(indicators(column, labels) for column in columns))
    return None


def _per_example(examples: Sequence[dict[str, Any]]) -> np.ndarray:
    return np.array([row["score"] for row in examples], np.float64)


def _report(
    config: CompareStep,
    evaluations: Evaluations,
    scores: dict[str, dict[str, Scores]],
    decision: Decision,
    front_on_dev: set[str],
) -> dict[str, Any]:
    task, finetuned = evaluations.task, evaluations.of_kind("finetuned")
    text, labelled = evaluations.of_kind("pretrained").splits["test"], finetuned.splits["test"].examples or []
    front = pareto([_measured(one, scores[one.id]["test"]) for one in evaluations.candidates])
    selected = next(one for one in evaluations.candidates if one.id == decision.selected)
    return {
        "schema_version": SCHEMA_VERSION,
        "name": config.name,
        "seed": config.seed,
        "interval": config.gate.interval,
        "headline": _headline(selected, evaluations, scores, decision, config.gate.max_score_drop),
        "selected": decision.selected,
        "gate": {
            "passed": decision.passed,
            "reasons": decision.reasons,
            "split": "dev",
            "why": decision.why,
            "options": config.gate.model_dump(mode="json"),
            "checks": {name: [vars(item) for item in checks] for name, checks in decision.checks.items()},
        },
        "task": {
            "kind": task.kind,
            "metric": task.metric,
            "higher_is_better": task.higher_is_better,
            "split": "test",
            "examples": len(labelled),
            "labels": task.labels,
            "signatures": task.signatures,
        },
        "forgetting": {
            "unit": "bits per byte",
            "likelihood": evaluations.likelihood,
            "split": "test",
            "documents": len(text.documents),
            "sources": [evaluations.data["pretrain"]["source"]],
        },
        "contamination": {split: _contamination(finetuned.splits[split]) for split in SPLITS},
        "candidates": [
            _row(one, scores[one.id], scores[finetuned.id], front, front_on_dev) for one in evaluations.candidates
        ],
        "data": evaluations.data,
        "samples": _samples(task, selected, finetuned),
    }


def _row(
    one: Candidate,
    scores: dict[str, Scores],
    finetuned: dict[str, Scores],
    front: set[str],
    front_on_dev: set[str],
) -> dict[str, Any]:
    entry = one.entry
    tokens = {stream: int(entry.tokens.get(stream, 0)) for stream in ("pretrain", "finetune")}
    return {
        "id": one.id,
        "kind": entry.kind,
        "name": name_of(entry),
        "start": entry.start,
        "lambda": entry.mix_weight,
        "realised_lambda": entry.realised_mix_weight,
        "forgetting_budget": _budget(entry, scores["dev"].delta_bpb),
        "params": entry.params,
        **scores["test"].to_json(),
        "forgetting_share": _share(scores["test"], finetuned["test"]),
        "confusion_matrix": entry.splits.get("test", {}).get("confusion_matrix"),
        "pareto": one.id in front,
        "dev": {
            **scores["dev"].to_json(),
            "forgetting_share": _share(scores["dev"], finetuned["dev"]),
            "pareto": one.id in front_on_dev,
        },
        "tokens": {**tokens, "total": sum(tokens.values())},
        "seconds": entry.seconds,
        "evaluate_seconds": entry.evaluate_seconds,
        "device": entry.device,
        "precision": entry.precision,
        "steps": entry.steps,
        "base": entry.base,
        "data": entry.data,
        "mlflow_run": entry.mlflow_runs.get(_stage(entry)),
        "mlflow_runs": {
            **entry.mlflow_runs,
            **({f"evaluate {one.id}": entry.evaluate_run} if entry.evaluate_run else {}),
        },
    }


def _stage(entry: Entry) -> str:
    return {"pretrained": "pretrain", "finetuned": "finetune"}.get(entry.kind, entry.id)


def _share(ours: Scores, finetuned: Scores) -> float | None:
    """Forgetting as a share of what fine-tuning alone forgets; None where that does not measurably forget."""
    if not measurably_forgets(finetuned.delta_bpb):
        return None
    return ours.delta_bpb.value / finetuned.delta_bpb.value


def _budget(entry: Entry, forgets: Value) -> dict[str, Any] | None:
    """Whether a candidate kept to the forgetting that it was allowed, on dev; None where it had no budget."""
    budget = entry.forgetting_budget
    if budget is None:
        return None
    tolerance = max(BUDGET_SHARE * budget, BUDGET_LEAST)
    return {"budget": budget, "measured": forgets.to_json(), "kept": forgets.value <= budget + tolerance}


def _contamination(measured: Measurements) -> dict[str, int]:
    examples = measured.examples or []
    return {"examples": len(examples), "contaminated": sum(bool(row.get("contaminated")) for row in examples)}


def _samples(task: Task, selected: Candidate, finetuned: Candidate) -> list[dict[str, Any]]:
    """Test examples side by side, those first on which the two disagree (in regression: most)."""
    ours, theirs = selected.splits["test"].examples or [], finetuned.splits["test"].examples or []
    pairs = list(zip(ours, theirs, strict=False))
    if task.kind == "regression":
        pairs.sort(key=lambda pair: -abs(pair[0]["prediction"] - pair[1]["prediction"]))
    else:
        pairs.sort(key=lambda pair: pair[0]["prediction"] == pair[1]["prediction"])
    return [
        {
            "id": mine["id"],
            "text": mine.get("text", ""),
            "reference": mine["reference"],
            "finetuned": {"prediction": other["prediction"], "score": other["score"]},
            "selected": {"prediction": mine["prediction"], "score": mine["score"]},
        }
        for mine, other in pairs[:SAMPLES]
    ]


def _headline(
    selected: Candidate,
    evaluations: Evaluations,
    scores: dict[str, dict[str, Scores]],
    decision: Decision,
    max_drop: float,
) -> str:
    """The result in one sentence, on test."""
    ours, finetuned = scores[selected.id]["test"], scores[evaluations.of_kind("finetuned").id]["test"]
    parts = []
    if ours.task_score is not None:
        value = ours.task_score
        parts.append(f"{words(evaluations.task.metric)} {value.value:.2f} [{value.low:.2f}, {value.high:.2f}]")
    if selected.entry.kind == "finetuned":
        parts.append(f"forgetting {_bits(ours.delta_bpb)}")
    else:
        if ours.task_score_vs_finetuned is not None:
            parts.append(_against(ours.task_score_vs_finetuned, max_drop))
        parts.append(_with_forgetting(ours, finetuned))
    sentence = f"{name_of(selected.entry)}: {', '.join(parts)}"
    return sentence if decision.passed else f"The gate is not met; nearest comes {sentence}"


def _against(difference: Value, max_drop: float) -> str:
    if difference == Value(0.0, 0.0, 0.0):
        return "exactly as good as fine-tuning alone"
    if difference.low > 0:
        return f"{difference.value:+.2f} on fine-tuning alone"
    if difference.high < 0:
        return f"{difference.value:.2f} against fine-tuning alone"
    if difference.low > -max_drop:
        return f"as good as fine-tuning alone within {max_drop:g}"
    return f"{difference.value:+.2f} [{difference.low:+.2f}, {difference.high:+.2f}] against fine-tuning alone"


def _with_forgetting(ours: Scores, finetuned: Scores) -> str:
    share = _share(ours, finetuned)
    if share is None:
        return f"forgetting {_bits(ours.delta_bpb)}, where fine-tuning alone does not measurably forget"
    if share <= 0:
        return "with none of its forgetting"
    return f"with {100 * share:.0f} % of its forgetting"


def _bits(value: Value) -> str:
    return f"{value.value:.2f} [{value.low:.2f}, {value.high:.2f}] bits per byte"
