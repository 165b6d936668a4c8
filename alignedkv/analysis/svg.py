"""Matplotlib figures as inline SVG whose colours are CSS variables.

A figure is drawn once, in stand-in colours; in the SVG text every stand-in becomes ``var(--name)``,
so that one drawing serves a light and a dark page.  Text stays text, in the page's own font.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

#: Of a figure, inches; narrow enough to be read on a telephone.
WIDTH = 4.4
#: Levels of the sequential scale of heat maps.
HEAT_LEVELS = 9
#: Categories that can be told apart.
SERIES = 6
#: CSS variables in the page, with their value on a light and on a dark ground.  The series are the
#: colours of Okabe and Ito, which colour-blind readers can tell apart, lightened for dark grounds.
PALETTE = {
    "ink": ("#1b1f24", "#e8eaed"),
    "muted": ("#5b6470", "#a3abb5"),
    "grid": ("#dfe3e8", "#333a43"),
    "ground": ("#ffffff", "#181c21"),
    "series-0": ("#0b6bb3", "#56b4e9"),
    "series-1": ("#c65300", "#f0883e"),
    "series-2": ("#00805e", "#2fbf91"),
    "series-3": ("#a8467f", "#dd8fbd"),
    "series-4": ("#7a6a00", "#d8c63a"),
    "series-5": ("#5b6470", "#a3abb5"),
    "heat-0": ("#f1f5f9", "#1f262e"),
    "heat-1": ("#d9e8f4", "#20384c"),
    "heat-2": ("#b9d7ec", "#1f4c6d"),
    "heat-3": ("#8fc0e0", "#1f628f"),
    "heat-4": ("#5fa5d0", "#2a7bb0"),
    "heat-5": ("#3486bb", "#4497cb"),
    "heat-6": ("#1a689f", "#74b5de"),
    "heat-7": ("#0d4a7d", "#aad2ec"),
    "heat-8": ("#062c54", "#e3f1fb"),
}
#: Points; an SVG point is 4/3 CSS pixels.
_FONT_SIZE = 9.5


def color(name: str) -> str:
    """The stand-in for a variable of `PALETTE`: what a figure is drawn in."""
    return f"#01{list(PALETTE).index(name):02x}fe"


def series(index: int) -> str:
    """Stand-in for one category's colour; they repeat after `SERIES`."""
    return color(f"series-{index % SERIES}")


def heat(level: int) -> str:
    """Stand-in for one level of the sequential scale."""
    return color(f"heat-{level}")


@contextmanager
def drawing(name: str, width: float, height: float) -> Iterator[Figure]:
    """Give a new figure in the style of the report.

    Parameters
    ----------
    name : str
        Makes the ids inside the SVG differ from those of other figures.
    width, height : float
        Inches, 96 CSS pixels each.
    """
    ink, muted = color("ink"), color("muted")
    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        # Its metrics place the labels; the page's CSS puts its own font in.
        "font.family": "DejaVu Sans",
        "font.size": _FONT_SIZE,
        "axes.labelsize": _FONT_SIZE,
        "axes.titlesize": _FONT_SIZE,
        "xtick.labelsize": _FONT_SIZE - 0.5,
        "ytick.labelsize": _FONT_SIZE - 0.5,
        "legend.fontsize": _FONT_SIZE - 0.5,
        "legend.frameon": False,
        "text.color": ink,
        "axes.labelcolor": muted,
        "axes.edgecolor": color("grid"),
        "axes.facecolor": "none",
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": color("grid"),
        "grid.linewidth": 0.7,
        "xtick.color": color("grid"),
        "ytick.color": color("grid"),
        "xtick.labelcolor": muted,
        "ytick.labelcolor": muted,
        "figure.facecolor": "none",
        "figure.constrained_layout.use": True,
    }
    with mpl.rc_context(style):
        # A Figure of its own, not pyplot's: no global state, no backend, no window.
        yield Figure(figsize=(width, height))


def to_svg(figure: Figure, title: str) -> str:
    """The figure as an ``<svg>`` element; ``title`` is what a screen reader says.

    Notes
    -----
    To be called inside `drawing`.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Names of groups ("axes_1") repeat from figure to figure; ids must not, and nobody refers to
    # these.
    text = re.sub(r' id="[A-Za-z0-9.]+(?:_[a-z]+)*_\d+"', "", text)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = text.replace("<svg", f'<svg role="img" aria-label="{html.escape(title)}"', 1)
    for name in PALETTE:
        text = text.replace(color(name), f"var(--{name})")
    return text


def css_variables() -> str:
    """CSS that defines the palette for light and dark pages."""
    light, dark = (
        " ".join(f"--{name}: {pair[i]};" for name, pair in PALETTE.items()) for i in (0, 1)
    )
    return (
        f":root {{ color-scheme: light dark; {light} }}\n"
        f"@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}"
    )
