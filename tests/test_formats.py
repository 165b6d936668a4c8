"""formats.py against rational arithmetic, and both against NumPy and ml_dtypes."""

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignedkv import formats
from alignedkv.formats import BF16, FP8_E4M3, FP8_E5M2, FP16, FP32, FloatFormat
from rational import round_scalar

DTYPES = {
    FP16: np.float16,
    BF16: ml_dtypes.bfloat16,
    FP32: np.float32,
    FP8_E4M3: ml_dtypes.float8_e4m3fn,
    FP8_E5M2: ml_dtypes.float8_e5m2,
}
TOY = FloatFormat(name="toy", bits=8, precision=4)
every_format = pytest.mark.parametrize("fmt", DTYPES, ids=lambda fmt: fmt.name)
formats_strategy = st.sampled_from([*DTYPES, TOY])


def values_of_all_codes(fmt):
    """Every non-NaN value of an 8- or 16-bit format, ascending, by the outside authority."""
    codes = np.arange(2**fmt.bits, dtype=f"uint{fmt.bits}")
    with np.errstate(invalid="ignore"):  # signalling NaN
        values = codes.view(DTYPES[fmt]).astype(np.float64)
    return np.unique(values[~np.isnan(values)])


def both(fmt, values):
    """Values rounded by `round_to`, after checking that `round_scalar` agrees bit for bit."""
    fast = formats.round_to(fmt, values)
    slow = np.array([round_scalar(fmt, float(x)) for x in np.ravel(values)])
    np.testing.assert_array_equal(fast.ravel().view(np.uint64), slow.view(np.uint64))
    return fast


# --- the facts of a format --------------------------------------------------------------------


@every_format
def test_derived_facts_agree_with_finfo(fmt):
    info = ml_dtypes.finfo(DTYPES[fmt])
    assert fmt.bits == info.bits
    assert fmt.precision == info.nmant + 1
    assert fmt.exponent_bits == info.nexp
    assert fmt.eps == float(info.eps)
    assert fmt.max == float(info.max)
    assert fmt.min_exponent == info.minexp
    assert fmt.smallest_normal == float(info.smallest_normal)
    assert fmt.smallest_subnormal == float(info.smallest_subnormal)


@every_format
def test_codes_are_those_of_the_values(fmt):
    word = f"uint{fmt.bits}"

    def value(code):
        return float(np.array(code, dtype=word).view(DTYPES[fmt]))

    assert value(fmt.code_of_max) == fmt.max
    assert value(fmt.code_of_smallest_normal) == fmt.smallest_normal
    after_max = value(fmt.code_of_max + 1)
    assert math.isinf(after_max) if fmt.has_infinity else math.isnan(after_max)


@every_format
def test_identities(fmt):
    assert fmt.eps == 2 * fmt.unit_roundoff
    assert round_scalar(fmt, 1 + fmt.unit_roundoff) == 1
    assert round_scalar(fmt, 1 + 1.5 * fmt.unit_roundoff) == 1 + fmt.eps
    assert round_scalar(fmt, fmt.smallest_subnormal / 2) == 0
    assert formats.ulp(fmt, 1.0) == fmt.eps
    assert formats.ulp(fmt, fmt.smallest_normal) == fmt.smallest_subnormal
    assert formats.exponent(fmt.max) == fmt.max_exponent


@pytest.mark.parametrize(("bits", "precision"), [(16, 1), (64, 54), (12, 11), (24, 8)])
def test_formats_that_float64_cannot_hold_are_refused(bits, precision):
    with pytest.raises(ValueError, match="odd"):
        FloatFormat(name="odd", bits=bits, precision=precision)


