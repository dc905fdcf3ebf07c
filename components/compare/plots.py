"""The report's pictures as SVG: readable in light and dark, on a phone and in print, with text that can be selected.

matplotlib draws with placeholder colours, which are then replaced by CSS variables: one picture serves both colour schemes.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text

# Placeholder -> (name of the variable, light, dark). Contrast to the ground is at least 4.5 for text and 3 for lines.
COLOURS = {
    "#0000a0": ("ink", "#1c2430", "#e4e8ee"),
    "#0000a1": ("faint", "#5b6675", "#9aa5b4"),
    "#0000a2": ("grid", "#dfe4ea", "#2b333e"),
    "#0000a3": ("accepted", "#2f855a", "#68d391"),
    "#0000a4": ("pretrained", "#6b7280", "#a3acba"),
    "#0000a5": ("finetuned", "#c2410c", "#ff9d66"),
    "#0000a6": ("interpolated", "#0b7d72", "#4fd1c1"),
    "#0000b0": ("mixed-0", "#1d5fb4", "#74b1f5"),
    "#0000b1": ("mixed-1", "#7c3aad", "#c79bf2"),
    "#0000b2": ("mixed-2", "#be185d", "#f58bb8"),
    "#0000b3": ("mixed-3", "#8a5a00", "#e5b94e"),
    "#0000b4": ("mixed-4", "#4d7c0f", "#a3d65c"),
    "#0000b5": ("mixed-5", "#155e75", "#67c8e4"),
}
INK, FAINT, GRID, ACCEPTED, PRETRAINED, FINETUNED, INTERPOLATED = list(COLOURS)[:7]
MIXED = list(COLOURS)[7:]
DASHES = ("solid", (0, (5, 1.5)), (0, (2, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
LETTER_WIDTH = 0.56  # of the font size, about, in a sans-serif face
FONT_SIZE = 9


@dataclass(frozen=True)
class Look:
    """How a candidate is drawn in every picture."""

    colour: str
    marker: str
    dash: Any = "solid"


def looks(candidates: Sequence[Mapping[str, Any]]) -> dict[str, Look]:
    """The same colour, marker and dash for a candidate in all pictures, by id."""
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
            found[one["id"]] = Look(PRETRAINED, "s")
    return found


def pareto_picture(
    candidates: Sequence[Mapping[str, Any]],
    selected: str,
    metric: str,
    limits: Mapping[str, float | None],
    description: str,
) -> str:
    """Task score against forgetting, with intervals, the Pareto front and what the gate accepts.

    Args:
        candidates: rows of `report.json`; those with no task score are left out.
        selected: id of the candidate to point out.
        metric: label of the score's axis.
        limits: `forgetting`, the most that the gate accepts, and `score`, the least; None for no limit.
        description: the picture in words, for those who cannot see it.
    """
    style = looks(candidates)
    shown = [one for one in candidates if one["task_score"] is not None]
    figure, axes = _figure(4.7, 4.0)
    for one in shown:
        x, y, look = one["delta_bpb"], one["task_score"], style[one["id"]]
        bars: dict[str, Any] = {"xerr": _arms(x), "yerr": _arms(y), "elinewidth": 1.1, "capsize": 2}
        size = 8.5 if one["id"] == selected else 5.5
        axes.errorbar(x["value"], y["value"], **bars, fmt=look.marker, color=look.colour, markersize=size, zorder=4)
        if one["id"] == selected:
            axes.plot(x["value"], y["value"], "o", ms=15, mfc="none", mec=INK, mew=1.2, zorder=5)
    front = sorted((one for one in shown if one["pareto"]), key=lambda one: one["delta_bpb"]["value"])
    path = [(one["delta_bpb"]["value"], one["task_score"]["value"]) for one in front]
    axes.plot(*zip(*path, strict=True), color=FAINT, linewidth=1, zorder=2, drawstyle="steps-post")
    axes.margins(x=0.16, y=0.12)
    axes.autoscale_view()
    axes.axvline(0, color=FAINT, linewidth=0.8, zorder=1)
    note = _draw_limits(axes, limits)
    axes.set_xlabel("forgetting, bits per byte (less is better)", color=INK)
    axes.set_ylabel(f"{metric} (more is better)", color=INK)
    _label_points(figure, axes, shown, style, path, note)
    return _svg(figure, "pareto", f"{metric} against forgetting", description)


def training_curves(
    name: str, title: str, unit: str, curves: Mapping[str, Sequence[tuple[int, float]]], style: Mapping[str, Look]
) -> str:
    """The loss of one stream over the optimizer steps, a line for each candidate.

    Args:
        name: of the picture, unique on a page.
        unit: label of the loss axis.
        curves: by candidate, pairs of step and loss.
    """
    figure, axes = _figure(4.7, 3.1)
    for candidate, points in curves.items():
        look = style[candidate]
        marker = look.marker if len(points) == 1 else ""
        steps, losses = zip(*points, strict=True)
        axes.plot(steps, losses, color=look.colour, linestyle=look.dash, marker=marker, linewidth=1.5, label=candidate)
    axes.set_xlabel("optimizer step", color=INK)
    axes.set_ylabel(unit, color=INK)
    axes.margins(x=0.02)
    columns = {1: 1, 2: 2, 4: 2}.get(len(curves), 3)
    figure.legend(
        loc="outside lower center", ncols=columns, frameon=False, labelcolor=INK, handlelength=2.2,
        columnspacing=1.2,
    )  # fmt: skip
    ends = ", ".join(f"{candidate} ends at {points[-1][1]:.3f}" for candidate, points in curves.items())
    return _svg(figure, name, title, f"{title}, {unit}: {ends}.")


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure outside pyplot, so that no state is shared."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.set_facecolor("none")
    axes.grid(color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=FAINT, labelsize=FONT_SIZE - 0.5, length=0)
    axes.xaxis.label.set_fontsize(FONT_SIZE)
    axes.yaxis.label.set_fontsize(FONT_SIZE)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(FAINT)
    return figure, axes


def _arms(value: Mapping[str, float]) -> list[list[float]]:
    """Lengths of the error bars; an interval need not hold its value, a bar cannot be negative."""
    return [[max(0.0, value["value"] - value["low"])], [max(0.0, value["high"] - value["value"])]]


def _draw_limits(axes: Axes, limits: Mapping[str, float | None]) -> Text | None:
    """What the gate accepts: up to a forgetting, from a score on."""
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
) -> None:
    """Puts each id where it covers the least: other labels, points, error bars and the front."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure).draw()  # lays the figure out, so that positions are known
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
        width, height = len(one["id"]) * LETTER_WIDTH * FONT_SIZE * scale, 1.15 * FONT_SIZE * scale
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
        axes.text(x, y, one["id"], color=style[one["id"]].colour, fontsize=FONT_SIZE, zorder=6, va="bottom", ha="left")


