"""The report: one HTML file that needs nothing else, no network, no script.

Light or dark as the reader's system is; figures are inline SVG in the page's own colours.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from string import Template

import alignedkv
from alignedkv.analysis import plots
from alignedkv.analysis.context_map import bits_along_context
from alignedkv.analysis.report_style import PAGE
from alignedkv.analysis.svg import css_variables
from alignedkv.analysis.tables import (
    Findings,
    SchemeSummary,
    Summary,
    power_of_two,
    summarize_layers,
    summarize_schemes,
    summarize_tolerances,
    tolerance_name,
)
from alignedkv.policy import BoundKind

#: What each bound is worth, in the words of theory.md.
_KINDS = {
    BoundKind.ESTIMATE: "Estimate 9: the tightest, and not a proof. It takes errors of different "
    "tokens for uncorrelated; data built against it can exceed it.",
    BoundKind.STATISTICAL: "Theorem 7: exceeded with at most the stated probability over the "
    "dither, if the inputs do not depend on it.",
    BoundKind.DETERMINISTIC: "Theorem 5: never exceeded, whatever the data and the dither.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportFacts:
    """What the report says about the run, beside its findings.

    Attributes
    ----------
    title : str
    inputs : sequence of (str, str)
        Names and values of what was analyzed and how, in the order in which they are shown.
    """

    title: str
    inputs: Sequence[tuple[str, str]]


def build_report(findings: Findings, facts: ReportFacts) -> str:
    """The HTML page.

    Parameters
    ----------
    findings : Findings
        At least one output at a tolerance that was asked for.
    facts : ReportFacts
    """
    asked = summarize_tolerances(findings.requested)
    schemes = summarize_schemes(findings.schemes)
    return Template(PAGE).substitute(
        variables=css_variables(),
        title=html.escape(facts.title),
        lead=_lead(asked),
        cards="\n".join(_card(summary) for summary in asked),
        figures="\n".join(_figures(findings, asked)),
        schemes=_scheme_table(asked, schemes, findings.refused),
        layers=_layer_tables(findings, asked),
        bounds=_bound_list(BoundKind(asked[0].bound)),
        facts=_rows((html.escape(name), html.escape(value)) for name, value in facts.inputs),
        version=html.escape(alignedkv.__version__),
    )


def _lead(asked: Sequence[Summary]) -> str:
    loosest = asked[-1]
    missed = sum(summary.misses for summary in asked)
    violated = sum(summary.violations for summary in asked)
    text = (
        f"To keep the error of every attention output below {_tolerance(loosest.tolerance)} of its "
        f"largest component, {_percent(loosest.read_fraction)} of the bytes of a 16-bit cache need "
        "to be read."
    )
    if missed:
        text += (
            f" Of {sum(s.cases for s in asked)} outputs {missed} could not be certified at their "
            "tolerance; all stored planes of those were read."
        )
    text += (
        f" {violated} errors were above their bound."
        if violated
        else " No error was above its bound."
    )
    return text


def _card(summary: Summary) -> str:
    worst = f"{_power(summary.bound_max)} at most"
    rows = (
        ("bits per element, K / V", f"{summary.bits_k:.2f} / {summary.bits_v:.2f}"),
        ("error, median", _power(summary.error_median)),
        ("error, largest", _power(summary.error_max)),
        (f"bound ({html.escape(summary.bound)})", worst),
        ("not certified", f"{summary.misses} of {summary.cases}"),
    )
    return (
        '<div class="card"><p class="figure">'
        f'{_percent(summary.read_fraction)}</p><p class="of">of the bytes at tolerance '
        f"{_tolerance(summary.tolerance)}</p><table>{_rows(rows)}</table></div>"
    )


def _figures(findings: Findings, asked: Sequence[Summary]) -> Iterable[str]:
    tightest = asked[0].tolerance
    yield _figure(
        "Error against bytes",
        plots.error_against_bytes(findings),
        "A dot is the median error of all outputs, its line reaches up to the largest. Blue: "
        "alignedkv at several tolerances; orange: other ways to keep the cache. Lower left is "
        "better.",
    )
    yield _figure(
        "What a tolerance costs",
        plots.cost_of_tolerance(findings),
        "Bytes of keys and of values; the thin line spans the KV heads. Peaked heads need few "
        "bytes, flat ones many.",
    )
    yield _figure(
        "Rows that reach each plane",
        plots.rows_per_plane(findings),
        "The first key plane is always read: it decides about the rest. A value row whose weight "
        "is too small to matter is not read at all.",
    )
    yield _figure(
        "How tight the bounds are",
        plots.tightness(findings),
        "How far below a bound of the same plan the errors really lie. A curve that crossed the "
        "dashed line would be a bound that failed.",
    )
    for side, name in (("K", "keys"), ("V", "values")):
        yield _figure(
            f"Bits of {name} along the context",
            bits_along_context(findings, side, tightest),
            f"Tolerance {_tolerance(tightest)}. Stretches double in length away from both ends, so "
            "that attention sinks (left) and recent tokens (right) can be seen.",
        )


def _figure(title: str, svg: str, caption: str) -> str:
    return f"<figure><h3>{html.escape(title)}</h3>{svg}<figcaption>{caption}</figcaption></figure>"


def _scheme_table(
    asked: Sequence[Summary], schemes: Sequence[SchemeSummary], refused: dict[str, str]
) -> str:
    # What one looks for comes first: on a narrow screen the rest is a swipe away.
    head = ("scheme", "read", "error, median", "rms", "largest", "bits K / V", "stored")

    def line(name: str, read: float, summary: Summary | SchemeSummary) -> Sequence[str]:
        return (
            name,
            _percent(read),
            _power(summary.error_median),
            _power(summary.error_rms),
            _power(summary.error_max),
            f"{summary.bits_k:.2f} / {summary.bits_v:.2f}",
            _percent(summary.stored_fraction),
        )

    rows = [
        line(f"<b>alignedkv, {_tolerance(s.tolerance)}</b>", s.read_fraction + s.scale_fraction, s)
        for s in asked
    ] + [line(html.escape(s.scheme), s.read_fraction, s) for s in schemes]
    notes = "".join(
        f"<p class='note'>{html.escape(name)} is left out where it cannot hold the inputs: "
        f"{html.escape(reason)}</p>"
        for name, reason in refused.items()
    )
    return (
        f"{_table(head, rows)}<p class='note'>Bytes read and stored, scales included, as a share "
        f"of a 16-bit cache's.</p>{notes}"
    )


def _layer_tables(findings: Findings, asked: Sequence[Summary]) -> str:
    parts = []
    head = ("layer", "bytes read", "error, median", "largest", "bound", "missed", "bits K / V")
    for total in asked:
        outputs = findings.requested[findings.requested["tolerance"] == total.tolerance]
        lines = [(str(layer), s) for layer, s in summarize_layers(outputs)] + [("all", total)]
        rows = [
            (
                name,
                _percent(s.read_fraction),
                _power(s.error_median),
                _power(s.error_max),
                _power(s.bound_max),
                f"{s.misses} / {s.cases}",
                f"{s.bits_k:.2f} / {s.bits_v:.2f}",
            )
            for name, s in lines
        ]
        parts.append(f"<h3>Tolerance {_tolerance(total.tolerance)}</h3>{_table(head, rows)}")
    return "\n".join(parts)


def _bound_list(chosen: BoundKind) -> str:
    return "".join(
        f"<dt>{kind}{' (plans were made for it)' if kind is chosen else ''}</dt><dd>{text}</dd>"
        for kind, text in _KINDS.items()
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    top = "".join(f"<th scope='col'>{name}</th>" for name in head)
    return (
        f"<div class='scroll'><table><thead><tr>{top}</tr></thead>"
        f"<tbody>{_rows(rows)}</tbody></table></div>"
    )


def _rows(rows: Iterable[Sequence[str]]) -> str:
    return "".join(
        f"<tr><th scope='row'>{first}</th>{''.join(f'<td>{cell}</td>' for cell in rest)}</tr>"
        for first, *rest in rows
    )


def _power(number: float) -> str:
    return _raised(power_of_two(number))


def _tolerance(tolerance: float) -> str:
    return _raised(tolerance_name(tolerance))


def _raised(power: str) -> str:
    base, caret, exponent = power.partition("^")
    return f"{base}<sup>{exponent.replace('-', '−')}</sup>" if caret else base


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
