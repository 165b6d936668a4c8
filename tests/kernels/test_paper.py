"""The paper's kernel against the same rule in NumPy; on a GPU, and without one on host threads."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from alignedkv.errors import LaunchError
from alignedkv.float_planes import encode_floats
from alignedkv.kernels.paper import (
    HEAD_DIM,
    PUBLISHED,
    READ_ALL,
    TILE,
    PaperCache,
    PaperRule,
    bits_per_element,
    decode,
    store,
)
from emulator.machines import Machine

BATCH, KV_HEADS, GROUP, TOKENS = 2, 2, 3, 3 * TILE
LENGTHS = np.array([300, TOKENS], np.int32)
SCALING = HEAD_DIM**-0.5
Rows = NDArray[np.float64]


@pytest.fixture
def rows() -> dict[str, NDArray[np.float16]]:
    """Keys with channels of very different size; values; queries."""
    rng = np.random.default_rng(0)
    keys = rng.standard_normal((BATCH, KV_HEADS, TOKENS, HEAD_DIM))
    keys[..., :8] *= 8
    keys[..., 9] *= 0.01
    keys[..., 10] -= 20
    keys[..., 11] = 0
    return {
        "keys": keys.astype(np.float16),
        "values": rng.standard_normal(keys.shape).astype(np.float16),
        "query": rng.standard_normal((BATCH, KV_HEADS * GROUP, HEAD_DIM)).astype(np.float16),
    }


def attention(query: Rows, keys: Rows, values: Rows) -> tuple[Rows, Rows]:
    """Weights [T] and output [D] of one head."""
    scores = SCALING * keys @ query
    weights = np.exp(scores - scores.max())
    weights /= weights.sum()
    return weights, weights @ values


def heads() -> list[tuple[int, int, int]]:
    return [(b, h, h // GROUP) for b in range(BATCH) for h in range(KV_HEADS * GROUP)]


def exact_outputs(rows: dict[str, NDArray[np.float16]]) -> Rows:
    query, keys, values = (rows[name].astype(np.float64) for name in ("query", "keys", "values"))
    out = np.zeros(query.shape)
    for b, h, kv in heads():
        seen = slice(LENGTHS[b])
        out[b, h] = attention(query[b, h], keys[b, kv, seen], values[b, kv, seen])[1]
    return out


def exponent(x: Rows) -> Rows:
    """Of fp16 numbers, subnormals as 2^-15."""
    return np.maximum(np.floor(np.log2(np.maximum(np.abs(x), 2.0**-30))), -15)


def planes_of(gap: Rows, gaps: tuple[int, int]) -> NDArray[np.int64]:
    return np.where(gap >= gaps[1], 1, np.where(gap >= gaps[0], 2, 3))


def read(rows: Rows, planes: NDArray[np.int64]) -> Rows:
    """Rows, each number to as many planes as ``planes`` (broadcast) says."""
    encoded, counts = encode_floats(rows), (1, 2, 3)
    return np.select([planes == n for n in counts], [encoded.prefix(n) for n in counts])


def ruled_outputs(
    rows: dict[str, NDArray[np.float16]], expected: Rows, rule: PaperRule
) -> tuple[Rows, NDArray[np.int64]]:
    """Outputs and reads [B, Hkv, 2, 3] by the rule, group by group."""
    query, keys, values = (rows[name].astype(np.float64) for name in ("query", "keys", "values"))
    out = np.zeros(query.shape)
    reads = np.zeros((BATCH, KV_HEADS, 2, 3), np.int64)
    for b in range(BATCH):
        for kv in range(KV_HEADS):
            group, length = range(kv * GROUP, (kv + 1) * GROUP), LENGTHS[b]
            key_size = exponent(np.abs(keys[b, kv]).max(axis=0))
            value_size = exponent(np.abs(values[b, kv]).max(axis=0))
            sums = exponent(query[b, group.start : group.stop]) + key_size
            gaps = sums.max(axis=1, keepdims=True) - sums
            of_channel = planes_of(gaps, rule.key_gaps).max(axis=0)
            ruled = read(keys[b, kv, :length], of_channel)
            weights = [attention(query[b, h], ruled, values[b, kv, :length])[0] for h in group]
            of_token = np.ones(length, np.int64)
            for weight, h in zip(weights, group, strict=True):
                threshold = (exponent(expected[b, h]) - 1 - value_size).min()
                fraction, power = np.frexp(weight)
                gap = threshold - ((power - 1) + (2 * fraction - 1))
                of_token = np.maximum(of_token, planes_of(gap, rule.value_gaps))
            ruled = read(values[b, kv, :length], of_token[:, None])
            for weight, h in zip(weights, group, strict=True):
                out[b, h] = weight @ ruled
            for side, planes in enumerate((of_channel, of_token)):
                reads[b, kv, side] = [(planes >= n).sum() for n in (1, 2, 3)]
    return out, reads


def stored(machine: Machine, rows: dict[str, NDArray[np.float16]]) -> PaperCache:
    keys, values = machine.put(rows["keys"]), machine.put(rows["values"])
    return store(keys, values, machine.put(LENGTHS), group=GROUP)


def test_reading_all_planes_is_exact_attention(
    machine: Machine, rows: dict[str, NDArray[np.float16]]
) -> None:
    """Up to float32: weights err by the rounding of scores up to 50, sums by a few units."""
    exact = exact_outputs(rows)
    cache = stored(machine, rows)
    expected = machine.put(exact.astype(np.float32))
    output = decode(cache, machine.put(rows["query"]), expected, scaling=SCALING, rule=READ_ALL)
    assert np.abs(machine.get(output) - exact).max() <= 2.0**-24 * 50 * 8 * np.abs(exact).max()
    reads = machine.get(cache.arrays["reads"])
    assert bits_per_element(reads, LENGTHS) == 16
    assert (reads[:, :, 0] == HEAD_DIM).all()
    assert (reads[:, :, 1] == LENGTHS[:, None, None]).all()


@pytest.mark.parametrize(
    "rule", [PaperRule(), PUBLISHED, PaperRule(key_gaps=(1, 2), value_gaps=(0, 1))]
)
def test_the_rule_is_numpys(
    machine: Machine, rows: dict[str, NDArray[np.float16]], rule: PaperRule
) -> None:
    exact = exact_outputs(rows)
    wanted, wanted_reads = ruled_outputs(rows, exact, rule)
    cache = stored(machine, rows)
    expected = machine.put(exact.astype(np.float32))
    output = decode(cache, machine.put(rows["query"]), expected, scaling=SCALING, rule=rule)
    reads = machine.get(cache.arrays["reads"]).astype(np.int64)
    np.testing.assert_array_equal(reads[:, :, 0], wanted_reads[:, :, 0])
    assert np.abs(reads - wanted_reads).max() <= 1  # a weight within float32 of a gap
    assert np.abs(machine.get(output) - wanted).max() <= 2.0**-14 * np.abs(exact).max()
    assert bits_per_element(reads, LENGTHS) < 16


def test_wrong_inputs_are_named(machine: Machine) -> None:
    lengths = machine.zeros((1,), "int32")
    odd = machine.zeros((1, 1, 100, HEAD_DIM), "float16")
    with pytest.raises(LaunchError, match="T a multiple of 128"):
        store(odd, odd, lengths, group=1)
    wide = machine.zeros((1, 1, TILE, HEAD_DIM), "float32")
    with pytest.raises(LaunchError, match="keys is float32: give float16"):
        store(wide, wide, lengths, group=1)
