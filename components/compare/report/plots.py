"""The report's figures. They work in light and dark mode, on a phone and in print; their text can be selected."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from .drawing import (
    ACCEPTED,
    BASE,
    CHAMPION,
    FAINT,
    FINETUNED,
    FONT_SIZE,
    INK,
    INTERPOLATED,
    MIXED,
    PRETRAINED,
    Picture,
    cut,
    new_figure,
    picture,
    text_width,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 4.7
"""Width of a figure, in inches."""
PARETO_WIDTH = 5.4
"""Width of the figure at the top of a report: with its legend beside it, it is low enough to leave room for the table."""
LEGEND_WIDTH = 12.0
"""Maximum width of a name in a legend beside a figure, in units of the font size."""
NAME_WIDTH = 18.0
"""Maximum width of a source's name in a figure, in units of the font size."""
DASHES = ("solid", (0, (5, 1.5)), (0, (2, 1.2)), (0, (6, 1.5, 1.5, 1.5)))


Marker: TypeAlias = str | tuple[int, int, int]
MARKERS: dict[str, Sequence[Marker]] = {
    "pretrained": "s",
    "finetuned": "D",
    "mixed": ("o", "P", "X", "p", "d", (4, 1, 0), "h", (6, 1, 0), "8", (3, 1, 0)),
    "interpolated": "^<>",
    "base": "v",
    "champion": "*",
}
"""Markers by kind of candidate. Candidates of one kind get them in this order, and from the start if there are more."""
COLOURS_OF_KINDS = {"finetuned": FINETUNED, "interpolated": INTERPOLATED, "base": BASE, "champion": CHAMPION}


@dataclass(frozen=True)
class Look:
    """The style of a candidate in all figures."""

    colour: str
    marker: Marker
    dash: Any = "solid"


def looks(candidates: Sequence[Mapping[str, Any]]) -> dict[str, Look]:
    """Returns the style of each candidate by id: colour, marker and dash, equal in all figures."""
    found: dict[str, Look] = {}
    counts: Counter[str] = Counter()
    for one in candidates:
        kind = one["kind"]
        number, counts[kind] = counts[kind], counts[kind] + 1
        if kind == "mixed":
            colour, again = MIXED[number % len(MIXED)], number // len(MIXED)
            found[one["id"]] = Look(colour, _nth_marker(kind, again), DASHES[again % len(DASHES)])
        else:
            dash = DASHES[1] if kind == "finetuned" else DASHES[0]
            found[one["id"]] = Look(COLOURS_OF_KINDS.get(kind, PRETRAINED), _nth_marker(kind, number), dash)
    return found


def markers(candidates: Sequence[Mapping[str, Any]]) -> dict[str, Marker]:
    """Returns a marker for each id. Candidates of one kind have different markers, as far as there are enough."""
    found: dict[str, Marker] = {}
    counts: Counter[str] = Counter()
    for one in candidates:
        if one["id"] not in found:
            found[one["id"]] = _nth_marker(one["kind"], counts[one["kind"]])
            counts[one["kind"]] += 1
    return found


def _nth_marker(kind: str, number: int) -> Marker:
    choice = MARKERS.get(kind, MARKERS["mixed"])
    return choice[number % len(choice)]


