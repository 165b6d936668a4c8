"""Pictures of recorded results."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

__all__ = ["draw_decode"]

_OURS = "#c2410c"
_PEERS = (
    "#1d4ed8",
    "#0f766e",
    "#7c3aed",
    "#4d7c0f",
    "#64748b",
    "#0369a1",
    "#a16207",
    "#9f1239",
    "#334155",
)


def draw_decode(content: dict[str, Any], out: Path) -> None:
    """Time against T at batch 1, a panel per kind of data; dotted: the bytes at full bandwidth.

    Parameters
    ----------
    content : dict
        What ``bench.py decode --json`` wrote.
    out : Path
        Picture; its suffix chooses the format.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in content["rows"] if row["batch"] == 1]
    kinds = sorted({row["data"] for row in rows})
    figure, panels = pyplot.subplots(
        1, len(kinds), figsize=(1.5 + 4.2 * len(kinds), 4.6), sharey=True, squeeze=False
    )
    for panel, kind in zip(panels[0], kinds, strict=True):
        mine = [row for row in rows if row["data"] == kind]
        _draw_peers(panel, mine)
        for style, tolerance in zip(
            ("-", "--", "-."), sorted({row["tolerance"] for row in mine}), strict=False
        ):
            line = sorted((r for r in mine if r["tolerance"] == tolerance), key=lambda r: r["T"])
            tokens = [r["T"] for r in line]
            label = f"alignedkv, tolerance 2^{math.log2(tolerance):.0f}"
            panel.plot(
                tokens, [r["ours_us"] for r in line], style, color=_OURS, lw=2.2, label=label
            )
            ceiling = [r["ceiling_us"] for r in line]
            panel.plot(tokens, ceiling, ":", color=_OURS, lw=1, label=None)
        panel.set(xscale="log", yscale="log", title=f"{kind} scores", xlabel="cached tokens T")
        panel.set_xticks(
            sorted({r["T"] for r in mine}),
            [f"{r // 1024}k" for r in sorted({r["T"] for r in mine})],
        )
        panel.minorticks_off()
        panel.grid(alpha=0.25)
    panels[0, 0].set_ylabel("microseconds a step")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.suptitle(
        f"{content['card']}, cold L2; dotted: our bytes at measured bandwidth", fontsize=10
    )
    figure.tight_layout()
    figure.savefig(out, bbox_inches="tight")
    pyplot.close(figure)


def _draw_peers(panel: Any, rows: list[dict[str, Any]]) -> None:
    names = sorted({name for row in rows for name in row["peers_us"]})
    for color, name in zip(itertools.cycle(_PEERS), names, strict=False):
        points = sorted({(r["T"], r["peers_us"][name]) for r in rows if name in r["peers_us"]})
        panel.plot(*zip(*points, strict=True), color=color, lw=1, marker=".", label=name)
