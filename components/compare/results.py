"""From measurements to `report.json`: every candidate's values with their intervals, the decision, and where all came from."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..shared.running.context import Context
from .config import CompareStep, Gate
from .evaluations import SPLITS, Candidate, Entry, Evaluations, Measurements, Task
from .examples import confusion, samples
from .report.harness import by_candidate, described
from .seeds import over_seeds, replicate_of
from .selection import Decision, Measured, decide, hypervolume, measurably_forgets, pareto
from .sources import Source, forgetting_by_source, group, worst, worst_sentence
from .statistics import Bootstrap, Statistic, Value, bleu, chrf, indicators, macro_f1, micro_f1, pearson, spearman

SCHEMA_VERSION = 1
EXTRA_METRICS = (
    *("nats_per_token", "accuracy", "macro_f1", "micro_f1", "exact_match", "token_f1", "completion_nats_per_token"),
    *("rouge_1", "rouge_2", "rouge_l", "bleu", "chrf", "pearson", "spearman", "mae", "rmse", "calibration_error"),
)
BUDGET_SHARE = 0.1
"""A forgetting budget is kept where it is not exceeded by more than this share of it, since it is held to by measuring, on
other text, while the model is trained; or, where the budget is small, by more than `BUDGET_LEAST`."""
BUDGET_LEAST = 0.005
"""Bits per byte; see `BUDGET_SHARE`."""
PAIRED_BY = {
    "task_score_vs_pretrained": "examples",
    "task_score_vs_champion": "examples",
    "delta_bpb_vs_champion": "documents",
}
"""Differences that say by how many of what they are paired."""
GROUPS = {
    "lora": "LoRA",
    "kl": "KL penalty",
    "l2sp": "L2-SP",
    "pooled": "pooled mixing",
    "budget": "forgetting budgets",
}
"""Kinds of controls, by the word in the id."""


@dataclass(frozen=True)
class Scores:
    """Values of one candidate on one split."""

    bpb: Value
    delta_bpb: Value
    task_score: Value | None
    task_score_vs_finetuned: Value | None
    task_score_clean: Value | None
    """Without contaminated examples."""
    task_score_vs_pretrained: Value | None
    task_score_vs_champion: Value | None
    delta_bpb_vs_champion: Value | None
    counts: dict[str, int]
    """Documents and examples that a difference is paired by."""
    extra: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """As `report.json` has it."""
        values: dict[str, Any] = {
            name: value.to_json() if isinstance(value, Value) else None
            for name, value in vars(self).items()
            if name not in ("extra", "counts")
        }
        for name, what in PAIRED_BY.items():
            if values[name] is not None:
                values[name][what] = self.counts[what]
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
    report = _report(config, evaluations, scores, decision, pareto(dev), draw)
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
        "mae": "mean absolute error",
        "rmse": "root mean squared error",
        "rouge_1": "ROUGE-1",
        "rouge_2": "ROUGE-2",
        "calibration_error": "calibration error",
        "nats_per_token": "nats per token",
        "completion_nats_per_token": "nats per token of the references",
    }.get(metric, metric)


def name_of(entry: Entry) -> str:
    """A candidate in plain words, such as `mixed, λ = 0.3`."""
    if entry.name:
        return entry.name
    if entry.kind == "mixed" and entry.mix_weight is not None:
        return f"mixed, λ = {entry.mix_weight:g}"
    if entry.kind == "interpolated":
        return f"interpolated, α = {entry.alpha:g}"
    names = {
        "finetuned": "fine-tuning alone",
        "base": "base model",
        "champion": "champion, the registered model in use",
    }
    return names.get(entry.kind, entry.id)


def _measured(one: Candidate, scores: Scores) -> Measured:
    against = scores.task_score_vs_finetuned, scores.delta_bpb, scores.task_score_vs_champion
    return Measured(one.id, one.entry.kind, scores.task_score, *against, replicate=replicate_of(one.entry) is not None)


def _varying(scores: Scores) -> dict[str, Value | None]:
    """What chance in training moves."""
    names = ("task_score", "task_score_vs_finetuned", "delta_bpb")
    return {name: getattr(scores, name) for name in names}


def _scores(one: Candidate, evaluations: Evaluations, split: str, draw: Bootstrap) -> Scores:
    ours = one.splits[split]
    before = evaluations.of_kind("pretrained").splits[split]
    champion = evaluations.champion()
    in_use = champion.splits[split] if champion else None
    others = {"finetuned": evaluations.of_kind("finetuned").splits[split], "pretrained": before, "champion": in_use}
    score = clean = None
    differences: dict[str, Value] = {}
    if ours.examples:
        task = evaluations.task
        score = _task_score(task, ours.examples, draw)
        differences = {
            kind: _task_difference(task, ours.examples, other.examples, draw)
            for kind, other in others.items()
            if other is not None and other.examples
        }
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
        task_score_vs_finetuned=differences.get("finetuned"),
        task_score_clean=clean,
        task_score_vs_pretrained=differences.get("pretrained"),
        task_score_vs_champion=differences.get("champion"),
        delta_bpb_vs_champion=draw.forgetting(ours.nats, in_use.nats, ours.num_bytes) if in_use else None,
        counts={"documents": len(ours.documents), "examples": len(ours.examples or [])},
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
    draw: Bootstrap,
) -> dict[str, Any]:
    task, finetuned = evaluations.task, evaluations.of_kind("finetuned")
    text, labelled = evaluations.of_kind("pretrained").splits["test"], finetuned.splits["test"].examples or []
    measured = [_measured(one, scores[one.id]["test"]) for one in evaluations.candidates]
    front = pareto(measured)
    sources = group(text.sources, text.num_bytes)
    by_source = {one.id: _by_source(one, evaluations, sources, draw) for one in evaluations.candidates}
    selected = next(one for one in evaluations.candidates if one.id == decision.selected)
    pretrained = evaluations.of_kind("pretrained")
    harness = by_candidate({one.id: one.harness for one in evaluations.candidates}, pretrained.id)
    return {
        "schema_version": SCHEMA_VERSION,
        "name": config.name,
        "seed": config.seed,
        "interval": config.gate.interval,
        "headline": _headline(selected, evaluations, scores, decision, config.gate),
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
            "digest": _same_examples(labelled),
        },
        "forgetting": {
            "unit": "bits per byte",
            "likelihood": evaluations.likelihood,
            "split": "test",
            "documents": len(text.documents),
            "digest": _same_text(text),
            "sources": [{"source": one.name, "documents": len(one.places), "bytes": one.num_bytes} for one in sources],
            "worst": worst_sentence(selected.id, by_source[selected.id]["delta_bpb_by_source"]),
        },
        "contamination": {split: _contamination(finetuned.splits[split]) for split in SPLITS},
        "candidates": [
            {
                **_row(one, scores[one.id], scores[finetuned.id], front, front_on_dev),
                **by_source[one.id],
                "lm_eval": harness[one.id],
            }
            for one in evaluations.candidates
        ],
        "lm_eval": {"columns": described(pretrained.harness)} if pretrained.harness else None,
        "data": evaluations.data,
        "hypervolume": _hypervolume(measured),
        "seeds": over_seeds(evaluations.candidates, {name: _varying(by["test"]) for name, by in scores.items()}),
        "costs": _costs(evaluations),
        "confusion": confusion(task, selected),
        "samples": samples(evaluations, selected),
    }


def _by_source(one: Candidate, evaluations: Evaluations, sources: Sequence[Source], draw: Bootstrap) -> dict[str, Any]:
    ours, before = one.splits["test"], evaluations.of_kind("pretrained").splits["test"]
    found, rest = forgetting_by_source(sources, ours.nats, before.nats, ours.num_bytes, draw)
    return {"delta_bpb_by_source": found, "delta_bpb_other_sources": rest, "worst_source": worst(found)}


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


def _hypervolume(measured: Sequence[Measured]) -> dict[str, Any] | None:
    """Of the front of all, and of each kind of control where there are several to tell apart."""
    whole = hypervolume(measured)
    if whole is None:
        return None
    kinds: dict[str, list[Measured]] = {}
    for one in measured:
        if one.task_score is not None and one.kind in ("mixed", "interpolated"):
            kinds.setdefault(_control(one), []).append(one)
    by_kind = {kind: found.value for kind, members in kinds.items() if (found := hypervolume(measured, members))}
    return {
        "value": whole.value,
        "reference": {"task_score": whole.task_score, "forgetting": whole.forgetting},
        "split": "test",
        "by_kind": by_kind if len(by_kind) > 1 else {},
    }


def _control(one: Measured) -> str:
    if one.kind != "mixed":
        return one.kind
    words_of = one.id.split("-")
    if found := [kind for word, kind in GROUPS.items() if word in words_of]:
        return found[0]
    return "mixed" if re.match(r"mixed-[0-9.e]+", one.id) else "λ schedules"


def _costs(evaluations: Evaluations) -> dict[str, Any]:
    """What the whole run took. Base and champion were made elsewhere; of them only the evaluation is counted."""
    made = [one.entry for one in evaluations.candidates if one.entry.kind not in ("base", "champion")]
    tokens = {stream: sum(int(entry.tokens.get(stream, 0)) for entry in made) for stream in ("pretrain", "finetune")}
    return {
        "seconds": sum(entry.seconds for entry in made),
        "evaluate_seconds": sum(one.entry.evaluate_seconds for one in evaluations.candidates),
        "steps": sum(entry.steps for entry in made),
        "tokens": {**tokens, "total": sum(tokens.values())},
        "devices": sorted({f"{entry.device}, {entry.precision}" for entry in made}),
    }


def _same_text(measured: Measurements) -> str:
    """Identifies held-out text whatever the tokenizer: an id is a digest of the text."""
    rows = sorted(zip(measured.documents, measured.num_bytes.tolist(), strict=True))
    return hashlib.sha256(repr(rows).encode()).hexdigest()


def _same_examples(rows: Sequence[dict[str, Any]]) -> str:
    """Identifies held-out examples with their references."""
    return hashlib.sha256(repr(sorted((row["id"], repr(row["reference"])) for row in rows)).encode()).hexdigest()


def _headline(
    selected: Candidate,
    evaluations: Evaluations,
    scores: dict[str, dict[str, Scores]],
    decision: Decision,
    gate: Gate,
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
            parts.append(_against(ours.task_score_vs_finetuned, gate.max_score_drop, "fine-tuning alone"))
        parts.append(_with_forgetting(ours, finetuned))
    if ours.task_score_vs_champion is not None:
        parts.append(_against(ours.task_score_vs_champion, gate.drop_vs_champion, "the champion"))
    sentence = f"{name_of(selected.entry)}: {', '.join(parts)}"
    return sentence if decision.passed else f"The gate is not met; nearest comes {sentence}"


def _against(difference: Value, max_drop: float, other: str) -> str:
    if difference == Value(0.0, 0.0, 0.0):
        return f"exactly as good as {other}"
    if difference.low > 0:
        return f"{difference.value:+.2f} on {other}"
    if difference.high < 0:
        return f"{difference.value:.2f} against {other}"
    if difference.low > -max_drop:
        return f"as good as {other} within {max_drop:g}"
    return f"{difference.value:+.2f} [{difference.low:+.2f}, {difference.high:+.2f}] against {other}"


def _with_forgetting(ours: Scores, finetuned: Scores) -> str:
    share = _share(ours, finetuned)
    if share is None:
        return f"forgetting {_bits(ours.delta_bpb)}, where fine-tuning alone does not measurably forget"
    if share <= 0:
        return "with none of its forgetting"
    return f"with {100 * share:.0f} % of its forgetting"


def _bits(value: Value) -> str:
    return f"{value.value:.2f} [{value.low:.2f}, {value.high:.2f}] bits per byte"
