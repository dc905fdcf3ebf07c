"""Results on tasks in the report: values of every candidate and differences from the pretrained model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...shared.errors import RefusedError
from ...shared.measures import Measure


def by_candidate(measures: Mapping[str, Sequence[Measure]], pretrained: str) -> dict[str, list[dict[str, Any]]]:
    """Returns the rows of `report.json` by candidate. All candidates have the pretrained model's columns, in its order.

    Args:
        measures: measures by candidate; empty lists if no task is configured.
        pretrained: id of the pretrained model, the baseline.

    Raises:
        RefusedError: if candidates were measured on different tasks or examples.
    """
    before = {one.words: one for one in measures[pretrained]}
    problems: list[str] = []
    found: dict[str, list[dict[str, Any]]] = {}
    for candidate, rows in measures.items():
        ours = {one.words: one for one in rows}
        if ours.keys() != before.keys() or any(one.digest != before[name].digest for name, one in ours.items()):
            problems.append(
                f"{candidate}: was measured on other tasks or examples than {pretrained}; evaluate both again"
            )
            continue
        found[candidate] = [
            {
                **ours[name].model_dump(mode="json", exclude={"values", "digest"}),
                "vs_pretrained": None if candidate == pretrained else _difference(ours[name], one),
            }
            for name, one in before.items()
        ]
    if problems:
        raise RefusedError(*problems)
    return found


def paired_differences(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """Returns the change from the pretrained model and its standard error, by task and metric; above 0 is better.

    Only where it is known which direction is better and the difference is paired by example, so that values are in one unit.
    """
    found = {}
    for row in rows:
        difference = row["vs_pretrained"]
        if difference is not None and difference["stderr"] is not None and row["higher_is_better"] is not None:
            sign = 1 if row["higher_is_better"] else -1
            found[f"{row['task']}, {row['metric']}"] = (sign * difference["value"], difference["stderr"])
    return found


def described(measures: Sequence[Measure]) -> list[dict[str, Any]]:
    """Describes the columns: what each measures, and on how many examples."""
    return [
        {
            "name": one.words,
            "metric_name": one.metric_name,
            "metric": one.words.removeprefix(f"{one.task}, "),
            **one.model_dump(include={"task", "filter", "examples", "few_shot", "higher_is_better"}),
        }
        for one in measures
    ]


def differences(report: Mapping[str, Any]) -> dict[str, float | None]:
    """Returns differences from the pretrained model by candidate, under names that MLflow accepts."""
    columns = (report["lm_eval"] or {"columns": []})["columns"]
    return {
        f"{row['id']}.{column['metric_name']}.vs_pretrained": one["vs_pretrained"]["value"]
        for row in report["candidates"]
        for column, one in zip(columns, row["lm_eval"], strict=True)
        if one["vs_pretrained"] is not None
    }


def harness_sentence(columns: Sequence[Mapping[str, Any]], limit: float | None) -> str:
    """Describes the data behind the columns, task by task."""
    tasks: dict[str, str] = {}
    for column in columns:
        shots = f", {column['few_shot']} solved before each" if column["few_shot"] else ""
        tasks[column["task"]] = f"{column['task']}: {column['examples']:,} examples{shots}"
    chosen = (
        "Nothing is chosen by these tasks."
        if limit is None
        else f"The gate accepts a drop of at most {limit:g} on each."
    )
    return (
        f"{'; '.join(tasks.values())}. Differences with a standard error are paired by example; what has none is no mean over "
        f"examples. {chosen}"
    )


def _difference(ours: Measure, before: Measure) -> dict[str, float | None] | None:
    """Returns the difference paired by example if the values are means over examples; else without a standard error."""
    if ours.value is None or before.value is None:
        return None
    if ours.values is None or before.values is None:
        return {"value": ours.value - before.value, "stderr": None}
    paired = np.asarray(ours.values) - np.asarray(before.values)
    spread = float(paired.std(ddof=1) / math.sqrt(len(paired))) if len(paired) > 1 else None
    return {"value": float(paired.mean()), "stderr": spread}
