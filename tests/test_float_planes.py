from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import oracles_float_planes as oracles
from alignedkv.errors import SpecError
from alignedkv.float_planes import PAPER_LAYOUT, FloatPlanes, encode_floats
from alignedkv.formats import BF16, FP16, FP32, FloatFormat
from alignedkv.planes import PlaneLayout

LAYOUTS = [PlaneLayout.parse(text) for text in ("8|4|4", "8|8", "6|2|4|4", "9|3|4", "12|4")]


def finite_codes(number_format: FloatFormat) -> st.SearchStrategy[int]:
    """Bit patterns of all finite numbers, the edges of the range among the likely ones."""
    largest = number_format.code_of_max
    edges = [0, 1, number_format.code_of_smallest_normal, largest]
    magnitude = st.sampled_from(edges) | st.integers(0, largest)
    return st.builds(lambda m, sign: m | sign << 15, magnitude, st.integers(0, 1))


def one(code: int, number_format: FloatFormat, layout: PlaneLayout) -> FloatPlanes:
    return FloatPlanes(
        words=np.array([code], np.uint16), number_format=number_format, layout=layout
    )


@pytest.mark.parametrize("number_format", [FP16, BF16], ids=lambda f: f.name)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@given(data=st.data())
def test_prefix_and_error_agree_with_the_scalar_twin(data, layout, number_format):
    code = data.draw(finite_codes(number_format))
    planes = data.draw(st.integers(1, len(layout)))
    rows = one(code, number_format, layout)
    bits = layout.bits(planes)
    middle = oracles.prefix_value(code, bits, number_format)
    assert Fraction(rows.prefix(planes)[0]) == middle
    worst = max(abs(x - middle) for x in oracles.numbers_with_prefix(code, bits, number_format))
    assert Fraction(rows.half_step(planes)[0]) == worst


@pytest.mark.parametrize("planes", [1, 2])
def test_error_of_normal_numbers_is_the_closed_form(planes):
    x = np.float16([1.0, -1.999, 3.14, 6e4, 2.0**-14, 2.0**-24])
    rows = encode_floats(x)
    exponent = np.maximum(np.floor(np.log2(np.abs(x.astype(np.float64)))), FP16.min_exponent)
    fraction_bits = PAPER_LAYOUT.bits(planes) - 6
    assert (rows.half_step(planes) == 2.0 ** (exponent - fraction_bits - 1)).all()


def test_all_planes_are_exact_and_none_are_zero():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 5, 8)).astype(np.float16)
    rows = encode_floats(x)
    assert (rows.prefix(3) == x).all()
    assert not rows.half_step(3).any()
    assert not rows.prefix(0).any()


def test_eight_bits_of_bfloat16_lose_a_binade():
    """The paper's layout does not transfer: its first plane lacks an exponent bit."""
    x = np.float32([2.0])
    assert encode_floats(x, BF16).half_step(1)[0] > 2.0 * 0.99
    assert encode_floats(x, FP16).half_step(1)[0] == 2.0 * 2.0**-3


def test_bfloat16_rounds_to_nearest_and_keeps_its_range():
    rows = encode_floats(np.float32([1 + 2.0**-9, -3e38]), BF16)
    assert rows.prefix(3)[0] == 1.0
    assert rows.prefix(3)[1] == pytest.approx(-3e38, rel=BF16.unit_roundoff)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 7e4])
def test_numbers_that_are_not_finite_halves_are_refused(bad):
    with pytest.raises(SpecError, match="no finite float16"):
        encode_floats(np.array([1.0, bad]))


def test_other_formats_are_refused():
    with pytest.raises(SpecError, match="float16 or bfloat16"):
        encode_floats([1.0], FP32)
