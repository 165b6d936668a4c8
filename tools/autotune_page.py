"""The page of `autotune.py`: the landscape of each sweep in one HTML file, light or dark."""

from __future__ import annotations

import html
import itertools
import statistics
from collections.abc import Iterable, Sequence
from string import Template

from matplotlib.ticker import FuncFormatter

from alignedkv.analysis.svg import color, css_variables, drawing, series, to_svg
from alignedkv.kernels.config import CHOICES, STEP_TUNABLES
from alignedkv.kernels.tune.front import front
from alignedkv.kernels.tune.trials import Status, Sweep, Trial
from autotune_sweep import describe, title_of

PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>alignedkv: autotuning</title>
<style>
$variables
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem clamp(0.9rem, 3vw, 2rem) 3rem; max-width: 76rem;
  background: var(--ground); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 0.5rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 0.5rem; overflow-wrap: anywhere; }
p { margin: 0 0 0.75rem; max-width: 46rem; }
.figures { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 28rem), 1fr)); }
figure { border: 1px solid var(--grid); border-radius: 0.6rem; padding: 1rem; margin: 0; }
figure svg { display: block; width: 100%; height: auto; max-width: 34rem; margin: 0 auto; }
figure svg text { font-family: inherit !important; }
figcaption { color: var(--muted); font-size: 0.88rem; margin-top: 0.6rem; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.6rem; border-bottom: 1px solid var(--grid); text-align: right;
  white-space: nowrap; font-weight: 400; }
