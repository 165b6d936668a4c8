"""What others do to a case; for the paper one witness for each slip of its code."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest

from alignedkv.analysis.schemes import default_schemes
from alignedkv.analysis.schemes.paper_rule import BLOCK, PaperRule, Slips
from alignedkv.analysis.schemes.quantised import (
    KIVI_GROUP,
    KIVI_RECENT,
    Fp8,
    Int8,
    Kivi,
    SixteenBit,
)
from alignedkv.analysis.schemes.scheme import exact_output
from alignedkv.errors import SpecError
from alignedkv.formats import BF16, FP8_E4M3, FP8_E5M2, FP16
from analysis_cases import make_case, sample_cases

BITS = {"fp16": 16, "bf16": 16, "fp8 e4m3": 8, "fp8 e5m2": 8}


@pytest.fixture(scope="module")
def sample():
    return sample_cases()


@pytest.mark.parametrize("scheme", default_schemes(), ids=lambda s: s.name)
def test_every_scheme_answers_on_real_rows(sample, scheme):
    for case in sample[::4]:
        result = scheme.apply(case, 7)
        assert result.name == scheme.name
        assert result.output.shape == (3, 64)
        assert (result.exact == exact_output(case, 7)).all()
        assert (result.error == np.abs(result.output - result.exact).max(axis=1)).all()
        assert (result.relative_error < 2.0).all()
        if scheme.name in BITS:
            assert result.key_bits == result.value_bits == BITS[scheme.name]
            assert result.bytes_stored == 2 * BITS[scheme.name] * 64 * 1016 / 8


def test_errors_are_ordered_as_the_study_found_them(sample):
    """measurements.md 5: medians of relative errors, each scheme 2 bits or more from the next."""
    order = ["fp16", "paper, mended", "paper, as published", "fp8 e4m3", "KIVI-2"]
    schemes = {scheme.name: scheme for scheme in default_schemes()}
    medians = [
        np.median([schemes[name].apply(case, i).relative_error for case in sample for i in (3, 15)])
        for name in order
    ]
    assert (np.diff(np.log2(medians)) > 1.0).all()


@pytest.mark.parametrize("scheme", default_schemes(), ids=lambda s: s.name)
def test_schemes_see_what_the_query_sees(scheme):
    """Window, padding, cap and sink, on one row that every scheme holds without error."""
    rng = np.random.default_rng(0)
    row = rng.choice([-1.0, 1.0], (1, 64))
    for changes in (
        {"window": 5},
        {"start": 30},
        {"softcap": 2.0},
        {"sinks": np.array([1.0, -np.inf])},
    ):
        case = make_case(value=np.repeat(row, 48, axis=0).astype(np.float16), **changes)
        result = scheme.apply(case, 0)
        # Only rounding of weights and output is left: as large as the type says, once each.
        u = BF16.unit_roundoff if scheme.name == "bf16" else FP16.unit_roundoff
        sums = 48 * FP16.unit_roundoff if scheme.name == "paper, as published" else 0.0
        filled = 2.0**-3 if "published" in scheme.name else 0.0
        assert (result.error <= 4 * u + sums + filled).all()


@pytest.mark.parametrize("number_format", [FP8_E4M3, FP8_E5M2], ids=lambda f: f.name)
def test_fp8_rounds_after_one_scale_per_tensor(number_format):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x = np.random.default_rng(1).standard_normal((20, 64))
    scale = np.abs(x).max() / number_format.max
    theirs = (x / scale).astype(getattr(ml_dtypes, number_format.name)).astype(np.float64) * scale
    assert (Fp8(name="", number_format=number_format)._rounded(x) == theirs).all()


def test_int8_errs_by_half_a_step_of_each_row():
    case = make_case(sharpness=0.0, tokens=16)
    result = Int8().apply(case, 0)
    value = case.value.astype(np.float64)
    step = np.abs(value).max(axis=1) / 127
    assert (result.error <= step.mean() / 2 + 1e-12).all()
    assert result.value_bits == 8 + 16 / 64
    assert result.key_bits == 8 + 16 / 16


@pytest.mark.parametrize("bits", [2, 4])
def test_kivi_groups_have_their_own_range(bits):
    x = np.random.default_rng(2).standard_normal((5, 80))
    out = Kivi(bits=bits)._grouped(x)
    for start in range(0, 80, KIVI_GROUP):
        group, read = x[:, start : start + KIVI_GROUP], out[:, start : start + KIVI_GROUP]
        width = np.ptp(group, axis=1, keepdims=True)
        step = width / (2**bits - 1)
        # Half a step, and the rounding of the step to fp16 at the far end.
        assert (np.abs(read - group) <= step / 2 + width * FP16.unit_roundoff + 1e-12).all()
        assert max(len(set(row)) for row in read.tolist()) <= 2**bits


@pytest.mark.parametrize("tokens", [40, 128, 300])
def test_kivi_keeps_recent_tokens(tokens):
    result = Kivi(bits=4).apply(make_case(tokens=tokens, sharpness=0.5), 0)
    old = max(tokens - KIVI_RECENT, 0) // KIVI_GROUP * KIVI_GROUP
    assert result.key_bits == pytest.approx((5 * old + 16 * (tokens - old)) / tokens)
    if old == 0:
        assert (result.error < 1e-12).all()
    else:
        assert (result.error > 1e-4).all()


def test_sixteen_bits_round_weights_and_output():
    case = make_case(tokens=64, sharpness=1)
    fp16 = SixteenBit(name="fp16", number_format=FP16).apply(case, 0)
    bf16 = SixteenBit(name="bf16", number_format=BF16).apply(case, 0)
    assert (fp16.output == fp16.output.astype(np.float16)).all()
    assert (fp16.error <= 2 * FP16.unit_roundoff * np.abs(case.value).max()).all()
    assert (bf16.error > 2 * fp16.error).all()


@pytest.mark.parametrize("scheme", default_schemes(), ids=lambda s: s.name)
@pytest.mark.filterwarnings("error")
def test_zero_rows_and_one_token_are_no_errors(scheme):
    zeros = np.zeros((70, 64), np.float16)
    for case in (
        make_case(tokens=70, key=zeros),
        make_case(tokens=70, value=zeros),
        make_case(tokens=1),
    ):
        result = scheme.apply(case, 0)
        assert np.isfinite(result.output).all()
        assert not np.isnan(result.relative_error).any()


# The paper's rule.


def with_slip(name: str) -> PaperRule:
    """The mended rule with one slip left in."""
    mended = PaperRule.mended()
    return replace(mended, name=name, slips=replace(mended.slips, **{name: True}))


def compare(name, case, index=0):
    """Results of the mended rule and of the one with the slip."""
    return PaperRule.mended().apply(case, index), with_slip(name).apply(case, index)


def test_all_slips_are_witnessed():
    names = {name.removeprefix("test_slip_") for name in globals() if name.startswith("test_slip_")}
    assert names == {field.name for field in fields(Slips)}


def test_slip_signed_maximum():
    """A key channel of large negative numbers is read to 8 bits, though it makes the scores."""
    rng = np.random.default_rng(0)
    key = 0.5 * rng.standard_normal((128, 64))
    key[:, 0] = -rng.uniform(10, 60, 128)
    key[5, 0] = 2.0**-10
    query = np.full((1, 1, 64), 1.0)
    case = make_case(
        tokens=128, group=1, key=key.astype(np.float16), query=query.astype(np.float16)
    )
    mended, slipped = compare("signed_maximum", case)
    assert PaperRule.mended().key_bits(query[0, 0], key)[0] == 16
    assert with_slip("signed_maximum").key_bits(query[0, 0], key)[0] == 8
    assert slipped.error[0] > 16 * mended.error[0]  # a plane of 4 bits, and more


def test_slip_masked_exponent():
    """An even exponent is not lowered by one: rows lose bits one binade too early."""
    weights = np.full(16, 2.0**-4)
    for exponent, expected in ((0, 16), (1, 12)):
        # The output's exponent field is 15 or 16; gaps are 3, or 4 with the slip.
        value = np.full((16, 64), 2.0**exponent)
        assert (PaperRule.mended().value_bits(weights, value) == 16).all()
        assert (with_slip("masked_exponent").value_bits(weights, value) == expected).all()


def test_slip_unsigned_gaps():
    """A channel of huge numbers that cancel wraps to a huge gap, and its rows are cut."""
    rng = np.random.default_rng(1)
    value = 0.1 + 0.01 * rng.standard_normal((128, 64))
    value[:, 3] = np.where(np.arange(128) % 2, 30000.0, -30000.0) * rng.uniform(0.9, 1, 128)
    value[1::2, 3] = -value[::2, 3]
    value[0, 3] += 16
    case = make_case(tokens=128, group=1, sharpness=0.0, value=value.astype(np.float16))
    mended, slipped = compare("unsigned_gaps", case)
    assert mended.value_bits == 16
    assert slipped.value_bits < 16
    assert slipped.error[0] > 10 * mended.error[0]


def test_slip_value_gaps():
    """Gaps of one and two exponents cost 4 and 8 bits: what is dropped matters."""
    case = make_case(tokens=256, group=1, sharpness=1.0)
    mended, slipped = compare("value_gaps", case)
    assert slipped.value_bits < mended.value_bits
    assert slipped.error[0] > 4 * mended.error[0]


def test_slip_probe():
    """The probe counts magnitudes: where values cancel it expects a far larger output."""
    rng = np.random.default_rng(2)
    value = rng.choice([-1.0, 1.0], (256, 64)) * rng.uniform(0.5, 0.9, (256, 64))
    value[1::2] = -value[::2] * (1 + 2.0**-9)
    case = make_case(tokens=256, group=1, sharpness=0.0, value=value.astype(np.float16))
    mended, slipped = compare("probe", case)
    assert slipped.value_bits < mended.value_bits
    assert slipped.error[0] > 4 * mended.error[0]


def test_slip_half_sums():
    """Weights below half an ulp of the running sum are lost: a mean of ones is a quarter."""
    tokens = 16384
    case = make_case(tokens=tokens, group=1, sharpness=0.0, value=np.ones((tokens, 64), np.float16))
    mended, slipped = compare("half_sums", case)
    assert mended.error[0] < 2.0**-3
    assert slipped.output[0, 0] <= 0.25


def test_slip_filled_zeros():
    """The middle of an unread range is not zero, even where the number is."""
    case = make_case(tokens=128, group=1, sharpness=0.0, value=np.zeros((128, 64), np.float16))
    mended, slipped = compare("filled_zeros", case)
    assert not mended.output.any()
    assert (slipped.output > 0).all()


def test_the_paper_stores_all_bits_and_keeps_a_tail():
    case = make_case(tokens=100, sharpness=1)
    result = PaperRule.as_published().apply(case, 0)
    assert result.bytes_stored == 2 * 100 * 64 * 2
    tail = 100 % BLOCK * 16 / 100
    assert tail <= result.key_bits <= 16
    alone = PaperRule.as_published().apply(make_case(tokens=BLOCK - 1), 0)
    assert alone.key_bits == alone.value_bits == 16


def test_numbers_beyond_a_type_are_refused():
    case = make_case(tokens=70, dtype="float32", key=np.full((70, 64), 1e6, np.float32))
    with pytest.raises(SpecError, match=r"fp16: 1000000.0 is no finite float16"):
        SixteenBit(name="fp16", number_format=FP16).apply(case, 0)
    assert SixteenBit(name="bf16", number_format=BF16).apply(case, 0).key_bits == 16


def test_the_paper_knows_fp16_alone():
    case = make_case(tokens=70, dtype="float32", key=np.full((70, 64), 1e6, np.float32))
    with pytest.raises(SpecError, match="float16"):
        PaperRule.mended().apply(case, 0)
