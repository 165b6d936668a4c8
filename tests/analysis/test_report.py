import dataclasses
import html.parser
import re
import warnings
import xml.etree.ElementTree as ET

import joblib
import numpy as np
import pytest

from alignedkv.analysis import plots, svg
from alignedkv.analysis.case_files import find_cases, sample_path
from alignedkv.analysis.context_map import LEVEL_EDGES, bits_along_context
from alignedkv.analysis.records import ContextRecord, OutputRecord, PlaneRecord, SchemeRecord
from alignedkv.analysis.report import ReportFacts, build_report
from alignedkv.analysis.schemes import default_schemes
from alignedkv.analysis.sweep import SweepSettings, position_tasks, sweep
from alignedkv.analysis.tables import Findings, TokenTable, collect, frame_of
from alignedkv.policy import PrecisionPolicy

FACTS = ReportFacts(title="A & B", inputs=[("files", "<first>"), ("bound", "estimate")])
VOID = {"meta", "br", "img", "link"}


@pytest.fixture(scope="module")
def findings(tmp_path_factory):
    """One position of one head of the sample, for all schemes."""
    cases = find_cases(sample_path(), layers=[25], kv_heads=[1], positions=[-1])
    settings = SweepSettings(
        policy=PrecisionPolicy(),
        tolerances=(2.0**-7, 2.0**-5),
        curve=(2.0**-4,),
        schemes=default_schemes(),
    )
    with TokenTable(tmp_path_factory.mktemp("tokens")) as tokens:
        return collect(sweep(position_tasks(cases), settings), tokens)


@pytest.fixture(scope="module")
def page(findings):
    return build_report(findings, FACTS)


class Balance(html.parser.HTMLParser):
    """Every element that opens closes again, in order; attributes are gathered."""

    def __init__(self):
        super().__init__()
        self.open, self.attributes, self.ids = [], [], []

    def handle_starttag(self, tag, attrs):
        self.attributes += attrs
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += attrs
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_well_formed_and_its_ids_are_unique(page):
    parser = Balance()
    parser.feed(page)
    assert parser.open == []
    assert len(parser.ids) == len(set(parser.ids))


def test_the_page_needs_nothing_else(page):
    parser = Balance()
    parser.feed(page)
    assert "<script" not in page
    assert "@import" not in page
    assert "<link" not in page
    loads = {"src", "href", "xlink:href", "srcset", "data", "poster", "action"}
    assert all(value.startswith("#") for name, value in parser.attributes if name in loads)
    assert not re.findall(r"url\((?!#)", page)


def test_every_reference_inside_the_page_has_its_target(page):
    parser = Balance()
    parser.feed(page)
    used = set(re.findall(r"url\(#([^)]+)\)", page)) | set(re.findall(r'href="#([^"]+)"', page))
    assert used <= set(parser.ids)


def test_colours_are_variables_that_are_defined_for_light_and_dark(page):
    used = set(re.findall(r"var\(--([a-z0-9-]+)\)", page))
    assert used <= set(svg.PALETTE)
    assert page.count("--ink:") == 2
    assert "prefers-color-scheme: dark" in page
    # No stand-in is left, and no figure has a colour of its own.
    figures = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    assert not re.findall(r"(?:fill|stroke): (?!none|var)[^;\"]+", figures)


def test_text_of_users_is_escaped(page):
    assert "A &amp; B" in page
    assert "&lt;first&gt;" in page
    assert "<first>" not in page


def test_all_schemes_tolerances_and_figures_are_there(page, findings):
    for scheme in findings.schemes["scheme"].unique():
        assert page.count(scheme) >= 2  # in the table and in the picture
    assert page.count("<svg") == page.count("<figure>") == 6
    assert page.count("Tolerance 2<sup>−7</sup>") >= 2