# --- rounding ---------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", [FP16, BF16, FP8_E4M3, FP8_E5M2], ids=lambda fmt: fmt.name)
def test_every_value_is_fixed_and_every_tie_goes_to_even(fmt):
    values = values_of_all_codes(fmt)
    np.testing.assert_array_equal(formats.round_to(fmt, values), values)

    finite = values[np.isfinite(values)]
    ties = (finite[1:] + finite[:-1]) / 2
    below, above = np.nextafter(ties, -np.inf), np.nextafter(ties, np.inf)
    np.testing.assert_array_equal(formats.round_to(fmt, below), finite[:-1])
    np.testing.assert_array_equal(formats.round_to(fmt, above), finite[1:])
    codes = np.abs(finite).astype(DTYPES[fmt]).view(f"uint{fmt.bits}")
    is_even = codes % 2 == 0
    expected = np.where(is_even[1:], finite[1:], finite[:-1])
    np.testing.assert_array_equal(formats.round_to(fmt, ties), expected)


@pytest.mark.parametrize("fmt", [FP16, BF16, FP8_E5M2], ids=lambda fmt: fmt.name)
def test_rounding_agrees_with_casts_from_any_float32(fmt):
    words = np.random.default_rng(1).integers(0, 2**32, 200_000, dtype=np.uint32)
    x = words.view(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = x.astype(DTYPES[fmt]).astype(np.float64)
        np.testing.assert_array_equal(formats.round_to(fmt, x), expected)


def test_rounding_agrees_with_the_float32_cast_from_any_float64():
    words = np.random.default_rng(2).integers(0, 2**63, 200_000, dtype=np.uint64)
    around_subnormals = np.random.default_rng(3).uniform(-1e-37, 1e-37, 10_000)
    x = np.concatenate([words.view(np.float64), around_subnormals])
    with np.errstate(over="ignore", invalid="ignore"):
        expected = x.astype(np.float32).astype(np.float64)
    np.testing.assert_array_equal(formats.round_to(FP32, x), expected)


@given(formats_strategy, st.lists(st.floats(), min_size=1, max_size=8))
def test_fast_and_scalar_rounding_agree(fmt, values):
    both(fmt, np.array(values))


@given(formats_strategy, st.floats(-4, 4), st.integers(-160, 140))
def test_fast_and_scalar_rounding_agree_across_the_exponents(fmt, significand, scale):
    both(fmt, np.array([math.ldexp(significand, scale)]))


@given(formats_strategy, st.fractions(-(2**20), 2**20))
def test_scalar_rounding_of_a_rational_number_is_nearest(fmt, x):
    rounded = round_scalar(fmt, x)
    if math.isfinite(rounded) and abs(x) <= fmt.max:
        assert abs(Fraction(rounded) - x) <= Fraction(float(formats.ulp(fmt, rounded))) / 2
        assert float(formats.round_to(fmt, rounded)) == rounded


def test_special_values():
    x = np.array([0.0, -0.0, np.inf, -np.inf, np.nan])
    for fmt in (FP16, BF16, FP32, FP8_E5M2):
        np.testing.assert_array_equal(both(fmt, x), x)
        overflow = 2 * fmt.max
        np.testing.assert_array_equal(both(fmt, [overflow, -overflow]), [np.inf, -np.inf])
    largest = FP8_E4M3.max
    np.testing.assert_array_equal(both(FP8_E4M3, x), [0.0, -0.0, largest, -largest, np.nan])
    np.testing.assert_array_equal(both(FP8_E4M3, [1e9, -464.0]), [largest, -largest])


@pytest.mark.parametrize("fmt", [FP16, BF16, FP32, FP8_E5M2], ids=lambda fmt: fmt.name)
def test_overflow_begins_half_an_ulp_above_the_largest_number(fmt):
    threshold = fmt.max + float(formats.ulp(fmt, fmt.max)) / 2
    assert both(fmt, np.nextafter(threshold, 0)) == fmt.max
    assert both(fmt, threshold) == np.inf


# --- exponent and ulp -------------------------------------------------------------------------


@given(st.floats(allow_nan=False, allow_infinity=False).filter(bool))
def test_exponent_is_the_floor_of_log2(x):
    e = int(formats.exponent(x))
    assert Fraction(2) ** e <= abs(Fraction(x)) < Fraction(2) ** (e + 1)


def test_exponents_of_zero_and_of_nonfinite_numbers_order_correctly():
    x = np.array([0.0, 5e-324, 1.7e308, np.inf, np.nan])
    assert formats.exponent(x).tolist() == [-1075, -1074, 1023, 1024, 1024]


@pytest.mark.parametrize("fmt", [FP16, FP32], ids=lambda fmt: fmt.name)
def test_ulp_agrees_with_spacing(fmt):
    x = np.random.default_rng(4).integers(0, fmt.code_of_max, 10_000).astype(f"uint{fmt.bits}")
    x = x.view(DTYPES[fmt])
    np.testing.assert_array_equal(formats.ulp(fmt, x), np.spacing(x).astype(np.float64))
    np.testing.assert_array_equal(formats.ulp(fmt, -x), formats.ulp(fmt, x))
    assert np.isnan(formats.ulp(fmt, [np.inf, np.nan])).all()


# --- bfloat16 bit patterns --------------------------------------------------------------------


def test_bf16_bits_and_float32_are_inverse():
    codes = np.arange(2**16, dtype=np.uint16)
    values = formats.bf16_to_float32(codes)
    expected = codes.view(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(values, expected)
    not_nan = ~np.isnan(values)
    np.testing.assert_array_equal(formats.float32_to_bf16_bits(values)[not_nan], codes[not_nan])


def test_float32_to_bf16_bits_agrees_with_ml_dtypes():
    words = np.random.default_rng(5).integers(0, 2**32, 200_000, dtype=np.uint32)
    specials = np.array([0, 1 << 31, 0x7F800000, 0x7F800001, 0xFFFFFFFF, 0x7F7FFFFF], np.uint32)
    x = np.concatenate([words, specials]).view(np.float32)
    with np.errstate(invalid="ignore"):
        expected = x.astype(ml_dtypes.bfloat16)
    bits = formats.float32_to_bf16_bits(x)
    is_nan = np.isnan(x)
    np.testing.assert_array_equal(bits[~is_nan], expected.view(np.uint16)[~is_nan])
    assert np.isnan(formats.bf16_to_float32(bits[is_nan])).all()


@given(st.floats(0, BF16.max))
def test_round_up_is_the_smallest_bf16_not_below(x):
    code = int(formats.bf16_bits_round_up(x))
    assert float(formats.bf16_to_float32(code)) >= x
    assert code == 0 or float(formats.bf16_to_float32(code - 1)) < x


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_round_up_around_every_bf16(dtype):
    codes = np.arange(1, BF16.code_of_max, dtype=np.uint16)
    values = formats.bf16_to_float32(codes).astype(dtype)
    below, above = np.nextafter(values, dtype(0)), np.nextafter(values, dtype(np.inf))
    np.testing.assert_array_equal(formats.bf16_bits_round_up(values), codes)
    np.testing.assert_array_equal(formats.bf16_bits_round_up(below), codes)
    np.testing.assert_array_equal(formats.bf16_bits_round_up(above), codes + 1)


def test_round_up_at_the_ends_of_the_range():
    assert formats.bf16_bits_round_up([0.0, -0.0]).tolist() == [0, 0]
    assert formats.bf16_bits_round_up([5e-324, 1e-45]).tolist() == [1, 1]
    assert formats.bf16_bits_round_up(np.float32(1e-45)) == 1
    assert formats.bf16_bits_round_up(BF16.max) == BF16.code_of_max


@pytest.mark.parametrize("x", [-1e-300, np.nan, np.inf, np.nextafter(BF16.max, np.inf)])
def test_round_up_refuses_what_no_bf16_can_hold(x):
    with pytest.raises(ValueError, match="1 of 3 elements"):
        formats.bf16_bits_round_up([1.0, x, 2.0])
