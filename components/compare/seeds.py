"""Candidates trained again with other seeds. They show the variance of training, which intervals over held-out data do not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .evaluations import Candidate, Entry
from .statistics import Value


def replicate_of(entry: Entry) -> str | None:
    """Returns the id of the candidate that this one repeats with another seed; None if it is not a repetition."""
    seed = entry.params.get("candidate", {}).get("seed")
    return None if seed is None else entry.id.removesuffix(f"-seed-{seed}")


def over_seeds(
    candidates: Sequence[Candidate], measured: Mapping[str, Mapping[str, Value | None]]
) -> list[dict[str, Any]]:
    """Returns mean and standard deviation over the seeds, for each candidate that was trained with several seeds.

    Args:
        measured: values of each candidate by name, such as `task_score`; None for missing values.

    Returns:
        For each such candidate `{"id", "seeds": n, <name>: {"mean", "sd"} | null}`, with the sample standard deviation (n - 1).
    """
    groups: dict[str, list[str]] = {one.id: [one.id] for one in candidates if replicate_of(one.entry) is None}
    for one in candidates:
        if (original := replicate_of(one.entry)) is not None:
            groups.setdefault(original, []).append(one.id)
    rows = []
    for original, members in groups.items():
        if len(members) < 2:
            continue
        row: dict[str, Any] = {"id": original, "seeds": len(members)}
        for name in measured[members[0]]:
            values = [value.value for member in members if (value := measured[member][name]) is not None]
            whole = len(values) == len(members)
            row[name] = {"mean": float(np.mean(values)), "sd": float(np.std(values, ddof=1))} if whole else None
        rows.append(row)
    return rows
