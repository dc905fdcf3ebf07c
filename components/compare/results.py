"""Computes `report.json` from measurements: values with intervals for every candidate, the decision, and the provenance."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..shared.data.tallies import warnings
from ..shared.running.context import Context
from ..shared.task_name import TaskName
from .advice import advice
from .config import CompareStep
from .curves import gradients, losses, watched
from .divergence import kl_from_pretrained
from .divergence import summary as divergence_summary
from .evaluations import SPLITS, Candidate, Entry, Evaluations, Measurements
from .examples import confusion, samples
from .headline import headline
from .multiplicity import corrected, in_contest, power, selection_note
from .names import candidate_name, metric_name
from .report.harness import by_candidate, described, paired_differences
from .scores import Scores, example_groups, forgetting_share, score_candidate, task_difference
from .seeds import over_seeds, replicate_of
from .selection import Decision, Measured, decide, pareto
from .sources import Source, forgetting_by_source, group, worst, worst_sentence
from .statistics import Bootstrap, Value

SCHEMA_VERSION = 1
BUDGET_SHARE = 0.1
"""A forgetting budget counts as kept if it is exceeded by at most this fraction, since training controls forgetting on other
text than the evaluation; for small budgets, if it is exceeded by at most `BUDGET_LEAST`.
"""
BUDGET_LEAST = 0.005
"""Bits per byte; see `BUDGET_SHARE`."""


@dataclass(frozen=True)
class Comparison:
    """The content of a report.

    Attributes:
        report: content of `report.json`.
        scores: scores by candidate and split.
        decision: the decision, made on dev.
    """

    evaluations: Evaluations
    scores: dict[str, dict[str, Scores]]
    decision: Decision
    report: dict[str, Any]

    @property
    def selected(self) -> Candidate:
        """Returns the selected candidate."""
        return next(one for one in self.evaluations.candidates if one.id == self.decision.selected)


def compare(config: CompareStep, evaluations: Evaluations, context: Context) -> Comparison:
    """Compares every candidate with `pretrained` and `finetuned`, decides on dev and reports test."""
    gate = config.gate
    draw = Bootstrap(config.seed, gate.resamples, gate.interval)
    scores: dict[str, dict[str, Scores]] = {}
    with context.progress(len(evaluations.candidates), "candidates") as progress:
        for one in evaluations.candidates:
            scores[one.id] = {split: score_candidate(one, evaluations, split, draw) for split in SPLITS}
            progress.advance()
    pretrained = evaluations.of_kind("pretrained")
    harness = by_candidate({one.id: one.harness for one in evaluations.candidates}, pretrained.id)
    measured = [_measured(one, scores[one.id]["dev"], harness[one.id]) for one in evaluations.candidates]
    dev = corrected(measured, gate.interval)
    examples = {one.id: one.splits["dev"].examples or [] for one in evaluations.candidates}
    decision = decide(
        dev,
        gate,
        metric_name(evaluations.task.metric),
        lambda one, other: task_difference(evaluations.task, examples[one], examples[other], draw),
        evaluations.of_kind("finetuned").splits["dev"].trivial_name,
    )
    report = _report(config, evaluations, scores, decision, pareto(dev), draw, harness)
    known = power(dev, decision.selected, gate.max_score_drop)
    report["gate"] |= {
        "power": known.to_json() if known else None,
        "selection": selection_note(len(in_contest(dev)), metric_name(evaluations.task.metric)),
    }
    report["advice"] = advice(report)
    return Comparison(evaluations, scores, decision, report)


def _measured(one: Candidate, scores: Scores, tasks: Sequence[Mapping[str, Any]] = ()) -> Measured:
    against = scores.task_score_vs_finetuned, scores.delta_bpb, scores.task_score_vs_champion
    return Measured(
        one.id,
        one.entry.kind,
        scores.task_score,
        *against,
        task_score_vs_trivial=scores.task_score_vs_trivial,
        examples=scores.counts["examples"],
        replicate=replicate_of(one.entry) is not None,
        capabilities=paired_differences(tasks),
    )


def _varying(scores: Scores) -> dict[str, Value | None]:
    """Returns the values that vary with the training seed."""
    return {"task_score": scores.task_score, "delta_bpb": scores.delta_bpb}


def _report(
    config: CompareStep,
    evaluations: Evaluations,
    scores: dict[str, dict[str, Scores]],
    decision: Decision,
    front_on_dev: set[str],
    draw: Bootstrap,
    harness: Mapping[str, list[dict[str, Any]]],
) -> dict[str, Any]:
    task, finetuned = evaluations.task, evaluations.of_kind("finetuned")
    text, labelled = evaluations.of_kind("pretrained").splits["test"], finetuned.splits["test"].examples or []
    measured = [_measured(one, scores[one.id]["test"]) for one in evaluations.candidates]
    front = pareto(measured)
    sources = group(text.sources, text.num_bytes)
    by_source = {one.id: _by_source(one, evaluations, sources, draw) for one in evaluations.candidates}
    selected = next(one for one in evaluations.candidates if one.id == decision.selected)
    pretrained = evaluations.of_kind("pretrained")
    seeds = over_seeds(evaluations.candidates, {name: _varying(by["test"]) for name, by in scores.items()})
    rows = [
        {
            **_row(one, scores[one.id], scores[finetuned.id], front, front_on_dev),
            **by_source[one.id],
            "kl_from_pretrained": kl_from_pretrained(one, draw),
            "lm_eval": harness[one.id],
        }
        for one in evaluations.candidates
    ]
    return {
        "schema_version": SCHEMA_VERSION,
        "name": config.name,
        "seed": config.seed,
        "interval": config.gate.interval,
        "headline": headline(selected, evaluations, scores, decision, config.gate, seeds),
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
            "examples_in_split": finetuned.entry.splits["test"]["examples_in_split"],
            "labels": task.labels,
            "signatures": task.signatures,
            "trivial": {split: finetuned.entry.splits.get(split, {}).get("trivial") for split in SPLITS},
            "digest": _same_examples(labelled),
            "groups": _number_of(example_groups(labelled)),
        },
        "forgetting": {
            "unit": "bits per byte",
            "likelihood": evaluations.likelihood,
            "split": "test",
            "documents": len(text.documents),
            "groups": _number_of(text.groups),
            **_read(pretrained.entry.splits["test"], evaluations.data["pretrain"]["splits"]["test"]),
            "sources": [{"source": one.name, "documents": len(one.places), "bytes": one.num_bytes} for one in sources],
            "worst": worst_sentence(selected.id, by_source[selected.id]["delta_bpb_by_source"]),
        },
        "contamination": {split: _contamination(finetuned.splits[split]) for split in SPLITS},
        "divergence": divergence_summary(evaluations.candidates, rows),
        "candidates": rows,
        "lm_eval": {"columns": described(pretrained.harness)} if pretrained.harness else None,
        "data": evaluations.data,
        "tallies": {
            stream: [row.model_dump(mode="json") for row in rows] for stream, rows in evaluations.tallies.items()
        },
        "warnings": [line for stream, rows in evaluations.tallies.items() for line in warnings(rows, stream)],
        "seeds": seeds,
        "costs": _costs(evaluations),
        "confusion": confusion(task, selected),
        "samples": samples(evaluations, selected),
    }


def _by_source(one: Candidate, evaluations: Evaluations, sources: Sequence[Source], draw: Bootstrap) -> dict[str, Any]:
    ours, before = one.splits["test"], evaluations.of_kind("pretrained").splits["test"]
    found, rest = forgetting_by_source(sources, ours.nats, before.nats, ours.num_bytes, draw, ours.groups)
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
        "name": candidate_name(entry),
        "start": entry.start,
        "lambda": entry.mix_weight,
        "realised_lambda": entry.realised_mix_weight,
        "forgetting_budget": _budget(entry, scores["dev"].delta_bpb),
        "params": entry.params,
        **scores["test"].to_json(),
        "forgetting_share": forgetting_share(scores["test"], finetuned["test"]),
        "confusion_matrix": entry.splits.get("test", {}).get("confusion_matrix"),
        "pareto": one.id in front,
        "dev": {
            **scores["dev"].to_json(),
            "forgetting_share": forgetting_share(scores["dev"], finetuned["dev"]),
            "pareto": one.id in front_on_dev,
        },
        "losses": losses(one.curve),
        "gradients": gradients(one.curve),
        "watch": watched(one.curve, entry.seconds),
        "stopped": _stopped(entry),
        "tokens": {**tokens, "total": sum(tokens.values())},
        "seconds": entry.seconds,
        "evaluate_seconds": entry.evaluate_seconds,
        "utilisation": entry.utilisation.model_dump(),
        "generation": entry.generation.model_dump() if entry.generation else None,
        "device": entry.device,
        "precision": entry.precision,
        "steps": entry.steps,
        "base": entry.base,
        "data": entry.data,
        "mlflow_run": entry.mlflow_runs.get(_stage(entry)),
        "mlflow_runs": {
            **entry.mlflow_runs,
            **({str(TaskName("evaluate", candidate=one.id)): entry.evaluate_run} if entry.evaluate_run else {}),
        },
    }


def _stage(entry: Entry) -> str:
    return {"pretrained": "pretrain", "finetuned": "finetune"}.get(entry.kind, entry.id)


def _budget(entry: Entry, forgets: Value) -> dict[str, Any] | None:
    """Returns whether a candidate kept to its forgetting budget on dev; None if it had no budget."""
    budget = entry.forgetting_budget
    if budget is None:
        return None
    kept = forgets.value <= budget + max(BUDGET_SHARE * budget, BUDGET_LEAST)
    verdict = "not kept" if not kept else "kept" if forgets.value <= budget else "kept, within the tolerance"
    used = forgets.value / budget if budget else None
    share = f", {used:.0%} of it" if used is not None else ""
    sentence = f"{entry.id}: asked for at most {budget:.3f} bits per byte, forgets {forgets.value:.3f} on dev{share}: {verdict}"
    if entry.tried:
        sentence += (
            f"; λ = {entry.tried[-1].mix_weight:g}, found in {len(entry.tried)} training{'s' * (len(entry.tried) > 1)}"
        )
    if entry.pull_back is not None and entry.pull_back < 1:
        sentence += f"; at the end its weights were pulled back toward the pretrained ones (α = {entry.pull_back:.2f})"
    return {
        "budget": budget,
        "measured": forgets.to_json(),
        "used": used,
        "kept": kept,
        "pull_back": entry.pull_back,
        "tried": [{"lambda": one.mix_weight, "forgetting": one.forgetting} for one in entry.tried],
        "sentence": sentence,
    }


def _stopped(entry: Entry) -> dict[str, Any] | None:
    """Returns when and why the training of a candidate was stopped early; None if it was not."""
    if entry.stopped is None:
        return None
    return {**entry.stopped.model_dump(), "sentence": f"{entry.id}: {entry.stopped.sentence}"}


def _contamination(measured: Measurements) -> dict[str, int]:
    examples = measured.examples or []
    return {"examples": len(examples), "contaminated": sum(bool(row.get("contaminated")) for row in examples)}


def _costs(evaluations: Evaluations) -> dict[str, Any]:
    """Returns the costs of the whole run. For base and champion, which were trained elsewhere, only the evaluation counts.

    `evaluate_share` is the largest share of a candidate's evaluation in the time of its training.
    """
    made = [one.entry for one in evaluations.candidates if one.entry.kind not in ("base", "champion")]
    tuned = [entry for entry in made if entry.kind in ("finetuned", "mixed")]
    tokens = {stream: sum(int(entry.tokens.get(stream, 0)) for entry in made) for stream in ("pretrain", "finetune")}
    seconds = sum(entry.seconds for entry in made)
    return {
        "seconds": seconds,
        "tokens_per_second": sum(tokens.values()) / seconds if seconds else None,
        "peak_memory_bytes": max((entry.utilisation.peak_memory_bytes or 0 for entry in made), default=0) or None,
        "evaluate_seconds": sum(one.entry.evaluate_seconds for one in evaluations.candidates),
        "steps": sum(entry.steps for entry in made),
        "tokens": {**tokens, "total": sum(tokens.values())},
        "evaluate_share": max((e.evaluate_seconds / e.seconds for e in tuned if e.seconds), default=None),
        "devices": sorted({f"{entry.device}, {entry.precision}" for entry in made}),
    }


def _number_of(groups: np.ndarray | None) -> int | None:
    return None if groups is None else len(np.unique(groups))


def _read(summary: Mapping[str, Any], split: Mapping[str, Any]) -> dict[str, Any]:
    """Returns how much of a split of text was read, and the digest of all its text, which does not depend on the tokenizer."""
    return {
        "documents_in_split": summary["documents_in_split"],
        "tokens_read": summary["tokens_read"],
        "sampled": summary["sampled"],
        "digest": split["text_digest"],
    }


def _same_examples(rows: Sequence[dict[str, Any]]) -> str:
    """Returns a digest of the held-out examples with their references."""
    return hashlib.sha256(repr(sorted((row["id"], repr(row["reference"])) for row in rows)).encode()).hexdigest()
