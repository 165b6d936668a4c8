"""Digit planes against rational arithmetic, and Lemmas 1 and 2 of theory.md."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import oracles
from alignedkv.errors import SpecError
from alignedkv.planes import (
    CHANNEL_MULTIPLE,
    PlaneLayout,
    dither_class,
    dither_table,
    encode_rows,
    pack_plane,
    padded_channels,
    random_streams,
    row_bytes,
    unpack_plane,
)
from strategies import LAYOUTS, layouts, rows

CHANNELS = 16


def dither_for(count: int, layout: PlaneLayout, seed: int) -> np.ndarray:
    return dither_table(max(4, 1 << (count - 1).bit_length()), CHANNELS, seed=seed, layout=layout)[
        :count
    ]


@settings(max_examples=60)
@given(rows(CHANNELS), layouts(), st.integers(0, 2**32 - 1))
def test_encoding_is_its_rational_twin(x: np.ndarray, layout: PlaneLayout, seed: int) -> None:
    dither = dither_for(len(x), layout, seed)
    stored = encode_rows(x, dither, layout)
    for t, row in enumerate(x):
        scale = oracles.scale_of(row, layout.widths[0])
        words = oracles.words_of(row, dither[t], layout.widths)
        assert Fraction(float(stored.scale[t])) == scale
        assert stored.words[t].tolist() == words
        for n in range(len(layout) + 1):
            prefix = oracles.prefix_of(words, dither[t], scale, layout.widths, n)
            assert [Fraction(float(v)) for v in stored.prefix(n)[t]] == prefix


@settings(max_examples=100)
@given(rows(CHANNELS), layouts(), st.integers(0, 2**32 - 1))
def test_no_prefix_errs_by_more_than_half_a_step(
    x: np.ndarray, layout: PlaneLayout, seed: int
) -> None:
    """Lemma 1, with the 2^-8 of a unit that two float32 roundings may add."""
    stored = encode_rows(x, dither_for(len(x), layout, seed), layout)
    for n in range(len(layout) + 1):
        allowed = stored.half_step(n) + 2.0**-8 * stored.unit
        assert (np.abs(stored.prefix(n) - x) <= allowed[:, None]).all()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_errors_are_uniform_and_reach_half_a_step(layout: PlaneLayout) -> None:
    """Lemma 2: over the dither, mean below 2^-5 of a unit and variance delta^2 / 3."""
    draws = 1 << 14
    x = np.tile(np.float32([0.3, -1.7, 2.0, 0.0]), (draws, 4))
    dither = np.random.default_rng(1).integers(-(2**15), 2**15, x.shape, dtype=np.int32)
    stored = encode_rows(x, dither, layout)
    for n in range(1, len(layout) + 1):
        half = stored.half_step(n)[0]
        error = (stored.prefix(n) - x) / half
        assert 0.999 < np.abs(error).max() <= 1.0 + 2.0**-7
        # The mean of 16 channels x 2^14 draws has a standard error of 3^-1/2 / 512.
        assert np.abs(error.mean()) < 5 / (np.sqrt(3) * 512) + 2.0**-5 * stored.unit[0] / half
        assert error.var() == pytest.approx(1 / 3, rel=0.02)


def test_a_row_of_the_smallest_scale_still_has_an_absolute_bound() -> None:
    x = np.full((1, CHANNELS), 2.0**-120, np.float32)
    stored = encode_rows(x, np.zeros((1, CHANNELS), np.int32), LAYOUTS[0])
    assert stored.scale[0] == 2.0**-100
    assert (np.abs(stored.prefix(4) - x) <= stored.half_step(4)[:, None]).all()


@given(layouts(), st.integers(0, 2**32 - 1))
def test_packing_is_its_scalar_twin_and_is_undone(layout: PlaneLayout, seed: int) -> None:
    words = np.random.default_rng(seed).integers(0, 2**16, (2, 32), dtype=np.uint16)
    together = np.zeros_like(words)
    for plane, width in enumerate(layout.widths):
        packed = pack_plane(words, layout, plane)
        assert packed.shape == (2, row_bytes(32, width))
        for t in range(2):
            assert packed[t].tolist() == oracles.packed_of(words[t], layout.widths, plane)
        together |= unpack_plane(packed, layout, plane)
    assert (together == words).all()


@given(st.sampled_from([32, 64, 128, 256]), st.integers(0, 2**20))
def test_a_block_of_tokens_uses_each_dither_row_once(rows: int, block: int) -> None:
    classes = dither_class(np.arange(rows) + block * rows, rows)
    assert sorted(classes) == list(range(rows))


def test_blocks_are_not_all_in_the_same_order() -> None:
    first = {int(dither_class(block * 64, 64)) for block in range(64)}
    assert len(first) > 16


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_dither_is_reproducible_uniform_and_fits_int16(layout: PlaneLayout) -> None:
    table = dither_table(256, 64, seed=3, layout=layout)
    assert (table == dither_table(256, 64, seed=3, layout=layout)).all()
    assert (table != dither_table(256, 64, seed=4, layout=layout)).any()
    assert table.min() >= -(2**15)
    assert table.max() < 2**15
    # Standard error of the mean of 2^14 uniform numbers in [-2^15, 2^15).
    assert abs(table.mean()) < 5 * 2**15 / np.sqrt(3 * table.size)


@pytest.mark.parametrize(
    "widths", [(), (4, 4), (4, 4, 8, 1), (0, 16), (-4, 20)], ids=lambda w: "|".join(map(str, w))
)
def test_widths_that_are_no_layout_are_refused(widths: tuple[int, ...]) -> None:
    with pytest.raises(SpecError, match="sum to 16"):
        PlaneLayout(widths)


def test_layouts_read_and_write_their_notation() -> None:
    assert str(PlaneLayout.parse("4|2|2|8")) == "4|2|2|8"
    assert PlaneLayout.parse("4|2|2|8").gain(3) == 4
    with pytest.raises(SpecError, match="separated by"):
        PlaneLayout.parse("4,4,8")


def test_what_cannot_be_packed_or_drawn_is_refused() -> None:
    odd = PlaneLayout((3, 5, 8))
    with pytest.raises(SpecError, match="cannot be packed"):
        pack_plane(np.zeros((1, 32), np.uint16), odd, 0)
    with pytest.raises(SpecError, match="do not fill"):
        pack_plane(np.zeros((1, 3), np.uint16), LAYOUTS[0], 0)
    with pytest.raises(SpecError, match="power of two"):
        dither_table(48, 32, seed=0, layout=LAYOUTS[0])


def test_channels_are_padded_to_whole_products() -> None:
    assert [padded_channels(d) for d in (64, 80, 96, 128, 192, 256)] == [64, 96, 96, 128, 192, 256]
    assert padded_channels(1) == CHANNEL_MULTIPLE


def test_no_two_requests_share_a_random_stream():
    streams = [stream for seed in range(50) for stream in random_streams(seed)]
    assert len(set(streams)) == len(streams)
