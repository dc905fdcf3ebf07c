"""Candidates trained again with other seeds. They show the variance of training, which intervals over held-out data do not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .evaluations import Candidate, Entry
from .statistics import Value

ALONE = "finetuned"
"""Id of fine-tuning alone."""


def seed_of(params: Mapping[str, Any]) -> int | None:
    """Returns the further seed that a candidate with these `params` was trained with; None for the seed of the run."""
    seed: int | None = params.get("candidate", {}).get("seed")
    return seed


def replicate_of(entry: Entry) -> str | None:
    """Returns the id of the candidate that this one repeats with another seed; None if it is not a repetition."""
    seed = seed_of(entry.params)
    return None if seed is None else entry.id.removesuffix(f"-seed-{seed}")


def over_seeds(
    candidates: Sequence[Candidate], measured: Mapping[str, Mapping[str, Value | None]]
) -> list[dict[str, Any]]:
    """Returns mean and standard deviation over the seeds, for each candidate that was trained with several seeds.

    The difference to fine-tuning alone is that to fine-tuning alone with the same seed.

    Args:
        measured: `task_score` and `delta_bpb` of each candidate; None for missing values.

    Returns:
        For each such candidate `{"id", "seeds": n, <name>: {"mean", "sd"} | null}`, with the sample standard deviation (n - 1);
        beside the measured names also `task_score_vs_finetuned`.
    """
    groups: dict[str, dict[int | None, str]] = {}
    for one in candidates:
        groups.setdefault(replicate_of(one.entry) or one.id, {})[seed_of(one.entry.params)] = one.id
    alone = groups.get(ALONE, {})
    rows = []
    for original, members in groups.items():
        if len(members) < 2:
            continue
        row: dict[str, Any] = {"id": original, "seeds": len(members)}
        scores = {seed: measured[member]["task_score"] for seed, member in members.items()}
        theirs = {seed: measured[alone[seed]]["task_score"] for seed in members if seed in alone}
        for name in ("task_score", "delta_bpb"):
            row[name] = _spread([measured[member][name] for member in members.values()])
        pairs = [(scores[seed], theirs.get(seed)) for seed in members]
        both = [Value(a.value - b.value, 0, 0) if a is not None and b is not None else None for a, b in pairs]
        row["task_score_vs_finetuned"] = None if original == ALONE else _spread(both)
        rows.append(row)
    return rows


def _spread(values: Sequence[Value | None]) -> dict[str, float] | None:
    known = [value.value for value in values if value is not None]
    if len(known) < len(values):
        return None
    return {"mean": float(np.mean(known)), "sd": float(np.std(known, ddof=1))}


def seeds_sentence(rows: Sequence[Mapping[str, Any]], selected: str, metric: str) -> str | None:
    """Compares the means over the seeds of a candidate with those of fine-tuning alone; None without several seeds of both."""
    by_id = {row["id"]: row for row in rows}
    ours, alone = by_id.get(selected), by_id.get(ALONE)
    if ours is None or alone is None or selected == ALONE or ours["task_score_vs_finetuned"] is None:
        return None
    return (
        f"over {ours['seeds']} seeds, {metric} {_told(ours['task_score'])}, {_told(ours['task_score_vs_finetuned'], '+')} "
        f"against fine-tuning alone, forgetting {_told(ours['delta_bpb'])} against {_told(alone['delta_bpb'])} bits per byte"
    )


def _told(one: Mapping[str, float], sign: str = "") -> str:
    return f"{one['mean']:{sign}.2f} ± {one['sd']:.2f}"
