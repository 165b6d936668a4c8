"""Rows in and rows out, against the reference; on a GPU, and without one on host threads."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from alignedkv.errors import LaunchError
from alignedkv.formats import bf16_to_float32, float32_to_bf16_bits
from alignedkv.kernels import launch, reference
from alignedkv.kernels.arrays import CacheArrays
from alignedkv.kernels.spec import DecodeSpec
from alignedkv.kernels.storage import LOST_SCALE, allocate, allocate_numpy
from alignedkv.planes import PlaneLayout
from alignedkv.transform import hadamard_block
from emulator.machines import Machine

SPECS = (
    DecodeSpec(head_dim=64, group=1),
    DecodeSpec(
        head_dim=80, group=3, layout=PlaneLayout.parse("4|2|2|8"), row_dtype="float16",
        page_tokens=16, exact_rows=True,
    ),
    DecodeSpec(
        head_dim=96, group=2, layout=PlaneLayout.parse("4|4|8"), stored_planes=3,
        row_dtype="float32", exact_rows=True,
    ),
    DecodeSpec(head_dim=128, group=4, stored_planes=3, page_tokens=32, dither_rows=256),
    DecodeSpec(
        head_dim=192, group=1, layout=PlaneLayout.parse("4|2|2|8"), stored_planes=3,
        row_dtype="float32",
    ),
    DecodeSpec(
        head_dim=256, group=16, layout=PlaneLayout.parse("4|4|8"), stored_planes=2,
        row_dtype="float16", page_tokens=256,
    ),
)  # fmt: skip
BATCH, KV_HEADS, CAPACITY, ROWS = 2, 2, 300, 19
STARTS = (0, 2)
U = 2.0**-24


def specs(*chosen: DecodeSpec) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("spec", chosen or SPECS, ids=lambda s: f"D{s.head_dim}")


def caches(spec: DecodeSpec, machine: Machine) -> tuple[CacheArrays, CacheArrays]:
    """The same empty cache twice: for the reference, and for the machine."""
    sizes = {"batch": BATCH, "kv_heads": KV_HEADS, "capacity": CAPACITY}
    if spec.exact_rows:
        sizes |= {"exact_first": 3, "exact_last": 4}
    expected = allocate_numpy(spec, **sizes)
    expected.starts[:] = STARTS
    given = allocate(spec, zeros=machine.zeros, put=machine.put, **sizes)
    return expected, replaced(given, machine, starts=np.array(STARTS, np.int32))


def replaced(cache: CacheArrays, machine: Machine, **arrays: NDArray[Any]) -> CacheArrays:
    known = {f.name: getattr(cache, f.name) for f in fields(cache)}
    return CacheArrays(**{**known, **{name: machine.put(a) for name, a in arrays.items()}})


def rows_of(spec: DecodeSpec, seed: int = 0) -> tuple[NDArray[Any], NDArray[Any]]:
    """Keys and values [B, Hkv, S, D] in row_dtype, some of them extreme."""
    rng = np.random.default_rng(seed)
    shape = (BATCH, KV_HEADS, ROWS, spec.head_dim)
    keys = (rng.standard_normal(shape) * np.exp(rng.standard_normal(spec.head_dim)) + 1.5).astype(
        np.float32
    )
    values = rng.standard_normal(shape).astype(np.float32)
    keys[0, 0, 3] = 0
    keys[0, 1, 4] = 7
    keys[1, 0, 5] = keys[1, 0, 6]
    values[1, 0, 5, 3] = 1e4
    values[0, 1, 8] = 0
    tiny = {"float16": 2.0**-24, "bfloat16": 2.0**-130, "float32": 2.0**-140}[spec.row_dtype]
    keys[1, 1, 7] = tiny * rng.integers(-3, 4, spec.head_dim)
    values[1, 1, 7] = tiny * rng.integers(-3, 4, spec.head_dim)
    return to_dtype(keys, spec.row_dtype), to_dtype(values, spec.row_dtype)


def to_dtype(x: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    return float32_to_bf16_bits(x) if dtype == "bfloat16" else x.astype(dtype)


def to_float(x: NDArray[Any], dtype: str) -> NDArray[np.float64]:
    return (bf16_to_float32(x) if dtype == "bfloat16" else x).astype(np.float64)


def fit_and_encode(
    spec: DecodeSpec,
    machine: Machine,
    keys: NDArray[Any],
    values: NDArray[Any],
    pieces: tuple[int, ...] = (ROWS,),
) -> tuple[CacheArrays, CacheArrays]:
    """Both caches with the rows in them, encoded in pieces of so many rows."""
    expected, given = caches(spec, machine)
    size = np.random.default_rng(1).random((BATCH, KV_HEADS, spec.head_dim)).astype(np.float32)
    reference.fit_transforms(spec, expected, keys, values, size)
    arrays = {
        name: np.array(getattr(expected, name)) for name in ("key_mean", "balance", "value_mean")
    }
    given = replaced(given, machine, **arrays)
    first = 0
    for count in pieces:
        piece = slice(first, first + count)
        first += count
        k, v = np.ascontiguousarray(keys[:, :, piece]), np.ascontiguousarray(values[:, :, piece])
        reference.encode(spec, expected, k, v)
        launch.encode(spec, given, machine.put(k, spec.row_dtype), machine.put(v, spec.row_dtype))
    return expected, given


def assert_same(machine: Machine, expected: CacheArrays, given: CacheArrays) -> None:
    """Every array of the caches is the same, bit for bit."""
    for field in fields(CacheArrays):
        wanted, found = getattr(expected, field.name), getattr(given, field.name)
        if isinstance(wanted, np.ndarray):
            wanted, found = (wanted,), (found,)
        if isinstance(wanted, tuple):
            for plane, (a, b) in enumerate(zip(wanted, found, strict=True)):
                np.testing.assert_array_equal(machine.get(b), a, f"{field.name} {plane}")


@specs()
def test_encode_is_the_references_bit_for_bit(spec: DecodeSpec, machine: Machine) -> None:
    keys, values = rows_of(spec)
    assert_same(machine, *fit_and_encode(spec, machine, keys, values, (ROWS - 4, 1, 3)))


@specs(SPECS[0], SPECS[2])
def test_rows_may_be_strided(spec: DecodeSpec, machine: Machine) -> None:
    """Keys as a model has them, [B, S, Hkv, D] transposed."""
    keys, values = rows_of(spec)
    expected, given = caches(spec, machine)
    reference.encode(spec, expected, keys, values)
    views = [
        machine.transposed(
            machine.put(np.ascontiguousarray(x.transpose(0, 2, 1, 3)), spec.row_dtype), 0, 2, 1, 3
        )
        for x in (keys, values)
    ]
    launch.encode(spec, given, *views)
    assert_same(machine, expected, given)


@specs(SPECS[0], SPECS[1])
def test_only_the_new_rows_are_written(spec: DecodeSpec, machine: Machine) -> None:
    """In planes full of a pattern, all bytes but those of the new tokens keep it."""
    keys, values = rows_of(spec)
    expected, given = caches(spec, machine)
    pattern = 0xA5
    poisoned = tuple(
        machine.put(np.full(plane.shape, pattern, np.uint8)) for plane in expected.key_planes
    )
    given = CacheArrays(
        **{**{f.name: getattr(given, f.name) for f in fields(given)}, "key_planes": poisoned}
    )
    reference.encode(spec, expected, keys, values)
    launch.encode(
        spec, given, machine.put(keys, spec.row_dtype), machine.put(values, spec.row_dtype)
    )
    written = np.zeros(expected.scales.shape, bool)
    if spec.page_tokens is None:
        written[:, :, :ROWS] = True
    else:
        for page in expected.block_table[:, : -(-ROWS // spec.page_tokens)]:
            written[page] = True
        last = expected.block_table[:, ROWS // spec.page_tokens]
        written[last, :, ROWS % spec.page_tokens :] = False
    for wanted, found in zip(expected.key_planes, poisoned, strict=True):
        np.testing.assert_array_equal(machine.get(found)[written], wanted[written])
        assert (machine.get(found)[~written] == pattern).all()


@specs(SPECS[0], SPECS[2])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_is_flagged(
    spec: DecodeSpec, machine: Machine, bad: float
) -> None:
    keys, values = (to_float(x, spec.row_dtype).astype(np.float32) for x in rows_of(spec))
    keys[0, 1, 6, 5] = bad
    values[1, 0, 9, 0] = bad
    _, given = caches(spec, machine)
    arrays = [machine.put(to_dtype(x, spec.row_dtype), spec.row_dtype) for x in (keys, values)]
    launch.encode(spec, given, *arrays)
    scales = machine.get(given.scales)[:, :, :ROWS]
    lost_keys, lost_values = scales & 0xFFFF == LOST_SCALE, scales >> 16 == LOST_SCALE
    assert np.argwhere(lost_keys).tolist() == [[0, 1, 6]]
    assert np.argwhere(lost_values).tolist() == [[1, 0, 9]]


@specs()
def test_fit_is_the_references(spec: DecodeSpec, machine: Machine) -> None:
    """Means to a rounding of float32; balances equal, no exponent being near a tie here."""
    keys, values = rows_of(spec)
    expected, given = caches(spec, machine)
    size = np.random.default_rng(2).random((BATCH, KV_HEADS, spec.head_dim)) + 0.1
    size = size.astype(np.float32)
    arrays = (machine.put(keys, spec.row_dtype), machine.put(values, spec.row_dtype))
    reference.fit_transforms(spec, expected, keys, values)
    launch.fit_transforms(spec, given, *arrays)
    np.testing.assert_array_equal(machine.get(given.balance), expected.balance)
    reference.fit_transforms(spec, expected, keys, values, size)
    launch.fit_transforms(spec, given, *arrays, machine.put(size))
    np.testing.assert_allclose(machine.get(given.key_mean), expected.key_mean, rtol=2 * U)
    np.testing.assert_allclose(machine.get(given.value_mean), expected.value_mean, rtol=2 * U)
    np.testing.assert_array_equal(machine.get(given.balance), expected.balance)


def test_numbers_that_are_not_finite_stay_out_of_a_fit(machine: Machine) -> None:
    spec = SPECS[2]
    keys, values = rows_of(spec)
    keys[0, 0, 10] = np.nan
    values[0, 0, 10] = np.inf
    _, given = caches(spec, machine)
    kept = [i for i in range(ROWS) if i != 10]
    launch.fit_transforms(spec, given, machine.put(keys), machine.put(values))
    for found, rows in ((given.key_mean, keys), (given.value_mean, values)):
        mean = rows[0, 0, kept].astype(np.float64).mean(axis=0)
        np.testing.assert_allclose(machine.get(found)[0, 0], mean, rtol=2 * U)


@specs()
def test_dequantise_is_the_references(spec: DecodeSpec, machine: Machine) -> None:
    keys, values = rows_of(spec)
    expected, given = fit_and_encode(spec, machine, keys, values)
    tokens = ROWS + 3
    wanted = reference.dequantise(spec, expected, tokens=tokens)
    found = launch.dequantise(spec, given, tokens=tokens)
    block = hadamard_block(spec.channels)
    scales = expected.scales
    largest_key = 8.5 * bf16_to_float32(scales & 0xFFFF).max()
    largest_value = 8.5 * bf16_to_float32(scales >> 16).max()
    # float32: a rounding for each stage of the butterfly, for the number itself and for the sum.
    stages = np.log2(block) + 3
    allowed = U * (
        stages * block * largest_key * expected.balance.max() + 2 * np.abs(wanted[0]).max()
    )
    assert np.abs(machine.get(found[0]) - wanted[0]).max() <= allowed
    allowed = U * (3 * largest_value + 2 * np.abs(wanted[1]).max())
    assert np.abs(machine.get(found[1]) - wanted[1]).max() <= allowed
    for rows in found:
        assert (machine.get(rows)[:, :, ROWS:] == 0).all()
        assert (machine.get(rows)[1, :, : STARTS[1]] == 0).all()


def test_dequantise_writes_where_it_is_told(machine: Machine) -> None:
    spec = SPECS[0]
    keys, values = rows_of(spec)
    _, given = fit_and_encode(spec, machine, keys, values)
    shape = (BATCH, KV_HEADS, 5, spec.head_dim)
    out = machine.zeros(shape, "float32"), machine.zeros(shape, "float32")
    assert launch.dequantise(spec, given, tokens=5, out=out) is out
    found = launch.dequantise(spec, given, tokens=5)
    np.testing.assert_array_equal(machine.get(out[0]), machine.get(found[0]))
    with pytest.raises(LaunchError, match=r"keys has shape \(2, 2, 5, 64\): give \(2, 2, 6, 64\)"):
        launch.dequantise(spec, given, tokens=6, out=out)


def test_a_full_cache_is_an_error(machine: Machine) -> None:
    spec = SPECS[0]
    _, given = caches(spec, machine)
    given = replaced(given, machine, lengths=np.full(BATCH, CAPACITY - 1, np.int32))
    before = machine.get(given.scales).copy()
    two = machine.zeros((BATCH, KV_HEADS, 2, spec.head_dim), "bfloat16")
    with pytest.raises(LaunchError, match="2 more tokens make 301, but the cache has room for 300"):
        launch.encode(spec, given, two, two)
    np.testing.assert_array_equal(machine.get(given.scales), before)
    assert machine.get(given.lengths).tolist() == [CAPACITY - 1] * BATCH


def test_no_rows_are_no_work(machine: Machine) -> None:
    spec = SPECS[0]
    _, given = caches(spec, machine)
    none = machine.zeros((BATCH, KV_HEADS, 0, spec.head_dim), "bfloat16")
    launch.encode(spec, given, none, none)
    assert machine.get(given.lengths).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((BATCH, KV_HEADS, 4, 63), "bfloat16", "keys has shape"),
        ((BATCH, KV_HEADS + 1, 4, 64), "bfloat16", "keys has shape"),
        ((BATCH, KV_HEADS, 4, 64), "float32", "keys is float32: give bfloat16 or uint16"),
        ((KV_HEADS, 4, 64), "bfloat16", r"give \[B, Hkv, S, D\]"),
    ],
)
def test_wrong_rows_are_named(
    machine: Machine, shape: tuple[int, ...], dtype: str, message: str
) -> None:
    spec = SPECS[0]
    _, given = caches(spec, machine)
    rows = machine.zeros(shape, dtype)
    with pytest.raises(LaunchError, match=message):
        launch.encode(spec, given, rows, rows)
