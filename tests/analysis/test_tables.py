import dataclasses
import json

import numpy as np
import pyarrow.csv
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignedkv.analysis.activations import AttentionCase
from alignedkv.analysis.encoding import encode_case
from alignedkv.analysis.plan import fixed_plan
from alignedkv.analysis.recording import context_bins, token_batch
from alignedkv.analysis.records import TOKEN_SCHEMA, OutputRecord, SchemeRecord
from alignedkv.analysis.scores import score_position
from alignedkv.analysis.tables import (
    TokenTable,
    frame_of,
    power_of_two,
    summarize,
    summarize_layers,
    summarize_schemes,
    summarize_tolerances,
    tolerance_name,
)
from alignedkv.policy import PrecisionPolicy

OUTPUT = OutputRecord(
    layer=0,
    kv_head=0,
    head=0,
    position=9,
    tokens=10,
    effective_tokens=3.0,
    tolerance=2.0**-7,
    requested=True,
    bits_k=5.0,
    bits_v=3.0,
    read_fraction=0.25,
    scale_fraction=1 / 64,
    stored_fraction=65 / 64,
    log2_theta=-6.0,
    kind="estimate",
    bound=2.0**-8,
    error=2.0**-10,
    missed=False,
    violated=False,
    estimate=2.0**-8,
    statistical=np.nan,
    deterministic=2.0**-4,
)


def outputs(*changes):
    return frame_of([dataclasses.replace(OUTPUT, **change) for change in changes], OutputRecord)


@pytest.fixture
def scores():
    rng = np.random.default_rng(0)
    case = AttentionCase(
        name="test",
        layer=3,
        kv_head=1,
        query=rng.standard_normal((2, 1, 32)).astype(np.float32),
        key=rng.standard_normal((40, 32)).astype(np.float32),
        value=rng.standard_normal((40, 32)).astype(np.float32),
        positions=np.array([36]),
        dtype="float32",
        scaling=32**-0.5,
        window=30,
    )
    return score_position(encode_case(case, PrecisionPolicy()), 0)


def test_a_summary_is_of_all_its_outputs():
    summary = summarize(
        outputs(
            {"error": 1e-3, "bound": 2e-3, "bits_k": 4.0},
            {"error": 3e-3, "bound": 9e-3, "missed": True, "bits_k": 8.0},
            {"error": 2e-3, "bound": 1e-3, "violated": True, "bits_k": 6.0},
        )
    )
    assert (summary.misses, summary.violations, summary.cases) == (1, 1, 3)
    assert summary.bits_k == 6.0
    assert (summary.bound_median, summary.bound_max) == (2e-3, 9e-3)
    assert (summary.error_median, summary.error_max) == (2e-3, 3e-3)
    assert summary.error_rms == pytest.approx((14e-6 / 3) ** 0.5)


def test_tolerances_and_layers_come_in_order_and_apart():
    frame = outputs(
        {"tolerance": 0.5, "layer": 7},
        {"tolerance": 0.25, "layer": 7},
        {"tolerance": 0.25, "layer": 2, "bits_k": 9.0},
    )
    assert [(s.tolerance, s.cases) for s in summarize_tolerances(frame)] == [(0.25, 2), (0.5, 1)]
    layers = summarize_layers(frame[frame["tolerance"] == 0.25])
    assert [(layer, s.bits_k) for layer, s in layers] == [(2, 9.0), (7, 5.0)]


def test_schemes_keep_the_order_in_which_they_came():
    def record(scheme, error):
        return SchemeRecord(
            layer=0,
            kv_head=0,
            head=0,
            position=0,
            scheme=scheme,
            bits_k=8.0,
            bits_v=8.25,
            read_fraction=0.5,
            stored_fraction=0.5,
            error=error,
        )

    frame = frame_of([record("z", 0.1), record("a", 0.2), record("z", 0.3)], SchemeRecord)
    found = summarize_schemes(frame)
    assert [(s.scheme, s.error_max, s.cases) for s in found] == [("z", 0.3, 2), ("a", 0.2, 1)]
    assert summarize_schemes(frame_of([], SchemeRecord)) == []


def test_json_holds_no_infinity():
    text = json.dumps(summarize(outputs({"bound": np.inf, "error": np.inf})).to_json())
    assert json.loads(text, parse_constant=pytest.fail)["bound_max"] is None


@given(st.integers(1, 3000))
def test_stretches_of_context_double_away_from_both_ends(tokens):
    bins = context_bins(tokens)
    assert len(bins) == tokens
    for sign, walk in ((1, bins), (-1, bins[::-1])):
        mine = walk[walk * sign > 0] * sign
        assert np.array_equal(mine, np.sort(mine))
        lengths = np.bincount(mine)[1:] if len(mine) else np.zeros(0, int)
        wanted = [1, *(2**n for n in range(len(lengths) - 1))]
        # All but the last, at the middle of the context, are full.
        assert lengths[:-1].tolist() == wanted[: len(lengths)][:-1]
    assert (np.sign(bins[: tokens // 2]) == 1).all()
    assert (np.sign(bins[tokens // 2 :]) == -1).all()


def test_a_token_row_is_what_the_plan_says_of_the_token(scores):
    plan = fixed_plan(scores, key_planes=3, value_planes=0)
    table = token_batch(scores, plan, 0.125).to_pydict()
    assert table["token"] == list(range(7, 37))
    assert set(table["layer"]) == {3}
    assert set(table["kv_head"]) == {1}
    assert set(table["position"]) == {36}
    assert (set(table["key_bits"]), set(table["key_planes"])) == ({12.0}, {3})
    assert (set(table["value_bits"]), set(table["value_planes"])) == ({0.0}, {0})
    assert set(table["read_probability"]) == {0.0}
    assert np.allclose(table["probability"], scores.probability.max(axis=0), rtol=1e-6)
    # Scales are bfloat16 numbers: float32 holds them exactly, and they bound their rows.
    assert np.array_equal(table["value_scale"], scores.values.scale)
    centred = scores.encoded.case.value[7:37] - scores.encoded.value_mean
    assert (np.abs(centred).max(axis=1) <= 7.5 * np.array(table["value_scale"])).all()


def test_both_files_hold_the_same_rows(scores, tmp_path):
    plan = fixed_plan(scores, key_planes=1, value_planes=2)
    with TokenTable(tmp_path) as table:
        table.write(token_batch(scores, plan, 0.125))
        table.write(token_batch(scores, plan, 0.25))
    parquet = pyarrow.parquet.read_table(tmp_path / "tokens.parquet")
    assert parquet.schema == TOKEN_SCHEMA
    assert parquet.num_rows == table.rows == 60
    options = pyarrow.csv.ConvertOptions(column_types=TOKEN_SCHEMA)
    assert pyarrow.csv.read_csv(tmp_path / "tokens.csv", convert_options=options).equals(parquet)


@pytest.mark.parametrize(
    ("number", "text"),
    [(0.0078125, "2^-7"), (0.001, "2^-10.0"), (0, "0"), (np.inf, "inf"), (2.0, "2^1")],
)
def test_errors_are_written_as_powers_of_two(number, text):
    assert power_of_two(number) == text


@pytest.mark.parametrize(("tolerance", "text"), [(2.0**-7, "2^-7"), (0.01, "0.01"), (0.5, "2^-1")])
def test_tolerances_are_written_exactly(tolerance, text):
    assert tolerance_name(tolerance) == text
