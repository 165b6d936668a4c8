"""The Numba kernels against the reference: the same bits, planes and bounds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignedkv.kernels import arithmetic, cpu, reference, sampling
from alignedkv.kernels.arrays import HEAD_HINTS, HeadState
from alignedkv.kernels.cpu import maths, plan, step, sums
from alignedkv.kernels.cpu.compiled import _folder
from alignedkv.kernels.cpu.rows import class_of
from alignedkv.kernels.reference_bounds import curvature
from alignedkv.kernels.spec import DecodeSpec
from alignedkv.kernels.storage import allocate_numpy, to_float32
from alignedkv.planes import dither_class, encode_rows, pack_plane
from alignedkv.policy import LEAST_REST, planes_for
from feedback_checks import check_feedback
from problems import RECIPES, Problem, hinted, make, near_of, recipe
from strategies import ADVERSARIAL, LAYOUTS, rows


@pytest.mark.parametrize("name", RECIPES)
def test_a_step_is_the_references(name: str) -> None:
    p = make(RECIPES[name])
    state = reference.probe(
        p.spec, p.cache, p.query, p.arguments, start_theta=p.start_theta, sinks=p.sinks
    )
    arguments = replace(p.arguments, repairs=0)  # a bound at the tolerance is a tie as well
    wanted = reference.decode(p.spec, p.cache, p.query, state, arguments, sinks=p.sinks)
    found = cpu.decode(p.spec, p.cache, p.query, state, arguments, sinks=p.sinks)
    compare(p, state, found, wanted)


@pytest.mark.parametrize("bound", ["estimate", "deterministic", "statistical"])
@pytest.mark.parametrize("data", ADVERSARIAL)
def test_hard_data_make_no_difference(data: str, bound: str) -> None:
    p = make(recipe(data=data, policy={"bound": bound}, shape={"batch": 1, "tokens": 90}))
    state = reference.probe(p.spec, p.cache, p.query, p.arguments, start_theta=p.start_theta)
    arguments = replace(p.arguments, repairs=0)
    wanted = reference.decode(p.spec, p.cache, p.query, state, arguments)
    found = cpu.decode(p.spec, p.cache, p.query, state, arguments)
    compare(p, state, found, wanted)


def compare(p: Problem, state: HeadState, found: Any, wanted: Any) -> None:
    """Equal reads but for ties; for equal reads, bounds not below the reference's."""
    group = p.spec.group
    theirs, mine = wanted.reads.astype(int), found.reads.astype(int)
    same = np.repeat((theirs == mine).all(axis=(2, 3)), group, axis=1)
    # A comparison of logarithms with errors below 2^-12 is a tie in one of 2^9 plane decisions.
    ties = 1 + theirs.sum(axis=(2, 3)) // 512
    assert (np.abs(theirs - mine).sum(axis=(2, 3)) <= ties).all()
    assert same.mean() >= 0.5

    # float32 rounds the bounds; at most c_acc sum p 8.5 g and the e^a of Theorem 12 are added.
    theirs_bound = wanted.bound[same]
    assert (found.bound[same] >= theirs_bound * (1 - 2.0**-23)).all()
    model = arithmetic.cpu(p.spec.channels, tile=64)
    largest = np.abs(p.values).max() + np.abs(p.cache.value_mean).max()
    with np.errstate(over="ignore"):
        most = 1.25 * wanted.bound + model.accumulation * 8.5 / 7.4 * largest
    assert (found.bound[same] <= most[same]).all()

    dtype = p.spec.query_dtype
    mine, theirs = (to_float32(x.output, dtype).astype(np.float64) for x in (found, wanted))
    rounding = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}[dtype]
    error = np.abs(mine - theirs).max(axis=-1)[same]
    size = np.abs(theirs).max(axis=-1)[same]
    assert (error <= rounding * size + 0.05 * theirs_bound + 1e-44).all()
    compare_hints(p, found, wanted, same, size.max(initial=1))

    edge = same & (found.missed != wanted.missed)
    with np.errstate(invalid="ignore"):
        assert not (edge & (most <= p.arguments.tolerance * (wanted.size - most))).any()
    check_feedback(
        state,
        found.state,
        bound=wanted.bound,
        most=most,
        tau=p.arguments.tolerance * found.size,
        missed=found.missed,
        heads=same,
    )


def compare_hints(p: Problem, found: Any, wanted: Any, same: np.ndarray, size: float) -> None:
    """What the next step is told by heads for which the ``same`` rows were read."""
    mine, theirs = (
        {name: getattr(answer.state, name)[same] for name in HEAD_HINTS}
        for answer in (found, wanted)
    )
    for name in ("log_z", "spread"):
        np.testing.assert_allclose(mine[name], theirs[name], rtol=1e-4, atol=1e-5 * size)
    # A rest that is a small difference of log Z and the near rows' has the larger relative error;
    # it may be taken for rounding or not where it is about LEAST_REST.
    with np.errstate(all="ignore"):
        beyond = (wanted.state.log_z - near_of(p).log_sum)[same]
        error = 1e-5 * (1 + np.abs(theirs["log_z"])) / -np.expm1(-np.maximum(beyond, LEAST_REST))
        alike = np.abs(mine["rest"] - theirs["rest"]) <= error + 1e-4 * np.abs(theirs["rest"])
    assert (alike | (mine["rest"] == theirs["rest"]) | (np.abs(beyond - LEAST_REST) < 1e-4)).all()


