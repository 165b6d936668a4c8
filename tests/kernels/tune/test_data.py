"""Inputs to tune on: their kinds differ as they say."""

from __future__ import annotations

import numpy as np
import pytest

from alignedkv.errors import TuningError
from alignedkv.kernels.tune.data import Inputs, synthesise, tiled
from alignedkv.kernels.tune.oracle import exact_attention
from alignedkv.kernels.tune.synthetic import KINDS

SIZES = {"tokens": 700, "batch": 2, "kv_heads": 2, "group": 3, "head_dim": 64}


def scores(inputs: Inputs) -> np.ndarray:
    """Scores [B, Hkv, G, T]."""
    batch, kv_heads, _, head_dim = inputs.keys.shape
    query = inputs.query.reshape(batch, kv_heads, -1, head_dim)
    return inputs.scaling * np.einsum("bhgd,bhtd->bhgt", query, inputs.keys)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_have_the_deviation_of_their_kind(kind: str) -> None:
    inputs = synthesise(kind, **SIZES)
    others = scores(inputs)[..., 1:]
    if KINDS[kind].spread is not None:
        assert others.std(axis=-1) == pytest.approx(KINDS[kind].spread, rel=0.02)
    assert inputs.keys.shape == inputs.values.shape == (2, 2, 700, 64)
    assert inputs.query.shape == (2, 6, 64)
    assert inputs.query_size.shape == (2, 2, 64)
    assert (inputs.query_size > 0).all()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if KINDS[kind].sink_mass])
def test_token_0_is_a_sink(kind: str) -> None:
    inputs = synthesise(kind, **SIZES)
    share = np.exp(scores(inputs) - np.logaddexp.reduce(scores(inputs), axis=-1, keepdims=True))
    assert share[..., 0] == pytest.approx(KINDS[kind].sink_mass, rel=1e-3)
    sizes = np.abs(inputs.values).mean(axis=-1)
    assert (sizes[..., 0] < 0.2 * sizes[..., 1:].mean(axis=-1)).all()


def test_kinds_need_ever_fewer_tokens() -> None:
    def needed(kind: str) -> float:
        s = scores(synthesise(kind, **SIZES))[..., 1:]
        p = np.exp(s - np.logaddexp.reduce(s, axis=-1, keepdims=True))
        return float(np.median(1.0 / (p**2).sum(axis=-1)))

    assert needed("flat") > 2 * needed("mixed") > 4 * needed("peaky")


def test_a_seed_repeats_and_heads_differ() -> None:
    one, two, other = (synthesise("mixed", **SIZES, seed=seed) for seed in (1, 1, 2))
    assert (one.keys == two.keys).all()
    assert not (one.keys == other.keys).any()
    assert not (one.keys[0, 0] == one.keys[0, 1]).any()


def test_neighbours_are_alike_unless_flat() -> None:
    def likeness(kind: str) -> float:
        rows = synthesise(kind, **SIZES).keys[0, 0, 1:]
        rows = rows - rows.mean(axis=0)
        return float((rows[1:] * rows[:-1]).mean() / (rows**2).mean())

    assert likeness("mixed") > likeness("flat") + 0.2


def test_tiling_repeats_tokens_from_the_end() -> None:
    rng = np.random.default_rng(0)
    heads = [
        (
            rng.standard_normal((5, 4)).astype(np.float16),
            rng.standard_normal((5, 4)).astype(np.float16),
            rng.standard_normal((2, 3, 4)).astype(np.float16),
        )
        for _ in range(2)
    ]
    inputs = tiled(heads, tokens=12, batch=1, kv_heads=3, scaling=0.5)
    for h in range(3):
        key, value, query = heads[h % 2]
        assert (inputs.keys[0, h, -5:] == key).all()
        assert (inputs.keys[0, h, :2] == key[-2:]).all()
        assert (inputs.values[0, h, 2:7] == value).all()
        assert (inputs.query[0, 2 * h : 2 * h + 2] == query[:, -1]).all()
    # A whole number of copies leaves the output as it was.
    once, thrice = (
        exact_attention(tiled(heads, tokens=n, batch=1, kv_heads=2, scaling=0.5)) for n in (5, 15)
    )
    assert thrice == pytest.approx(once)


def test_what_cannot_be_made_is_said() -> None:
    with pytest.raises(TuningError, match="give one of flat, mixed, peaky, model"):
        synthesise("odd", **SIZES)
    with pytest.raises(TuningError, match="heads of one shape"):
        tiled([], tokens=3, batch=1, kv_heads=1, scaling=1.0)