th { color: var(--muted); font-size: 0.85rem; }
tr.default td { color: var(--series-1); }
footer { color: var(--muted); font-size: 0.85rem; margin-top: 2.5rem; overflow-wrap: anywhere; }
</style>
</head>
<body>
<h1>Autotuning of the decode step</h1>
<p>Every configuration was checked before its time counted: an output outside its own bound of the
exact one, or a bound under the reference's, is a wrong answer and cannot win. Times are medians per
step over replays of a CUDA graph with cold caches.</p>
$sections
<footer>$footer</footer>
</body>
</html>
""")

TOP = 12


def page(sweeps: Sequence[Sweep]) -> str:
    """The HTML page of sweeps; those that differ in tolerance alone share a front."""
    numbers = itertools.count()
    sections = [_section(sweep, f"s{next(numbers)}") for sweep in sweeps]
    groups = [list(group) for _, group in itertools.groupby(sweeps, key=_but_tolerance)]
    fronts = [_front(group, f"f{next(numbers)}") for group in groups if len(group) > 1]
    footers = dict.fromkeys(f"{sweep.command} on {sweep.card}" for sweep in sweeps)
    return PAGE.substitute(
        variables=css_variables(),
        sections="\n".join([*fronts, *sections]),
        footer=html.escape("; ".join(footers)),
    )


def _but_tolerance(sweep: Sweep) -> tuple[object, ...]:
    p = sweep.problem
    return (p.spec, p.batch, p.kv_heads, p.tokens, p.data, sweep.card)


def _section(sweep: Sweep, name: str) -> str:
    ranked = sweep.ranked()
    title = html.escape(title_of(sweep.problem))
    failed = len(sweep.trials) - len(ranked)
    if not ranked:
        return f"<h2>{title}</h2><p>None of {failed} configurations had a right answer.</p>"
    gain = "" if sweep.gain is None else f", {sweep.gain:.2f} times as fast as the default"
    words = (
        f"{len(sweep.trials)} configurations, {failed} of them wrong or failed. The fastest takes "
        f"{ranked[0].median_us:.2f} us{gain}: {describe(ranked[0].config)}."
    )
    figures = [
        (_curve(sweep, ranked, f"{name}c"), "All right configurations, fastest first."),
        (_search(sweep, f"{name}s"), "The best so far, in the order of the search."),
        (
            _choices(ranked, f"{name}t"),
            "Each choice of each tunable: the fastest with it (dot), and all with it from the "
            "10th to the 90th percentile (bar).",
        ),
    ]
    drawn = "\n".join(
        f"<figure>{svg}<figcaption>{text}</figcaption></figure>" for svg, text in figures
    )
    return (
        f'<h2>{title}</h2><p>{html.escape(words)}</p><div class="figures">{drawn}</div>'
        f'<div class="scroll">{_table(sweep, ranked)}</div>'
    )


def _curve(sweep: Sweep, ranked: Sequence[Trial], name: str) -> str:
    with drawing(name, 5.2, 3.2) as figure:
        axes = figure.add_subplot()
        times = [trial.median_us for trial in ranked]
        axes.plot(range(1, len(times) + 1), times, color=series(0))
        for rank, trial in enumerate(ranked, start=1):
            if trial.config == sweep.default:
                axes.plot(rank, trial.median_us, "o", color=series(1))
                axes.annotate(
                    f"default, rank {rank}",
                    (rank, trial.median_us),
                    textcoords="offset points",
                    xytext=(7, 7),
                    color=series(1),
                )
        axes.set(xlabel="rank", ylabel="us per step")
        return to_svg(figure, f"Time by rank, from {times[0]:.1f} to {times[-1]:.1f} us")


def _choices(ranked: Sequence[Trial], name: str) -> str:
    rows = [
        (tunable, choice, [t.median_us for t in ranked if getattr(t.config, tunable) == choice])
        for tunable in STEP_TUNABLES
        for choice in CHOICES[tunable]
    ]
    rows = [row for row in rows if row[2]]
    with drawing(name, 5.2, 0.4 + 0.21 * len(rows)) as figure:
        axes = figure.add_subplot()
        for number, (tunable, _, times) in enumerate(rows):
            shade = series(STEP_TUNABLES.index(tunable))
            low, high = _tenths(times)
            axes.plot([low, high], [number, number], color=shade, linewidth=3, alpha=0.45)
            axes.plot(min(times), number, "o", color=shade, markersize=4.5)
        axes.set(xlabel="us per step", xscale="log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.xaxis.set_minor_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.set_yticks(range(len(rows)), [f"{tunable} {choice}" for tunable, choice, _ in rows])
        axes.invert_yaxis()
        return to_svg(figure, "Time by choice of each tunable")


def _tenths(times: Sequence[float]) -> tuple[float, float]:
    if len(times) < 2:
        return times[0], times[0]
    deciles = statistics.quantiles(times, n=10, method="inclusive")
    return deciles[0], deciles[-1]


def _search(sweep: Sweep, name: str) -> str:
    with drawing(name, 5.2, 3.2) as figure:
        axes = figure.add_subplot()
        right = [
            (number, trial.median_us)
            for number, trial in enumerate(sweep.trials, start=1)
            if trial.status is Status.OK
        ]
        numbers, times = zip(*right, strict=True)
        axes.plot(numbers, times, ".", color=color("muted"), markersize=3)
        axes.step(numbers, list(itertools.accumulate(times, min)), where="post", color=series(0))
        axes.set(xlabel="evaluation", ylabel="us per step")
        return to_svg(figure, "Best time so far over the evaluations")


def _front(group: Sequence[Sweep], name: str) -> str:
    """Time against bound and error over tolerances."""
    points = [trial for sweep in group for trial in sweep.ranked() if "bound" in trial.facts]
    if not points:
        return ""
    title = html.escape(title_of(group[0].problem).rpartition(", tolerance")[0])
    tolerances = ", ".join(f"{sweep.problem.tolerance:.3g}" for sweep in group)
    drawn = "".join(
        f"<figure>{_draw_front(quantity, points, name + quantity)}<figcaption>Time against the "
        f"largest {quantity}, relative to an output's largest number. On the line nothing is both "
        "faster and closer.</figcaption></figure>"
        for quantity in ("bound", "error")
    )
    return (
        f'<h2>Front: {title}</h2><p>Tolerances {tolerances}.</p><div class="figures">{drawn}</div>'
    )


def _draw_front(quantity: str, points: Iterable[Trial], name: str) -> str:
    pairs = [(trial.median_us, float(trial.facts[quantity])) for trial in points]
    best = front(pairs, lambda pair: pair)
    with drawing(name, 5.2, 3.4) as figure:
        axes = figure.add_subplot()
        axes.plot(*zip(*pairs, strict=True), ".", color=color("muted"), markersize=3)
        axes.step(*zip(*best, strict=True), where="post", color=series(0))
        axes.plot(*zip(*best, strict=True), "o", color=series(0), markersize=4)
        axes.set_yscale("log", base=2)
        axes.set(xlabel="us per step", ylabel=f"largest {quantity}")
        return to_svg(figure, f"Time against the largest {quantity}: the front over tolerances")


def _table(sweep: Sweep, ranked: Sequence[Trial]) -> str:
    head = ["rank", "us", "spread", "read", "bound", "error", "registers", *STEP_TUNABLES]
    shown = list(enumerate(ranked, start=1))
    shown = shown[:TOP] + [pair for pair in shown[TOP:] if pair[1].config == sweep.default]
    rows = []
    for rank, trial in shown:
        facts = trial.facts
        read = facts.get("read_fraction")
        cells = [
            str(rank),
            f"{trial.median_us:.2f}",
            f"{trial.spread_us:.2f}",
            "" if read is None else f"{100 * read:.1f} %",
            *(f"{facts[n]:.2g}" if n in facts else "" for n in ("bound", "error")),
            str(facts.get("registers", "")),
            *(str(getattr(trial.config, tunable)) for tunable in STEP_TUNABLES),
        ]
        style = ' class="default"' if trial.config == sweep.default else ""
        rows.append(f"<tr{style}>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    header = "".join(f"<th>{name.replace('_', ' ')}</th>" for name in head)
    return f"<table><thead><tr>{header}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
