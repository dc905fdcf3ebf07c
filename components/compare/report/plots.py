"""The report's figures. They work in light and dark mode, on a phone and in print; their text can be selected."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

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
    letters,
    new_figure,
    picture,
    text_width,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text

MOST_LABELS = 14
"""Maximum number of labelled points. With more, only the front, the selected candidates and `finetuned` are labelled."""
NAME_WIDTH = 18.0
"""Maximum width of a source's name in a figure, in units of the font size."""
DASHES = ("solid", (0, (5, 1.5)), (0, (2, 1.2)), (0, (6, 1.5, 1.5, 1.5)))


@dataclass(frozen=True)
class Look:
    """The style of a candidate in all figures."""

    colour: str
    marker: str
    dash: Any = "solid"


def looks(candidates: Sequence[Mapping[str, Any]]) -> dict[str, Look]:
    """Returns the style of each candidate by id: colour, marker and dash, equal in all figures."""
    found, mixed = {}, 0
    for one in candidates:
        if one["kind"] == "mixed":
            found[one["id"]] = Look(MIXED[mixed % len(MIXED)], "o", DASHES[mixed // len(MIXED) % len(DASHES)])
            mixed += 1
        elif one["kind"] == "finetuned":
            found[one["id"]] = Look(FINETUNED, "D", DASHES[1])
        elif one["kind"] == "interpolated":
            found[one["id"]] = Look(INTERPOLATED, "^")
        else:
            colour, marker = {"base": (BASE, "v"), "champion": (CHAMPION, "*")}.get(one["kind"], (PRETRAINED, "s"))
            found[one["id"]] = Look(colour, marker)
    return found


def pareto_picture(
    candidates: Sequence[Mapping[str, Any]],
    selected: Collection[str],
    metric: str,
    limits: Mapping[str, float | None],
    description: str,
    *,
    name: str = "pareto",
    style: Mapping[str, Look] | None = None,
    groups: Mapping[str, str] | None = None,
    labels: Mapping[str, str] | None = None,
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
        groups: colours by name, for the legend.
        labels: label of each point, by id; by default the id.
    """
    style = style or looks(candidates)
    shown = [one for one in candidates if one["task_score"] is not None]
    figure, axes = new_figure(4.7, 4.0 + (0.4 if groups else 0))
    for one in shown:
        x, y, look = one["delta_bpb"], one["task_score"], style[one["id"]]
        bars: dict[str, Any] = {"xerr": _arms(x), "yerr": _arms(y), "elinewidth": 1.1, "capsize": 2}
        size = (8.5 if one["id"] in selected else 5.5) + (3 if look.marker == "*" else 0)
        axes.errorbar(x["value"], y["value"], **bars, fmt=look.marker, color=look.colour, markersize=size, zorder=4)
        if one["id"] in selected:
            axes.plot(x["value"], y["value"], "o", ms=15, mfc="none", mec=INK, mew=1.2, zorder=5)
    _mark_base(axes, candidates, style, labels or {})
    front = sorted((one for one in shown if one["pareto"]), key=lambda one: one["delta_bpb"]["value"])
    path = [(one["delta_bpb"]["value"], one["task_score"]["value"]) for one in front]
    if path:
        axes.plot(*zip(*path, strict=True), color=FAINT, linewidth=1, zorder=2, drawstyle="steps-post")
    axes.margins(x=0.16, y=0.12)
    axes.autoscale_view()
    axes.axvline(0, color=FAINT, linewidth=0.8, zorder=1)
    note = _draw_limits(axes, limits)
    axes.set_xlabel("forgetting, bits per byte (less is better)", color=INK)
    axes.set_ylabel(f"{metric} (more is better)", color=INK)
    if groups:
        for title, colour in groups.items():
            axes.plot([], [], "o", color=colour, label=title)
        _legend(figure, len(groups))
    labelled = shown
    if len(shown) > MOST_LABELS:
        labelled = [one for one in shown if one["pareto"] or one["id"] in selected or one["kind"] == "finetuned"]
    _label_points(figure, axes, labelled, style, path, note, labels or {})
    return picture(figure, name, f"{metric} against forgetting", description)


def sources_picture(
    rows: Sequence[Mapping[str, Any]], names: Sequence[str], style: Mapping[str, Look], description: str
) -> Picture:
    """Draws the forgetting of a few candidates by source, with intervals: a row for each source, a marker for each candidate.

    Args:
        rows: rows of `report.json` to show.
        names: sources, from top to bottom.
    """
    figure, axes = new_figure(4.7, 1.2 + 0.34 * len(names))
    apart = 0.6 / max(len(rows), 1)
    for number, row in enumerate(rows):
        look = style[row["id"]]
        shift = (number - (len(rows) - 1) / 2) * apart
        for place, name in enumerate(names):
            found = row["delta_bpb_by_source"][name]
            bars: dict[str, Any] = (
                {} if found["low"] is None else {"xerr": _arms(found), "elinewidth": 1.1, "capsize": 2}
            )
            fill: dict[str, Any] = {"markerfacecolor": "none"} if found["low"] is None else {}
            label = row["id"] if place == 0 else None
            axes.errorbar(
                found["value"],
                place + shift,
                **bars,
                **fill,
                fmt=look.marker,
                color=look.colour,
                markersize=5,
                label=label,
            )
    axes.axvline(0, color=FAINT, linewidth=0.8, zorder=1)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_yticks(range(len(names)), labels=[cut(name, NAME_WIDTH) for name in names], parse_math=False)
    axes.set_xlabel("forgetting, bits per byte (less is better)", color=INK)
    _legend(figure, len(rows))
    return picture(figure, "sources", "Forgetting by source", description)


def _legend(figure: Figure, count: int) -> None:
    columns = {1: 1, 2: 2, 4: 2}.get(count, 3)
    made = figure.legend(
        loc="outside lower center", ncols=columns, frameon=False, labelcolor=INK, handlelength=2.2, columnspacing=1.2,
    )  # fmt: skip
    for text in made.get_texts():
        text.set_parse_math(False)


def _mark_base(
    axes: Axes, candidates: Sequence[Mapping[str, Any]], style: Mapping[str, Look], labels: Mapping[str, str]
) -> None:
    """Marks the forgetting of candidates without a task score, such as `base`, on the axis."""
    for one in candidates:
        if one["kind"] == "base" and one["task_score"] is None:
            look: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "color": style[one["id"]].colour}
            place, label = one["delta_bpb"]["value"], f"{labels.get(one['id'], one['id'])}, no score"
            axes.plot(place, 0.015, "v", markersize=6, clip_on=False, **look)
            look |= {"fontsize": FONT_SIZE - 1, "ha": "center", "va": "bottom"}
            axes.text(place, 0.035, label, parse_math=False, **look)


def training_curves(
    name: str, title: str, unit: str, curves: Mapping[str, Sequence[tuple[int, float]]], style: Mapping[str, Look]
) -> Picture:
    """Draws the loss of one stream over the optimizer steps, with a line for each candidate.

    Args:
        name: name of the figure, unique on a page.
        unit: label of the loss axis.
        curves: pairs of step and loss, by candidate.
    """
    figure, axes = new_figure(4.7, 3.1)
    for candidate, points in curves.items():
        look = style[candidate]
        marker = look.marker if len(points) == 1 else ""
        steps, losses = zip(*points, strict=True)
        axes.plot(steps, losses, color=look.colour, linestyle=look.dash, marker=marker, linewidth=1.5, label=candidate)
    axes.set_xlabel("optimizer step", color=INK)
    axes.set_ylabel(unit, color=INK)
    axes.margins(x=0.02)
    _legend(figure, len(curves))
    ends = ", ".join(f"{candidate} ends at {points[-1][1]:.3f}" for candidate, points in curves.items())
    return picture(figure, name, title, f"{title}, {unit}: {ends}.")


def _arms(value: Mapping[str, float]) -> list[list[float]]:
    """Returns the lengths of the error bars. They are clipped at 0, since a bootstrap interval need not contain its value."""
    return [[max(0.0, value["value"] - value["low"])], [max(0.0, value["high"] - value["value"])]]


def _draw_limits(axes: Axes, limits: Mapping[str, float | None]) -> Text | None:
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
        return None
    edge_x, edge_y = right if most is None else most, bottom if least is None else least
    line: dict[str, Any] = {"color": ACCEPTED, "linewidth": 1.2, "linestyle": (0, (4, 2)), "zorder": 1}
    axes.fill_between([left, edge_x], edge_y, top, color=ACCEPTED, alpha=0.1, linewidth=0, zorder=0)
    if most is not None:
        axes.plot([edge_x, edge_x], [edge_y, top], **line)
    if least is not None:
        axes.plot([left, edge_x], [edge_y, edge_y], **line)
    narrow = edge_x - left < 0.35 * (right - left)
    return axes.annotate(
        "the gate's limits", (edge_x, edge_y), (4 if narrow else -4, 3), textcoords="offset points", color=ACCEPTED,
        fontsize=FONT_SIZE - 1, ha="left" if narrow else "right", va="bottom",
    )  # fmt: skip


def _label_points(
    figure: Figure,
    axes: Axes,
    shown: Sequence[Mapping[str, Any]],
    style: Mapping[str, Look],
    front: Sequence[tuple[float, float]],
    note: Text | None,
    labels: Mapping[str, str],
) -> None:
    """Places each id where it overlaps least with other labels, points, error bars and the front."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with letters():
        FigureCanvasAgg(figure).draw()  # the layout determines the positions
    scale = figure.dpi / 72
    frame = axes.get_window_extent()
    centres = [axes.transData.transform((one["delta_bpb"]["value"], one["task_score"]["value"])) for one in shown]
    lines = []
    for one, centre in zip(shown, centres, strict=True):
        x, y = one["delta_bpb"], one["task_score"]
        (left, bottom), (right, top) = axes.transData.transform([(x["low"], y["low"]), (x["high"], y["high"])])
        lines += [(left, centre[1] - 3, right, centre[1] + 3), (centre[0] - 3, bottom, centre[0] + 3, top)]
        lines.append((centre[0] - 8, centre[1] - 8, centre[0] + 8, centre[1] + 8))
    for here, there in pairwise(front):
        (x0, y0), (x1, y1) = axes.transData.transform([here, there])
        lines += [(x0, y0 - 1, x1, y0 + 1), (x1 - 1, min(y0, y1), x1 + 1, max(y0, y1))]
    taken = [] if note is None else [tuple(note.get_window_extent().extents)]
    for one, centre in zip(shown, centres, strict=True):
        width, height = text_width(labels.get(one["id"], one["id"])) * FONT_SIZE * scale, 1.15 * FONT_SIZE * scale
        boxes: list[tuple[float, tuple[float, float, float, float]]] = []
        for reach in (10, 16, 24, 36, 50):
            for dx, dy in ((1, 1), (-1, 1), (1, -1), (-1, -1), (0, 1), (0, -1), (1, 0), (-1, 0)):
                x = centre[0] + dx * reach - (0 if dx > 0 else width if dx < 0 else width / 2)
                y = centre[1] + dy * reach * 0.8 - (0 if dy > 0 else height if dy < 0 else height / 2)
                box = (x, y, x + width, y + height)
                outside = max(0, frame.x0 - x, x + width - frame.x1) + max(0, frame.y0 - y, y + height - frame.y1)
                covered = 3 * sum(_overlap(box, other) for other in lines) + 5 * sum(_overlap(box, it) for it in taken)
                misread = sum(_gap(box, other) <= _gap(box, centre) for other in centres) - 1
                boxes.append((covered + 50 * outside + 40 * misread + 3 * reach, box))
        _, best = min(boxes)
        taken.append(best)
        if _gap(best, centre) > 14 * scale:
            near = (min(max(centre[0], best[0]), best[2]), min(max(centre[1], best[1]), best[3]))
            ends = axes.transData.inverted().transform([tuple(centre), near])
            axes.plot(*ends.T, color=style[one["id"]].colour, linewidth=0.6, zorder=3)
        x, y = axes.transData.inverted().transform((best[0], best[1]))
        look: dict[str, Any] = {
            "color": style[one["id"]].colour,
            "fontsize": FONT_SIZE,
            "zorder": 6,
            "va": "bottom",
            "ha": "left",
        }
        axes.text(x, y, labels.get(one["id"], one["id"]), parse_math=False, **look)


def _gap(box: tuple[float, ...], point: Any) -> float:
    """Returns the distance of a point from a box."""
    dx = max(box[0] - point[0], 0.0, point[0] - box[2])
    dy = max(box[1] - point[1], 0.0, point[1] - box[3])
    return float((dx * dx + dy * dy) ** 0.5)


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, width) * max(0.0, height)