def _gap(box: tuple[float, ...], point: Any) -> float:
    """Distance of a point from a box."""
    dx = max(box[0] - point[0], 0.0, point[0] - box[2])
    dy = max(box[1] - point[1], 0.0, point[1] - box[3])
    return float((dx * dx + dy * dy) ** 0.5)


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, width) * max(0.0, height)


def _svg(figure: Figure, name: str, title: str, description: str) -> str:
    """The figure as an SVG element that can stand in a page or in a file of its own.

    The same figure gives the same bytes.
    """
    import matplotlib

    buffer = io.StringIO()
    settings = {"svg.fonttype": "none", "svg.hashsalt": name, "svg.id": name}
    with matplotlib.rc_context(settings):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    for placeholder, (variable, _, _) in COLOURS.items():
        text = text.replace(placeholder, f"var(--mt-{variable})")
    # Several pictures stand on one page: ids must not meet.
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', text)
    text = re.sub(r"font-family: [^;\"]*; ?", "", text)
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.DOTALL)
    view = re.search(r'viewBox="([^"]+)"', text)
    assert view is not None
    head = (
        f'<svg class="mixtune" role="img" aria-labelledby="{name}-title {name}-desc" viewBox="{view.group(1)}" '
        'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">'
        f'<title id="{name}-title">{html.escape(title)}</title><desc id="{name}-desc">{html.escape(description)}</desc>'
        f"<style>{_style()}</style>"
    )
    return head + text[text.index(">") + 1 :].strip() + "\n"


def _style() -> str:
    light = "".join(f"--mt-{name}:{value};" for name, value, _ in COLOURS.values())
    dark = "".join(f"--mt-{name}:{value};" for name, _, value in COLOURS.values())
    return (
        f"svg.mixtune{{{light}}} @media screen and (prefers-color-scheme: dark){{svg.mixtune{{{dark}}}}} "
        "svg.mixtune text{font-family:system-ui,-apple-system,'Segoe UI','Noto Sans',sans-serif}"
    )
