"""The Numba CUDA kernels in Numba's simulator.

`test_numba_cuda` runs this file, in a process of its own.

By hand: ``NUMBA_ENABLE_CUDASIM=1 pytest tests/kernels/simulated_numba_cuda.py``.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from alignedkv.kernels.arrays import CacheArrays
from numba_cuda_checks import check_step, probed
from numba_cuda_simulation import SIMULATED, run, simulator, tiny  # noqa: F401 - a fixture
from problems import RECIPES, Recipe, make, recipe
from strategies import ADVERSARIAL, Shape

pytestmark = SIMULATED

#: What the shared recipes leave out once they are tiny.
MORE = {
    # The order of dither rows is a hash of the block of tokens, and the identity in the first.
    "later-classes": Recipe(
        shape=Shape(batch=1, kv_heads=1, group=1, tokens=90),
        policy={"dither_rows": 32, "bound": "statistical"},
        starts=(70,),
    ),
    "all-rows-exact-certain": recipe(policy={"exact_first": 200, "bound": "deterministic"}),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_step_is_the_reference_s(name: str) -> None:
    problem = make(tiny(RECIPES[name]))
    state = probed(problem)
    check_step(problem, state, run(problem, state, splits=1))


def test_later_blocks_of_dither_rows_are_those_of_the_reference() -> None:
    problem = make(MORE["later-classes"])
    state = probed(problem)
    check_step(problem, state, run(problem, state))


def test_rows_that_are_all_exact_have_no_error_but_of_sums() -> None:
    problem = make(tiny(MORE["all-rows-exact-certain"]))
    state = probed(problem)
    check_step(problem, state, run(problem, state))


@pytest.mark.parametrize("data", ADVERSARIAL)
def test_no_data_breaks_a_bound(data: str) -> None:
    shape = Shape(batch=1, kv_heads=1, group=1, tokens=23)
    problem = make(Recipe(data=data, shape=shape, policy={"bound": "deterministic"}))
    found = run(problem, probed(problem))
    error = np.abs(found.output - problem.exact().output).max(axis=-1)
    assert (error <= found.bound + 2.0**-24 * found.size + 2.0**-149).all()


@pytest.mark.parametrize("name", ["estimate-sampled", "sinks-certain", "exact-rows", "statistical"])
def test_splits_change_nothing_but_rounding(name: str) -> None:
    problem = make(tiny(RECIPES[name]))
    state = probed(problem)
    whole, parts = (run(problem, state, splits=splits) for splits in (1, 3))
    np.testing.assert_array_equal(whole.reads, parts.reads)
    np.testing.assert_allclose(whole.bound, parts.bound, rtol=1e-6)
    np.testing.assert_allclose(whole.state.log_z, parts.state.log_z, rtol=1e-6)
    np.testing.assert_allclose(whole.output, parts.output, atol=1e-5 * np.abs(whole.output).max())


def test_draws_are_the_reference_s_for_every_seed_and_step() -> None:
    p = make(tiny(RECIPES["estimate-sampled"]))
    p = replace(p, arguments=replace(p.arguments, skip_share=1.0, repairs=0))
    state = probed(p)
    outputs = []  # of some draws at odds of about one in two
    for seed, step in ((0, 0), (0, 2**32 - 1), (123456789, 0)):
        p = replace(p, arguments=replace(p.arguments, seed=seed))
        at = replace(state, step=np.array([step], np.uint32))
        found = run(p, at)
        check_step(p, at, found)
        outputs.append(found.output)
    assert (outputs[0] != outputs[1]).any()
    assert (outputs[0] != outputs[2]).any()


def test_pages_lie_where_the_block_table_says() -> None:
    p = make(tiny(RECIPES["pages-of-16"]))
    state = probed(p)
    first = run(p, state)
    moved = np.random.default_rng(0).permutation(len(p.cache.scales))
    back = np.argsort(moved)
    cache: CacheArrays = replace(
        p.cache,
        key_planes=tuple(plane[back] for plane in p.cache.key_planes),
        value_planes=tuple(plane[back] for plane in p.cache.value_planes),
        scales=p.cache.scales[back],
        block_table=moved[p.cache.block_table].astype(np.int32),
    )
    assert (cache.block_table != p.cache.block_table).any()
    again = run(replace(p, cache=cache), state)
    for name in ("output", "bound", "reads"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))


def test_masked_rows_never_leak() -> None:
    p = make(tiny(RECIPES["ragged"]))
    state = probed(p)
    first = run(p, state)
    tokens = np.arange(p.cache.scales.shape[2])
    for b in range(2):
        masked = (tokens < p.cache.starts[b]) | (tokens >= p.cache.lengths[b])
        assert masked.any()
        p.cache.scales[b][:, masked] = 0x7FC07F80  # NaN and infinity
        for plane in (*p.cache.key_planes, *p.cache.value_planes):
            plane[b][:, masked] = 0xFF
    again = run(p, state)
    for name in ("output", "bound", "size", "reads"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))


@pytest.mark.parametrize("bound", ["estimate", "deterministic", "statistical"])
@pytest.mark.parametrize("scale", [0x7F80, 0x7FC0], ids=["inf", "nan"])
@pytest.mark.parametrize("shift", [0, 16], ids=["key", "value"])
def test_a_lost_row_is_reported(shift: int, scale: int, bound: str) -> None:
    p = make(recipe(policy={"bound": bound}, shape={"batch": 1, "group": 1, "tokens": 20}))
    state = probed(p)
    word = int(p.cache.scales[0, 1, 13]) & ~(0xFFFF << shift)
    p.cache.scales[0, 1, 13] = word | (scale << shift)
    found = run(p, state)
    assert np.isfinite(found.bound).tolist() == [[True, False]]
    assert found.missed.tolist() == [[0, 1]]
