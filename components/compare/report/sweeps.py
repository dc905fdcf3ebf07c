"""Figures of what λ and the replay share do: task score and forgetting of the candidates that differ in nothing else."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from .drawing import INK, MIXED, Picture, new_figure, picture
from .plots import WIDTH, add_legend, error_bars

TITLES = {
    "score-over-lambda": "Task score over λ",
    "forgetting-over-lambda": "Forgetting over λ",
    "score-over-share": "Task score over the replay share",
    "forgetting-over-share": "Forgetting over the replay share",
}
BUDGET_TITLE = "Forgetting of the trainings to a budget"
LEAST_POINTS = 3
"""Values of λ, or of the share, that a figure needs; two are seen in the table."""
_AXES = {"lambda": "λ", "share": "replay share"}
_VALUES = {"score": "task_score", "forgetting": "delta_bpb"}
_VARIED = {"mix_weight", "replay_share"}
_MARKERS = "oPXpdh"


def sweep_pictures(rows: Sequence[Mapping[str, Any]], metric: str) -> dict[str, Picture]:
    """Draws task score and forgetting over λ, with a line for each replay share, and over the share, with a line for each λ.

    Args:
        rows: the report's candidates.
        metric: name of the task score.

    Returns:
        The figures by name, without those that would have fewer than `LEAST_POINTS` values on their axis.
    """
    points = [
        {"lambda": row["lambda"], "share": row["params"]["replay_share"], "row": row}
        for row in rows
        if row["kind"] == "mixed"
        and row["lambda"] is not None
        and 0 < row["lambda"] < 1
        and set(row["params"].get("candidate", {})) <= _VARIED
        and "replay_share" in row["params"]
    ]
    found = {}
    for axis, other in (("lambda", "share"), ("share", "lambda")):
        if len({point[axis] for point in points}) < LEAST_POINTS:
            continue
        for value, key in _VALUES.items():
            lines = _lines(points, axis, other, key)
            if lines:
                name = f"{value}-over-{axis}"
                unit = metric if value == "score" else "forgetting, bits per byte"
                found[name] = _draw(name, _AXES[axis], unit, lines)
    return found


def budget_picture(rows: Sequence[Mapping[str, Any]]) -> Picture | None:
    """Draws forgetting of control text over λ, for the trainings of each candidate with a budget, with a line at the budget.

    Args:
        rows: the report's candidates.

    Returns:
        None if there is no such training.
    """
    tried = {row["id"]: row["forgetting_budget"] for row in rows if (row["forgetting_budget"] or {}).get("tried")}
    if not tried:
        return None
    figure, axes = new_figure(WIDTH, 3.1)
    for number, (name, budget) in enumerate(tried.items()):
        colour = MIXED[number % len(MIXED)]
        points = sorted((one["lambda"], one["forgetting"]) for one in budget["tried"])
        marker = _MARKERS[number % len(_MARKERS)]
        axes.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=5, linewidth=1.5, label=name)
        last = budget["tried"][-1]
        axes.plot(last["lambda"], last["forgetting"], color=colour, marker="o", markersize=12, fillstyle="none")
        axes.axhline(budget["budget"], color=colour, linewidth=0.8, linestyle="--", zorder=1)
    axes.set_xlabel("λ", color=INK)
    axes.set_ylabel("forgetting of control text, bits per byte", color=INK)
    add_legend(figure, axes)
    words = "; ".join(
        f"{name}: " + ", ".join(f"{one['forgetting']:.3f} at {one['lambda']:g}" for one in budget["tried"])
        for name, budget in tried.items()
    )
    return picture(figure, "budget", BUDGET_TITLE, f"{BUDGET_TITLE}, bits per byte. {words}.")


def _lines(
    points: Sequence[Mapping[str, Any]], axis: str, other: str, key: str
) -> dict[str, list[tuple[float, Mapping[str, float]]]]:
    """Returns the points of each line, sorted, by the line's name."""
    lines: dict[str, list[tuple[float, Mapping[str, float]]]] = defaultdict(list)
    for point in sorted(points, key=lambda one: (one[other], one[axis])):
        if point["row"][key] is not None:
            lines[f"{_AXES[other]} {point[other]:g}"].append((point[axis], point["row"][key]))
    return dict(lines)


def _draw(name: str, axis: str, unit: str, lines: Mapping[str, Sequence[tuple[float, Mapping[str, float]]]]) -> Picture:
    figure, axes = new_figure(WIDTH, 3.1)
    for number, (line, points) in enumerate(lines.items()):
        axes.errorbar(
            [at for at, _ in points],
            [value["value"] for _, value in points],
            yerr=[[error_bars(value)[side][0] for _, value in points] for side in (0, 1)],
            color=MIXED[number % len(MIXED)],
            marker=_MARKERS[number % len(_MARKERS)],
            markersize=5,
            linewidth=1.5,
            elinewidth=1,
            label=line,
        )
    axes.set_xlabel(axis, color=INK)
    axes.set_ylabel(unit, color=INK)
    add_legend(figure, axes)
    words = "; ".join(
        f"{line}: " + ", ".join(f"{value['value']:.3f} at {at:g}" for at, value in points)
        for line, points in lines.items()
    )
    return picture(figure, name, TITLES[name], f"{TITLES[name]}, {unit}. {words}.")