@pytest.mark.parametrize(
    "draw",
    [
        plots.error_against_bytes,
        plots.cost_of_tolerance,
        plots.rows_per_plane,
        plots.tightness,
        lambda findings: bits_along_context(findings, "V", 2.0**-5),
    ],
)
def test_a_figure_is_xml_with_a_name(draw, findings):
    root = ET.fromstring(draw(findings))
    assert root.tag.endswith("svg")
    assert root.get("aria-label")
    assert {"width", "height"}.isdisjoint(root.attrib)


def test_a_heat_map_shows_the_bits_of_each_stretch(findings):
    """Cells are drawn in the level of their bits: one for each head and stretch."""
    context = findings.context[findings.context["tolerance"] == 2.0**-7]
    drawing = bits_along_context(findings, "K", 2.0**-7)
    levels = np.digitize(context["bits_k"], LEVEL_EDGES[1:-1])
    for level, count in zip(*np.unique(levels, return_counts=True), strict=True):
        # One more of each level stands in the legend.
        assert len(re.findall(rf"fill: var\(--heat-{level}\)", drawing)) >= count


def minimal(**output):
    """Findings of a single token and no scheme."""
    record = OutputRecord(
        layer=0,
        kv_head=0,
        head=0,
        position=0,
        tokens=1,
        effective_tokens=1.0,
        tolerance=0.1,
        requested=True,
        bits_k=4.0,
        bits_v=0.0,
        read_fraction=0.125,
        scale_fraction=1 / 64,
        stored_fraction=65 / 64,
        log2_theta=-np.inf,
        kind="estimate",
        bound=0.01,
        error=0.001,
        missed=False,
        violated=False,
        estimate=0.01,
        statistical=np.nan,
        deterministic=0.1,
    )
    where = {"layer": 0, "kv_head": 0, "position": 0, "tolerance": 0.1}
    return Findings(
        outputs=frame_of([dataclasses.replace(record, **output)], OutputRecord),
        schemes=frame_of([], SchemeRecord),
        planes=frame_of([PlaneRecord(**where, side="K", plane=1, share=1.0)], PlaneRecord),
        context=frame_of(
            [ContextRecord(**where, place=-1, tokens=1, bits_k=4.0, bits_v=0.0)], ContextRecord
        ),
        refused={"paper": "a number is too large"},
    )


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ({}, "No error was above its bound."),
        ({"error": 0.0}, "No error was above its bound."),
        ({"missed": True, "bound": 0.2}, "1 could not be certified"),
        ({"violated": True, "error": 0.02}, "1 errors were above their bound"),
        ({"bound": np.inf, "error": np.inf, "estimate": np.inf, "missed": True}, "inf"),
    ],
)
def test_the_lead_tells_misses_and_violations_whatever_the_numbers(output, said):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page = build_report(minimal(**output), FACTS)
    assert said in page
    assert "a number is too large" in page


def test_a_sweep_uses_the_backend_around_it():
    """Threads here; Dask workers in the tool's own test."""
    cases = find_cases(sample_path(), layers=[25], kv_heads=[0], positions=[-1, -2])
    settings = SweepSettings(policy=PrecisionPolicy(), tolerances=(2.0**-5,))
    alone = list(sweep(position_tasks(cases), settings))
    with joblib.parallel_config("threading", n_jobs=2):
        together = list(sweep(position_tasks(cases), settings))
    # As text: bounds that are not claimed are NaN, which equals nothing.
    assert [repr(r.outputs) for r in alone] == [repr(r.outputs) for r in together]
    assert [r.tokens for r in alone] == [r.tokens for r in together]


def test_positions_are_spaced_evenly_and_end_with_the_last():
    cases = find_cases(sample_path(), layers=[5], kv_heads=[0])
    for spaced, wanted in ((1, [1023]), (4, [1011, 1015, 1019, 1023]), (99, [*range(1008, 1024)])):
        tasks = position_tasks(cases, spaced=spaced)
        assert list(tasks[0][0].positions) == wanted
        assert [index for _, index in tasks] == list(range(len(wanted)))
