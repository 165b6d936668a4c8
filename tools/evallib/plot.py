"""Plots of an evaluation: fidelity against bytes read, and needles found."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd


def plot_fidelity(table: pd.DataFrame, path: Path) -> None:
    """Mean KL of every candidate against the share of bytes that it reads."""
    shown = table[(table.kl_mean > 0) & table.read_fraction.notna()]
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    ours = shown.name.str.startswith("alignedkv")
    axes.plot(100 * shown.read_fraction[ours], shown.kl_mean[ours], "o-", label="alignedkv")
    axes.plot(100 * shown.read_fraction[~ours], shown.kl_mean[~ours], "s", label="others")
    for row in shown.itertuples():
        axes.annotate(
            row.name.removeprefix("alignedkv "),
            (100 * row.read_fraction, row.kl_mean),
            textcoords="offset points",
            xytext=(5, 4),
            fontsize=8,
        )
    axes.set(
        xlabel="bytes of keys and values read, % of 16 bit",
        ylabel="mean KL(exact || candidate), nats",
        yscale="log",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)
    plt.close(figure)


def plot_needles(found: pd.DataFrame, path: Path) -> None:
    """Contexts against depths, one panel a candidate; filled where the number was found."""
    names = list(found.name.unique())
    figure, panels = plt.subplots(
        1, len(names), figsize=(3.2 * len(names), 3), layout="constrained", squeeze=False
    )
    for axes, name in zip(panels[0], names, strict=True):
        grid = found[found.name == name].pivot_table(
            index="depth", columns="context", values="found", aggfunc="mean"
        )
        axes.imshow(grid.to_numpy(float), vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axes.set_xticks(range(len(grid.columns)), [str(c) for c in grid.columns])
        axes.set_yticks(range(len(grid.index)), [f"{d:.0%}" for d in grid.index])
        axes.set(title=name, xlabel="context", ylabel="depth")
    figure.savefig(path)
    plt.close(figure)
