"""The heat map of the report: bits of the tokens along the context, head by head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure

from alignedkv.analysis.svg import HEAT_LEVELS, WIDTH, color, drawing, heat, to_svg
from alignedkv.analysis.tables import Findings

#: Bits at which the levels begin, and the end of the last.
LEVEL_EDGES = (0, 1, 2, 3, 4, 5, 6, 8, 12, 16)


def bits_along_context(findings: Findings, side: str, tolerance: float) -> str:
    """Heat map of mean bits per element along the context, one line per KV head.

    Parameters
    ----------
    findings : Findings
    side : str
        "K" or "V".
    tolerance : float
        One of those asked for.
    """
    context = findings.context[findings.context["tolerance"] == tolerance]
    column = {"K": "bits_k", "V": "bits_v"}[side]
    table = context.pivot_table(index=["layer", "kv_head"], columns="place", values=column)
    places = [p for p in table.columns if p > 0] + [p for p in table.columns if p < 0]
    bits = table[places].to_numpy(np.float64)
    lines = len(bits)
    with drawing(f"context-{side}", WIDTH, 1.2 + 0.17 * max(lines, 5)) as figure:
        axes = figure.subplots()
        mesh = axes.pcolormesh(
            np.ma.masked_invalid(bits),
            cmap=ListedColormap([heat(level) for level in range(HEAT_LEVELS)]),
            norm=BoundaryNorm(LEVEL_EDGES, HEAT_LEVELS),
            edgecolors=color("ground"),
            linewidth=0.6,
        )
        axes.invert_yaxis()
        axes.grid(visible=False)
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.set_yticks(*_head_labels(table.index))
        _context_ticks(axes, places)
        _legend(figure, axes, mesh)
        axes.set_xlabel("tokens from the first, and to the query")
        axes.set_ylabel("layer · KV head")
        return to_svg(
            figure, f"Bits of {'keys' if side == 'K' else 'values'} along the context, per head"
        )


def _head_labels(index: pd.MultiIndex) -> tuple[list[float], list[str]]:
    """Places and texts of the lines' labels: every one, or only the first head of every layer."""
    every = len(index) <= 24
    chosen = [
        (i + 0.5, f"{layer} · {head}")
        for i, (layer, head) in enumerate(index)
        if every or index[i - 1][0] != layer or i == 0
    ]
    return [place for place, _ in chosen], [text for _, text in chosen]


def _context_ticks(axes: Axes, places: Sequence[int]) -> None:
    """First token of every other stretch, counted from the end that it belongs to."""
    ticks, labels = [], []
    middle = max(abs(place) for place in places)
    for i, place in enumerate(places):
        if abs(place) == 1 or (abs(place) % 3 == 1 and abs(place) < middle - 1):
            ticks.append(i + 0.5)
            # Stretch n holds the tokens at distances 2^(n-2) to 2^(n-1) - 1; the first, distance 0.
            distance = 0 if abs(place) == 1 else 2 ** (abs(place) - 2)
            labels.append(f"{'' if place > 0 else '−'}{distance}")
    axes.set_xticks(ticks, labels)


def _legend(figure: Figure, axes: Axes, mesh: Any) -> None:
    bar = figure.colorbar(
        mesh, ax=axes, location="top", aspect=40, pad=0.02, ticks=LEVEL_EDGES, drawedges=False
    )
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)
    bar.set_label("bits per element")
