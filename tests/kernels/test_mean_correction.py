"""The mean correction of an estimate: what it removes, what it leaves, where it is not made."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignedkv.kernels import reference
from alignedkv.kernels.reference_sums import mean_correction
from alignedkv.kernels.spec import DecodeSpec
from alignedkv.policy import BoundKind
from alignedkv.transform import KeyTransform, random_signs
from problems import Problem, Recipe, hinted, stored
from strategies import Activations, Shape

HEAD_DIM, DRAWS = 64, 30
#: Failure probability of a channel at z = 2.
Z, ALLOWED = 2.0, 2.0 * np.exp(-2.0)


def equal_scores(sigma: float, noisy: np.ndarray, values: np.ndarray, seed: int) -> Problem:
    """Tokens whose scores are 0, and after one plane err by ``sigma`` where ``noisy``, else not.

    Values are [T, D]; nothing is centred, and ``seed`` draws the dither.
    """
    tokens, rng = len(noisy), np.random.default_rng(99)
    query = rng.standard_normal(HEAD_DIM)
    keys = rng.standard_normal((tokens, HEAD_DIM))
    keys -= np.outer(keys @ query, query) / (query @ query)
    turn = KeyTransform(
        mean=np.zeros((1, HEAD_DIM), np.float32),
        balance=np.ones(HEAD_DIM, np.float32),
        signs=random_signs(HEAD_DIM, seed=seed),
        block=HEAD_DIM,
    )
    keys *= 7.5 * noisy[:, None] / np.abs(turn.keys(keys)).max(axis=1, keepdims=True)  # g = 1
    query *= sigma * np.sqrt(12.0) / (np.sqrt(HEAD_DIM) * np.linalg.norm(query))
    problem = stored(
        Recipe(
            shape=Shape(tokens=tokens, group=1, head_dim=HEAD_DIM),
            policy={"dither_rows": 256, "sample_values": False},
            spec={"row_dtype": "float32"},
            arguments={"scaling": 1.0, "repairs": 0},
            seed=seed,
        ),
        Activations(keys=keys[None, None], values=values[None, None], query=query[None, None]),
    )
    problem.cache.key_mean[:] = problem.cache.value_mean[:] = 0
    problem.cache.lengths[:] = 0
    rows = (x.astype(np.float32) for x in (problem.keys, problem.values))
    reference.encode(problem.spec, problem.cache, *rows)
    return problem


def first_planes(problem: Problem, spec: DecodeSpec, **changes: Any) -> Any:
    arguments = replace(problem.arguments, skip_share=0.0, **changes)
    spread = np.abs(problem.exact().output).max(axis=-1)
    state = hinted(problem, theta=np.inf, spread=spread)
    return reference.decode(spec, problem.cache, problem.query, state, arguments)


def opposite_halves(sigma: float) -> tuple[np.ndarray, np.ndarray]:
    """Outputs (mean over channels) of DRAWS dithers, [as corrected, as not], exact 0."""
    noisy = np.random.default_rng(1).permutation(512) < 256
    values = np.where(noisy, 1.0, -1.0)[:, None] * np.ones(HEAD_DIM)
    found = []
    for seed in range(DRAWS):
        problem = equal_scores(sigma, noisy, values, seed)
        certain = replace(problem.spec, bound=BoundKind.DETERMINISTIC)
        found.append(
            [first_planes(problem, spec).output.mean() for spec in (problem.spec, certain)]
        )
    corrected, plain = np.array(found).T
    return corrected, plain


@pytest.mark.parametrize("sigma", [0.5, 1.0, 1.5])
def test_the_second_order_bias_goes(sigma: float) -> None:
    """Half of the tokens weigh e^(sigma^2/2) too much: the output errs by tanh(sigma^2/4).

    With the correction a relative sigma^4/20 of their weight at most is left.
    """
    corrected, plain = opposite_halves(sigma)
    spread = np.std(plain) / np.sqrt(DRAWS)
    assert abs(plain.mean() - np.tanh(sigma**2 / 4)) < 4 * spread + 0.01
    assert abs(corrected.mean()) < sigma**4 / 40 + 4 * spread
    assert abs(corrected.mean()) < 0.3 * plain.mean()


@pytest.mark.parametrize(
    ("sigma", "sharp"), [(0.1, True), (0.25, True), (0.7, False), (1.2, False)]
)
def test_the_estimate_holds_with_it(sigma: float, sharp: bool) -> None:
    """At z = 2; a Gaussian error would leave a bound without slack in 4.6 % of the channels.

    Where sigma is large the slack is e^(sigma^2 / 2), by which a mean of squared weights exceeds
    the square of their mean.
    """
    rng = np.random.default_rng(2)
    outside, narrower = [], []
    for seed in range(DRAWS):
        values = rng.choice([-1.0, 1.0], (256, HEAD_DIM))
        problem = equal_scores(sigma, np.ones(256), values, seed)
        found = first_planes(problem, problem.spec, deviations=Z)
        outside.append(np.abs(found.output - problem.exact().output) > found.bound[..., None])
        capped = replace(problem.spec, softcap=True)
        plain = first_planes(problem, capped, deviations=Z, softcap=1e6)
        narrower.append(found.bound / plain.bound)
    assert np.mean(outside) < ALLOWED
    assert np.any(outside) == sharp
    assert (np.array(narrower) < 1).all()


@given(st.floats(1e-3, 2.7))
def test_what_is_left_of_one_uniform_error_is_within_its_bias(sigma: float) -> None:
    """Of all sums of dithers the single channel is the least Gaussian: E e^eps is sinh(x)/x."""
    spec = DecodeSpec(head_dim=64, group=1)
    correction, bias = mean_correction(spec, np.array(sigma))
    x = np.sqrt(3.0) * sigma
    mean = np.sinh(x) / x * np.exp(-correction)
    assert mean <= 1 + 1e-12
    assert 1 - mean <= bias * mean + 1e-12
    assert bias * mean <= 2.5 * (1 - mean) + 1e-12


def test_other_bounds_and_a_softcap_go_without() -> None:
    spec = DecodeSpec(head_dim=64, group=1)
    sigma = np.array([0.0, 1.0, 3.0])
    for other in (
        replace(spec, softcap=True),
        replace(spec, bound=BoundKind.DETERMINISTIC),
        replace(spec, bound=BoundKind.STATISTICAL),
    ):
        correction, bias = mean_correction(other, sigma)
        assert not correction.any()
        assert (bias == sigma**2).all()
    correction, bias = mean_correction(spec, sigma)
    assert correction.tolist() == [0, 0.5, 4.5]
    np.testing.assert_allclose(bias, [0, 0.05, 4.05])


def test_log_z_is_corrected_and_what_was_planned_is_not() -> None:
    """All scores err alike: the corrected log Z is lower by kappa, the same planes are read."""
    problem = equal_scores(1.0, np.ones(256), np.ones((256, HEAD_DIM)), seed=0)
    capped = replace(problem.spec, softcap=True)
    found = first_planes(problem, problem.spec)
    plain = first_planes(problem, capped, softcap=1e6)
    # Up to bfloat16's rounding of the scales, which is in sigma: 2^-8 at most.
    kappa = plain.state.log_z - found.state.log_z
    np.testing.assert_allclose(kappa, 0.5, rtol=2.0**-6)
    np.testing.assert_allclose(found.output, plain.output, rtol=2.0**-7)
    assert (found.reads == plain.reads).all()
