"""Drawing of the report's figures: colours, fonts, and output as SVG and PNG.

matplotlib draws with placeholder colours. In a page they are replaced by CSS variables, so that one figure works in light and
dark mode; in separate files they are replaced by fixed colours, which any program displays.
"""

from __future__ import annotations

import contextlib
import html
import io
import re
import unicodedata
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Placeholder -> (name of the variable, light, dark). Contrast to the background is at least 4.5 for text and 3 for lines.
COLOURS = {
    "#0000a0": ("ink", "#1c2430", "#e4e8ee"),
    "#0000a1": ("faint", "#5b6675", "#9aa5b4"),
    "#0000a2": ("grid", "#dfe4ea", "#2b333e"),
    "#0000a3": ("accepted", "#2f855a", "#68d391"),
    "#0000a4": ("pretrained", "#6b7280", "#a3acba"),
    "#0000a5": ("finetuned", "#c2410c", "#ff9d66"),
    "#0000a6": ("interpolated", "#0b7d72", "#4fd1c1"),
    "#0000a7": ("base", "#57534e", "#b8b0a8"),
    "#0000a8": ("champion", "#a11d33", "#ff8fa3"),
    "#0000b0": ("mixed-0", "#1d5fb4", "#74b1f5"),
    "#0000b1": ("mixed-1", "#7c3aad", "#c79bf2"),
    "#0000b2": ("mixed-2", "#be185d", "#f58bb8"),
    "#0000b3": ("mixed-3", "#8a5a00", "#e5b94e"),
    "#0000b4": ("mixed-4", "#4d7c0f", "#a3d65c"),
    "#0000b5": ("mixed-5", "#155e75", "#67c8e4"),
}
INK, FAINT, GRID, ACCEPTED, PRETRAINED, FINETUNED, INTERPOLATED, BASE, CHAMPION = list(COLOURS)[:9]
MIXED = list(COLOURS)[9:]
GROUND = "#ffffff"
FONT_SIZE = 9
LETTER_WIDTH = 0.56  # approximate share of the font size in a sans-serif font; 1 for a Chinese character
PIXELS_PER_INCH = 200
FONTS = (
    "DejaVu Sans",
    "Noto Sans CJK SC",
    "Noto Sans SC",
    "Source Han Sans SC",
    "WenQuanYi Zen Hei",
    "PingFang SC",
    "SimHei",
)
"""Fonts for raster images. The first installed font is used; the others provide missing glyphs."""

_FONT = "svg.mixtune text{font-family:system-ui,-apple-system,'Segoe UI','Noto Sans','Noto Sans CJK SC',sans-serif}"


@dataclass(frozen=True)
class Picture:
    """A rendered figure.

    Attributes:
        inline: SVG element for a page, with CSS variables as colours.
        svg: standalone SVG file.
        png: raster image.
    """

    inline: str
    svg: str
    png: bytes


def text_width(text: str) -> float:
    """Estimates the width of a text, in units of the font size."""
    return sum(1.0 if unicodedata.east_asian_width(letter) in "WF" else LETTER_WIDTH for letter in text)


def cut(text: str, width: float) -> str:
    """Shortens a text to the width by replacing its middle with an ellipsis."""
    if text_width(text) <= width:
        return text
    half = len(text) // 2
    left, right = text[:half], text[half:]
    while text_width(left + "…" + right) > width and (left or right):
        left, right = left[:-1], right[1:]
    return f"{left}…{right}"


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """Creates a figure outside of pyplot, so that no state is shared."""
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


@contextlib.contextmanager
def letters() -> Iterator[None]:
    """Sets the fonts for layout and drawing. Glyphs that no font has become boxes in raster images; an SVG keeps the text."""
    import matplotlib
    from matplotlib import font_manager

    there = {font.name for font in font_manager.fontManager.ttflist}
    with (
        matplotlib.rc_context({"font.sans-serif": [font for font in FONTS if font in there]}),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def picture(figure: Figure, name: str, title: str, description: str) -> Picture:
    """Renders the figure in all formats. Rendering is deterministic.

    Args:
        name: name of the figure, unique on a page.
        description: alternative text for people who cannot see the figure.
    """
    import matplotlib

    settings: dict[str, Any] = {"svg.fonttype": "none", "svg.hashsalt": name, "svg.id": name}
    vectors, pixels = io.StringIO(), io.BytesIO()
    with letters(), matplotlib.rc_context(settings):
        figure.draw_without_rendering()  # finds the layout, once for both formats
        figure.set_layout_engine(None)
        figure.savefig(vectors, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        _paint(figure)
        figure.savefig(
            pixels, format="png", dpi=PIXELS_PER_INCH, facecolor=GROUND,
            metadata={"Software": None, "Title": title, "Description": description},
        )  # fmt: skip
    inline = _svg(vectors.getvalue(), name, title, description)
    return Picture(inline, _standing_alone(inline), pixels.getvalue())


def _paint(figure: Figure) -> None:
    """Replaces the placeholders with fixed colours."""
    from matplotlib.colors import to_hex, to_rgba, to_rgba_array

    for artist in figure.findobj():
        for what in ("color", "facecolor", "edgecolor", "markerfacecolor", "markeredgecolor"):
            get, change = (getattr(artist, f"{do}_{what}", None) for do in ("get", "set"))
            if get is None or change is None:
                continue
            found: Any = get()
            if isinstance(found, str) and found in ("none", "auto"):
                continue
            shades = to_rgba_array(found)
            new = [to_rgba(COLOURS.get(to_hex(one), ("", to_hex(one)))[1], float(one[3])) for one in shades]
            if new:
                change(new[0] if len(new) == 1 else new)


def _standing_alone(inline: str) -> str:
    """Converts an inline SVG for programs without CSS variables: light colours on a white background."""
    text = re.sub(r"<style>.*?</style>", f"<style>{_FONT}</style>", inline, count=1, flags=re.DOTALL)
    for variable, light, _ in COLOURS.values():
        text = text.replace(f"var(--mt-{variable})", light)
    ground = f'<rect width="100%" height="100%" fill="{GROUND}"/>'
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + text.replace("</style>", f"</style>{ground}", 1)


def _svg(text: str, name: str, title: str, description: str) -> str:
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    for placeholder, (variable, _, _) in COLOURS.items():
        text = text.replace(placeholder, f"var(--mt-{variable})")
    # A page contains several figures, so their ids must not collide.
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
    return f"svg.mixtune{{{light}}} @media screen and (prefers-color-scheme: dark){{svg.mixtune{{{dark}}}}} {_FONT}"