def pareto_picture(
    candidates: Sequence[Mapping[str, Any]],
    selected: Collection[str],
    metric: str,
    limits: Mapping[str, float | None],
    description: str,
    *,
    name: str = "pareto",
    style: Mapping[str, Look] | None = None,
    legend: Mapping[str, Look] | None = None,
) -> Picture:
    """Draws task score against forgetting, with intervals, the Pareto front and the region that the gate accepts.

    Args:
        candidates: rows of `report.json`. Rows without a task score are left out, except for `base`, marked on the axis.
        selected: ids of the candidates to highlight.
        metric: label of the score axis.
        limits: `forgetting`, the maximum that the gate accepts, and `score`, the minimum; None for no limit.
        description: alternative text for people who cannot see the figure.
        name: name of the figure, unique on a page.
        style: style of each candidate, by id; by default it depends on the kind.
        legend: styles by name, for the legend; by default those of the candidates.
    """
    style = style or looks(candidates)
    shown = [one for one in candidates if one["task_score"] is not None]
    legend = legend or {name_in_legend(one): style[one["id"]] for one in shown_in_pareto(candidates)}
    shown = [one for one in candidates if one["task_score"] is not None]
    beside = max(map(text_width, legend), default=0.0) <= LEGEND_WIDTH
    below = 0.0 if beside else 0.9 + 0.2 * -(-len(legend) // _columns(legend, PARETO_WIDTH))
    figure, axes = new_figure(PARETO_WIDTH, below + max(2.9, 0.7 + 0.19 * len(legend) * beside))
    for one in shown:
        x, y, look = one["delta_bpb"], one["task_score"], style[one["id"]]
        bars: dict[str, Any] = {"xerr": error_bars(x), "yerr": error_bars(y), "elinewidth": 1.1, "capsize": 2}
        size = (8.5 if one["id"] in selected else 5.5) + (3 if look.marker == "*" else 0)
        axes.errorbar(x["value"], y["value"], **bars, fmt="none", color=look.colour, zorder=4)
        axes.plot(x["value"], y["value"], marker=look.marker, color=look.colour, markersize=size, zorder=4)
        if one["id"] in selected:
            axes.plot(x["value"], y["value"], "o", ms=15, mfc="none", mec=INK, mew=1.2, zorder=5)
    _mark_base(axes, candidates, style)
    front = sorted((one for one in shown if one["pareto"]), key=lambda one: one["delta_bpb"]["value"])
    path = [(one["delta_bpb"]["value"], one["task_score"]["value"]) for one in front]
    if path:
        axes.plot(*zip(*path, strict=True), color=FAINT, linewidth=1, zorder=2, drawstyle="steps-post")
    axes.margins(x=0.08, y=0.08)
    axes.autoscale_view()
    axes.axvline(0, color=FAINT, linewidth=0.8, zorder=1)
    for title, look in legend.items():
        axes.plot([], [], marker=look.marker, linestyle="none", color=look.colour, label=title)
    _draw_limits(axes, limits)
    axes.set_xlabel("forgetting, bits per byte (less is better)", color=INK)
    axes.set_ylabel(f"{metric} (more is better)", color=INK)
    add_legend(figure, axes, beside)
    return picture(figure, name, f"{metric} against forgetting", description)


def shown_in_pareto(candidates: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Returns the candidates that the Pareto figure shows: those with a task score, and `base`."""
    return [one for one in candidates if one["task_score"] is not None or one["kind"] == "base"]


def name_in_legend(candidate: Mapping[str, Any]) -> str:
    """Returns the id of a candidate, and whether it has no task score."""
    return str(candidate["id"]) if candidate["task_score"] is not None else f"{candidate['id']}, no score"


def sources_picture(
    rows: Sequence[Mapping[str, Any]], names: Sequence[str], style: Mapping[str, Look], description: str
) -> Picture:
    """Draws the forgetting of a few candidates by source, with intervals: a row for each source, a marker for each candidate.

    Args:
        rows: rows of `report.json` to show.
        names: sources, from top to bottom.
    """
    figure, axes = new_figure(WIDTH, 1.2 + 0.34 * len(names))
    apart = 0.6 / max(len(rows), 1)
    for number, row in enumerate(rows):
        look = style[row["id"]]
        shift = (number - (len(rows) - 1) / 2) * apart
        for place, name in enumerate(names):
            found = row["delta_bpb_by_source"][name]
            bars: dict[str, Any] = (
                {} if found["low"] is None else {"xerr": error_bars(found), "elinewidth": 1.1, "capsize": 2}
            )
            fill: dict[str, Any] = {"markerfacecolor": "none"} if found["low"] is None else {}
            label = row["id"] if place == 0 else None
            axes.errorbar(
                found["value"],
                place + shift,
                **bars,
                **fill,
                linestyle="none",
                marker=look.marker,
                color=look.colour,
                markersize=5,
                label=label,
            )
    axes.axvline(0, color=FAINT, linewidth=0.8, zorder=1)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_yticks(range(len(names)), labels=[cut(name, NAME_WIDTH) for name in names], parse_math=False)
    axes.set_xlabel("forgetting, bits per byte (less is better)", color=INK)
    add_legend(figure, axes)
    return picture(figure, "sources", "Forgetting by source", description)


def divergence_picture(candidates: Sequence[Mapping[str, Any]], style: Mapping[str, Look], description: str) -> Picture:
    """Draws forgetting against KL(pretrained ‖ candidate), with intervals.

    Args:
        candidates: rows of `report.json`. Those without a divergence are left out.
        style: style of each candidate, by id.
        description: what the figure shows, in words.
    """
    figure, axes = new_figure(WIDTH, 3.3)
    shown = [one for one in candidates if one["kl_from_pretrained"] is not None]
    for one in shown:
        x, y, look = one["kl_from_pretrained"], one["delta_bpb"], style[one["id"]]
        bars: dict[str, Any] = {"xerr": error_bars(x), "yerr": error_bars(y), "elinewidth": 1.1, "capsize": 2}
        how: dict[str, Any] = {"marker": look.marker, "color": look.colour, "markersize": 5.5, "linestyle": "none"}
        axes.errorbar(x["value"], y["value"], **bars, **how, label=one["id"])
    axes.axhline(0, color=FAINT, linewidth=0.8, zorder=1)
    axes.set_xlabel("KL(pretrained ‖ candidate) on the task’s inputs, nats per token", color=INK)
    axes.set_ylabel("forgetting, bits per byte", color=INK)
    add_legend(figure, axes)
    points = "; ".join(
        f"{one['id']}: {one['kl_from_pretrained']['value']:.3f} and {one['delta_bpb']['value']:.3f}" for one in shown
    )
    return picture(figure, "divergence", "Forgetting against the divergence", f"{description} {points}.")


def add_legend(figure: Figure, axes: Axes, beside: bool = False) -> None:
    """Adds a legend beside the figure, or below it in as many columns as the names have room for."""
    names = axes.get_legend_handles_labels()[1]
    columns = 1 if beside else _columns(names, figure.get_figwidth())
    made = figure.legend(
        loc="outside right upper" if beside else "outside lower center", ncols=columns,
        frameon=False, labelcolor=INK, handlelength=1.6 if beside else 2.2, columnspacing=1.2, fontsize=FONT_SIZE,
    )  # fmt: skip
    for text in made.get_texts():
        text.set_parse_math(False)


def _columns(names: Collection[str], width: float) -> int:
    widest = FONT_SIZE * (4.5 + max(text_width(name) for name in names))
    return max(1, min(3, len(names), int(width * 72 / widest)))


def _mark_base(axes: Axes, candidates: Sequence[Mapping[str, Any]], style: Mapping[str, Look]) -> None:
    """Marks the forgetting of candidates without a task score, such as `base`, on the axis."""
    for one in candidates:
        if one["kind"] == "base" and one["task_score"] is None:
            look: dict[str, Any] = {"color": style[one["id"]].colour, "marker": style[one["id"]].marker}
            look["transform"] = axes.get_xaxis_transform()
            axes.plot(one["delta_bpb"]["value"], 0.015, markersize=6, clip_on=False, **look)


def training_curves(
    name: str,
    title: str,
    unit: str,
    curves: Mapping[str, Sequence[tuple[int, float]]],
    style: Mapping[str, Look],
    levels: Sequence[float] = (),
) -> Picture:
    """Draws a quantity, such as the loss of one stream, over the optimizer steps, with a line for each candidate.

    Args:
        name: name of the figure, unique on a page.
        unit: label of the quantity's axis.
        curves: pairs of step and value, by candidate.
        levels: values to draw a line at.
    """
    figure, axes = new_figure(WIDTH, 3.1)
    for level in levels:
        axes.axhline(level, color=FAINT, linewidth=0.8, zorder=1)
    for candidate, points in curves.items():
        look = style[candidate]
        marker = look.marker if len(points) == 1 else ""
        steps, losses = zip(*points, strict=True)
        axes.plot(steps, losses, color=look.colour, linestyle=look.dash, marker=marker, linewidth=1.5, label=candidate)
    axes.set_xlabel("optimizer step", color=INK)
    axes.set_ylabel(unit, color=INK)
    axes.margins(x=0.02)
    add_legend(figure, axes)
    ends = ", ".join(f"{candidate} ends at {points[-1][1]:.3f}" for candidate, points in curves.items())
    return picture(figure, name, title, f"{title}, {unit}: {ends}.")


def error_bars(value: Mapping[str, float]) -> list[list[float]]:
    """Returns the lengths of the error bars. They are clipped at 0, since a bootstrap interval need not contain its value."""
    return [[max(0.0, value["value"] - value["low"])], [max(0.0, value["high"] - value["value"])]]


def _draw_limits(axes: Axes, limits: Mapping[str, float | None]) -> None:
    """Draws the gate's limits: a maximum forgetting and a minimum score."""
    most, least = limits.get("forgetting"), limits.get("score")
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    right = right if most is None else max(right, most + 0.03 * (right - left))
    left = left if most is None else min(left, most - 0.03 * (right - left))
    bottom = bottom if least is None else min(bottom, least - 0.05 * (top - bottom))
    top = top if least is None else max(top, least + 0.1 * (top - bottom))
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, top)
    if most is None and least is None:
        return
    edge_x, edge_y = right if most is None else most, bottom if least is None else least
    axes.fill_between([left, edge_x], edge_y, top, color=ACCEPTED, alpha=0.1, linewidth=0, zorder=0)
    # One line along the limits that there are: down the maximum forgetting, then left along the minimum score.
    corners = [(edge_x, top)] * (most is not None) + [(edge_x, edge_y)] + [(left, edge_y)] * (least is not None)
    axes.plot(
        *zip(*corners, strict=True), color=ACCEPTED, linewidth=1.2, linestyle=(0, (4, 2)), zorder=1, label="the gate's limits"
    )  # fmt: skip