@settings(max_examples=40)
@given(rows(64, count=2), rows(64, count=2), st.sampled_from(LAYOUTS), st.integers(0, 99))
def test_any_rows_are_encoded_to_the_references_bits(
    keys: np.ndarray, values: np.ndarray, layout: Any, seed: int
) -> None:
    spec = DecodeSpec(
        head_dim=64, group=1, row_dtype="float32", layout=layout, stored_planes=len(layout)
    )
    caches = []
    for implementation in (reference, cpu):
        cache = allocate_numpy(spec, batch=1, kv_heads=1, capacity=2, seed=seed)
        cache.starts[:] = 2  # rows that overflow when transformed are lost, not refused
        implementation.encode(spec, cache, keys[None, None], values[None, None])
        caches.append(cache)
    for name in ("key_planes", "value_planes"):
        for one, other in zip(*(getattr(cache, name) for cache in caches), strict=True):
            np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(caches[0].scales, caches[1].scales)


def test_every_number_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh arrays full of NaN change nothing."""
    for name in ("estimate", "empty", "sinks-alone", "d80-g1"):
        p = make(RECIPES[name])
        state = cpu.probe(
            p.spec, p.cache, p.query, p.arguments, start_theta=p.start_theta, sinks=p.sinks
        )
        clean = cpu.decode(p.spec, p.cache, p.query, state, p.arguments, sinks=p.sinks)
        with monkeypatch.context() as patch:
            patch.setattr(np, "empty", lambda shape, dtype=float: np.full(shape, np.nan, dtype))
            poisoned = cpu.decode(p.spec, p.cache, p.query, state, p.arguments, sinks=p.sinks)
        for field in ("output", "bound", "size", "missed", "reads"):
            np.testing.assert_array_equal(getattr(clean, field), getattr(poisoned, field))


def test_one_compilation_serves_every_specification() -> None:
    for name in ("4|2|2|8", "exact-rows", "sinks", "pages-of-16", "two-planes", "float16"):
        p = make(RECIPES[name])
        cpu.probe(p.spec, p.cache, p.query, p.arguments, start_theta=0.01, sinks=p.sinks)
    assert len(step.decode_step.signatures) == 1


def test_the_cache_folder_is_named_by_the_sources() -> None:
    assert _folder().parent.name == "numba"
    assert len(_folder().name) == 16


# The pieces that repeat a definition.


@pytest.mark.parametrize(
    ("function", "exact", "low", "high", "relative"),
    [
        (maths.exp, np.exp, -700.0, 700.0, 2.0**-36),
        (maths.expm1, np.expm1, 0.0, 600.0, 2.0**-22),
        (sums.curvature, curvature, 0.0, 600.0, 2.0**-20),
    ],
)
def test_approximations_are_as_good_as_they_say(
    function: Any, exact: Any, low: float, high: float, relative: float
) -> None:
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.uniform(low, high, 2000), 10 ** rng.uniform(-12, 2.5, 2000)])
    found = np.array([function(t) for t in x])
    assert (np.abs(found - exact(x)) <= relative * np.abs(exact(x))).all()


def test_logarithms_are_within_a_tie() -> None:
    x = 2.0 ** np.random.default_rng(0).uniform(-900, 900, 4000)
    assert np.abs([maths.log2(t) - np.log2(t) for t in x]).max() < 2.0**-12
    assert maths.log2(0.0) == -1023


def test_limits_of_the_exponential() -> None:
    assert maths.exp(0.0) == 1
    assert maths.exp(-709.0) == maths.exp(-np.inf) == 0
    assert maths.exp(710.0) == maths.exp(np.inf) == np.inf
    assert np.isnan(maths.exp(np.nan))


def test_hashes_and_classes_are_their_definitions() -> None:
    key = sampling.stream_key(5, 6, 7)
    tokens = np.array([0, 1, 1000, 2**20 - 1])
    assert [plan.draw(int(key), t) for t in tokens] == sampling.draws(key, tokens).tolist()
    assert step._stream_key(5, 6, 7) == int(key)
    for count in (32, 64, 256):
        assert [class_of(t, count) for t in tokens] == dither_class(tokens, count).tolist()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_digits_and_plane_counts_are_their_definitions(layout: Any) -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((4, 64)).astype(np.float32)
    dither = rng.integers(-(2**15), 2**15, x.shape).astype(np.int32)
    held = encode_rows(x, dither, layout)
    missing = 4 - len(layout)
    planes = tuple(pack_plane(held.words, layout, n) for n in range(len(layout)))
    planes += (np.zeros((1, 1), np.uint8),) * missing
    widths = layout.widths + (0,) * missing
    out = np.zeros((2, 64), np.float32)
    for n in range(1, len(layout) + 1):
        maths.prefix_digits(planes, widths, 2, n, out, 1)
        wanted = held.prefix(n)[2] / held.unit[2] + dither[2] / 16
        np.testing.assert_allclose(out[1], wanted, rtol=0, atol=1e-9)
    for excess in np.linspace(-3, 20, 93):
        for stored in range(2, len(layout) + 1):
            assert plan.planes_for(excess, widths, stored) == planes_for(excess, layout, stored)


def test_the_tile_of_the_arithmetic_model_is_the_kernels() -> None:
    """c_acc stands for at most TILE rows in a float32 sum."""
    tight = make(recipe(policy={"bound": "deterministic"}, shape={"batch": 1, "tokens": 600}))
    exact = tight.exact()
    state = hinted(tight, theta=0.0, log_z=exact.log_z)
    mine, its = (
        module.decode(tight.spec, tight.cache, tight.query, state, tight.arguments)
        for module in (cpu, reference)
    )
    sums_error = np.abs(mine.output.astype(np.float64) - its.output).max(axis=-1)
    model = arithmetic.cpu(tight.spec.channels, tile=64)
    added = mine.bound - its.bound
    assert (sums_error <= added + 2.0**-23 * np.abs(its.output).max()).all()
    assert model.accumulation < 2.0**-17
