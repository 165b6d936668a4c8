"""The curves and bars of the report, each one function from findings to inline SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from alignedkv.analysis.svg import WIDTH, color, drawing, series, to_svg
from alignedkv.analysis.tables import (
    Findings,
    summarize_schemes,
    summarize_tolerances,
    tolerance_name,
)
from alignedkv.policy import BoundKind

_OURS = color("series-0")
_SUPERSCRIPTS = str.maketrans("-.0123456789", "⁻·⁰¹²³⁴⁵⁶⁷⁸⁹")


class _Mark(NamedTuple):
    """One scheme in the picture of errors against bytes."""

    share: float
    median: float
    largest: float
    name: str
    tint: str


def error_against_bytes(findings: Findings) -> str:
    """Median error over the share of 16-bit bytes that is read: all schemes, all tolerances."""
    with drawing("error", WIDTH, 3.9) as figure:
        axes = figure.subplots()
        ours = summarize_tolerances(findings.outputs)
        marked = [
            _Mark(s.read_fraction, s.error_median, s.error_max, s.scheme, series(1))
            for s in summarize_schemes(findings.schemes)
        ] + [
            _Mark(
                s.read_fraction + s.scale_fraction,
                s.error_median,
                s.error_max,
                _raised(tolerance_name(s.tolerance)),
                _OURS,
            )
            for s in ours
        ]
        # An error relative to an output of zero is infinite, and nowhere on the picture.
        marked = [mark for mark in marked if math.isfinite(mark.largest)]
        for mark in marked:
            x, low = 100 * mark.share, _log2(mark.median)
            axes.plot([x, x], [low, _log2(mark.largest)], color=mark.tint, alpha=0.45, linewidth=1)
            axes.plot([x], [low], marker="o", markersize=4.5, color=mark.tint)
        axes.plot(
            [100 * mark.share for mark in marked if mark.tint == _OURS],
            [_log2(mark.median) for mark in marked if mark.tint == _OURS],
            color=_OURS,
            linewidth=1.5,
        )
        _label_marks(axes, marked)
        axes.set_xlim(0, 108)
        axes.margins(y=0.08)
        axes.set_xlabel("bytes read with scales, % of a 16-bit cache")
        axes.set_ylabel("error (median; line: to the largest)")
        _percent(axes.xaxis)
        _log2_ticks(axes.yaxis)
        return to_svg(figure, "Error against bytes read, for all schemes")


def cost_of_tolerance(findings: Findings) -> str:
    """Bytes of keys and of values at each tolerance, with the spread over the heads."""
    summaries = summarize_tolerances(findings.outputs)[::-1]
    with drawing("cost", WIDTH, 3.9) as figure:
        axes = figure.subplots()
        x = np.arange(len(summaries))
        keys = np.array([100 * s.bits_k / 32 for s in summaries])
        values = np.array([100 * s.bits_v / 32 for s in summaries])
        axes.bar(x, keys, 0.62, color=series(0), label="keys")
        axes.bar(x, values, 0.62, bottom=keys, color=series(1), label="values")
        for i, summary in enumerate(summaries):
            there = findings.outputs[findings.outputs["tolerance"] == summary.tolerance]
            heads = 100 * there.groupby(["layer", "kv_head"])["read_fraction"].mean()
            low, high = float(heads.min()), float(heads.max())
            axes.plot([i, i], [low, high], color=color("ink"), linewidth=1.2)
            axes.annotate(
                f"{100 * summary.read_fraction:.0f} %",
                (i, max(high, keys[i] + values[i])),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
            )
        axes.set_xticks(x, [_raised(tolerance_name(s.tolerance)) for s in summaries])
        axes.grid(axis="x", visible=False)
        axes.margins(y=0.12)
        axes.set_xlabel("tolerance")
        axes.set_ylabel("bytes read, % of 16 bits")
        _percent(axes.yaxis)
        _legend_above(axes)
        return to_svg(figure, "Bytes read at each tolerance")


def rows_per_plane(findings: Findings) -> str:
    """Share of the rows of which each plane is read, for the tolerances asked for."""
    planes = findings.planes
    mean = planes.groupby(["side", "plane", "tolerance"])["share"].mean()
    places = sorted({(side, plane) for side, plane, _ in mean.index})
    tolerances = sorted(planes["tolerance"].unique())
    width = 0.8 / len(tolerances)
    with drawing("planes", WIDTH, 3.2) as figure:
        axes = figure.subplots()
        for i, tolerance in enumerate(tolerances):
            x = np.arange(len(places)) + (i - (len(tolerances) - 1) / 2) * width
            heights = [100 * mean[(side, plane, tolerance)] for side, plane in places]
            axes.bar(
                x, heights, width * 0.92, color=series(i), label=_raised(tolerance_name(tolerance))
            )
            if len(tolerances) <= 2:
                # The first key plane is always read, which needs no number.
                for xi, height in zip(x[1:], heights[1:], strict=True):
                    axes.annotate(
                        _short_percent(height),
                        (xi, height),
                        xytext=(0, 2),
                        textcoords="offset points",
                        ha="center",
                        fontsize="x-small",
                        color=color("muted"),
                    )
        axes.set_xticks(range(len(places)), [f"{side}{plane}" for side, plane in places])
        axes.grid(axis="x", visible=False)
        axes.set_ylim(0, 104)
        axes.set_yticks(range(0, 101, 25))
        axes.set_xlabel("plane of keys (K) and values (V), most significant first")
        axes.set_ylabel("rows that are read so far, %")
        _legend_above(axes)
        return to_svg(figure, "Share of the rows that reach each plane")


def tightness(findings: Findings) -> str:
    """How far errors lie below the bounds of the same plan: distribution over the outputs."""
    outputs = findings.requested
    with drawing("tightness", WIDTH, 3.4) as figure:
        axes = figure.subplots()
        for i, kind in enumerate(BoundKind):
            ratio = (outputs["error"] / outputs[str(kind)]).to_numpy(np.float64)
            ratio = np.sort(ratio[np.isfinite(ratio) & (ratio > 0)])
            if len(ratio):
                share = 100 * np.arange(1, len(ratio) + 1) / len(ratio)
                axes.step(
                    np.log2(ratio), share, where="post", color=series(i), linewidth=1.6, label=kind
                )
        axes.axvline(0, color=color("ink"), linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(
            "error = bound",
            (0, 50),
            xytext=(-3, 0),
            textcoords="offset points",
            rotation=90,
            ha="right",
            va="center",
            color=color("muted"),
            fontsize="small",
        )
        axes.set_xlim(right=1)
        axes.set_ylim(0, 100)
        axes.set_xlabel("error as a share of the bound")
        axes.set_ylabel("outputs up to there, %")
        _log2_ticks(axes.xaxis)
        _legend_above(axes)
        return to_svg(figure, "Error as a share of each bound, distribution over the outputs")


def _label_marks(axes: Axes, marks: Sequence[_Mark]) -> None:
    """Write each name beside its mark, away from the near edge and from the mark below."""
    taken: list[tuple[float, float]] = []
    for mark in sorted(marks, key=lambda mark: mark.median):
        height = _log2(mark.median)
        crowded = any(abs(mark.share - x) < 0.12 and abs(height - y) < 0.55 for x, y in taken)
        # The curve falls to the right: left of its points there is room.
        left = mark.tint == _OURS or (mark.share > 0.8) != crowded
        taken.append((mark.share, height))
        axes.annotate(
            mark.name,
            (100 * mark.share, height),
            xytext=(-5 if left else 5, -4 if mark.tint == _OURS else 0),
            textcoords="offset points",
            ha="right" if left else "left",
            va="center",
            color=mark.tint,
            fontsize="small",
        )


def _log2(number: float) -> float:
    return float(np.log2(max(number, 2.0**-60)))


def _legend_above(axes: Axes) -> None:
    """Where no line or bar can run through it."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        axes.legend(
            handles,
            labels,
            loc="lower left",
            bbox_to_anchor=(0, 1),
            ncols=4,
            borderaxespad=0.2,
            borderpad=0,
            handlelength=1.4,
            columnspacing=1.2,
        )


def _raised(power: str) -> str:
    """``2^-7`` with a raised exponent, as plain text."""
    base, caret, exponent = power.partition("^")
    return base + exponent.translate(_SUPERSCRIPTS) if caret else power


def _short_percent(share: float) -> str:
    if share == 0:
        return "0"
    return f"{share:.0f}" if share >= 9.5 else f"{share:.1f}" if share >= 0.1 else "<.1"


def _percent(axis: Any) -> None:
    axis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:g} %"))


def _log2_ticks(axis: Any) -> None:
    axis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    axis.set_major_formatter(FuncFormatter(lambda exponent, _: _raised(f"2^{exponent:g}")))
