"""The key transform: an identity of scores, in operations that kernels can repeat."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import oracles
from alignedkv.errors import SpecError
from alignedkv.transform import (
    MAX_BALANCE_EXPONENT,
    fit_key_transform,
    hadamard,
    hadamard_block,
    random_signs,
)

PARTS = ["none", "mean", "mean+balance", "mean+hadamard", "mean+balance+hadamard", "hadamard"]


@pytest.mark.parametrize("block", [1, 2, 32, 64, 256])
def test_hadamard_is_sylvesters_matrix(block: int) -> None:
    x = np.random.default_rng(block).integers(-8, 8, (3, 2 * block)).astype(np.float32)
    wanted = np.einsum("ij,tbj->tbi", oracles.hadamard_matrix(block), x.reshape(3, 2, block))
    assert (hadamard(x, block) == wanted.reshape(3, -1)).all()  # integers: exact
    assert hadamard(x, block).dtype == np.float32
    assert hadamard(x.astype(np.float64), block).dtype == np.float64


@settings(max_examples=40)
@given(
    st.sampled_from(PARTS),
    st.sampled_from([64, 80, 96, 128, 192, 256]),
    st.sampled_from([None, 5]),
    st.integers(0, 2**32 - 1),
)
def test_scores_are_kept(parts: str, head_dim: int, page: int | None, seed: int) -> None:
    """q'.k' + q.mean = q.k, up to the float32 roundings of k' and q' (theory.md 2 and 7)."""
    rng = np.random.default_rng(seed)
    k = rng.standard_normal((7, head_dim)).astype(np.float32) + np.float32(3)
    k *= np.exp2(rng.integers(-6, 6, head_dim)).astype(np.float32)
    q = rng.standard_normal((2, head_dim)).astype(np.float32)
    t = fit_key_transform(k, np.abs(q).mean(axis=0), parts=parts, page=page, seed=seed % 7)
    exact = q.astype(np.float64) @ k.astype(np.float64).T
    turned_k = t.keys(k).astype(np.float64)
    offsets = t.offsets(q, len(k))

    stages = np.log2(t.block) + 2
    norms = np.linalg.norm(t.exact_queries(q), axis=1)[:, None] * np.linalg.norm(turned_k, axis=1)
    rounding = stages * 2.0**-24 * norms + 1e-12
    assert (np.abs(t.exact_queries(q) @ turned_k.T + offsets - exact) <= rounding).all()
    in_float32 = t.queries(q).astype(np.float64) @ turned_k.T + offsets
    assert (np.abs(in_float32 - exact) <= 2 * rounding).all()


def test_balance_is_powers_of_two_equal_in_rotary_pairs() -> None:
    rng = np.random.default_rng(0)
    k = rng.standard_normal((100, 64)) * np.exp(3 * rng.standard_normal(64))
    beta = fit_key_transform(k, np.exp(rng.standard_normal(64))).balance
    assert (np.frexp(beta)[0] == 0.5).all()
    assert beta.min() == 1
    assert beta.max() <= 2.0**MAX_BALANCE_EXPONENT
    assert (beta[:32] == beta[32:]).all()


def test_balance_narrows_the_rows() -> None:
    """||q'||_2 max_t ||k'_t||_inf, which every key bound is proportional to."""
    rng = np.random.default_rng(1)
    k = rng.standard_normal((200, 64))
    k[:, [3, 35]] *= 60
    q = rng.standard_normal((50, 64))
    q[:, [3, 35]] /= 60

    def size(parts: str) -> float:
        t = fit_key_transform(k, np.abs(q).mean(axis=0), parts=parts)
        return float(np.linalg.norm(t.queries(q), axis=1).mean() * np.abs(t.keys(k)).max())

    assert size("mean+balance+hadamard") < 0.5 * size("mean+hadamard") < 0.5 * size("mean")


def test_keys_near_the_largest_float_do_not_overflow() -> None:
    k = np.full((2, 64), 3.3e38, np.float32)
    k[1] = -k[1]
    assert np.isfinite(fit_key_transform(k, parts="mean+hadamard").keys(k)).all()


def test_signs_and_blocks() -> None:
    signs = random_signs(96, seed=5)
    assert set(signs) == {-1.0, 1.0}
    assert (signs == random_signs(96, seed=5)).all()
    assert [hadamard_block(c) for c in (64, 96, 128, 192, 256)] == [64, 32, 128, 64, 256]


def test_unknown_parts_and_missing_sizes_are_refused() -> None:
    k = np.ones((2, 64))
    with pytest.raises(SpecError, match="join any of"):
        fit_key_transform(k, parts="mean+rotation")
    with pytest.raises(SpecError, match="query_size"):
        fit_key_transform(k, parts="balance")
