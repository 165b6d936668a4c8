"""Probabilistic estimates: rounding errors as random numbers.

Each is a theorem about *random* rounding errors: independent ones, or at least of mean zero given
the earlier ones (stochastic rounding; pass u = eps, as one of its errors is up to 2u). For round to
nearest they are a **model**, good on irregular data and wrong on structured data: adding 2048 equal
numbers in fp32 errs by 10 of the standard deviations in `sum_error_estimate`. Use the ``..._bound``
functions where a bound is needed.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from alignedkv.analysis.bounds.sums import gamma
from alignedkv.errors import SpecError

#: Mean of 1/m over significands m in [1, 2) with uniform logarithm: 0.72. An absolute error that is
#: uniform within half an ulp is smaller relative to a number high up in its binade.
_MEAN_INVERSE_SIGNIFICAND = 1 / (2 * math.log(2))


def azuma_z(failure: float) -> float:
    """Multiple of the scale that a sub-Gaussian error exceeds with at most this probability.

    Parameters
    ----------
    failure : float
        Failure probability, two-sided, in (0, 1).

    Returns
    -------
    float
        z with ``2 exp(-z^2 / 2) = failure``.

    Raises
    ------
    SpecError
        If `failure` is not in (0, 1).
    """
    if not 0 < failure < 1:
        raise SpecError(f"failure probability is {failure}; it must lie between 0 and 1, exclusive")
    return math.sqrt(2 * math.log(2 / failure))


def sum_error_estimate(
    partial_sums: ArrayLike, u: float, *, failure: float, axis: int = -1
) -> NDArray[np.float64]:
    """Error that a sum exceeds with at most a given probability: z u sqrt(sum tau_k^2).

    Parameters
    ----------
    partial_sums : array_like of float, any shape
        tau_k: bounds, independent of the rounding errors, on the n - 1 partial sums before
        rounding; no particular order of summation. The exact partial sums of a recursive sum are
        these to first order in u.
    u : float
        Bound on one relative rounding error.
    failure : float
        Failure probability of each sum.
    axis : int
        Axis of `partial_sums` that belongs to one sum.

    Returns
    -------
    ndarray of float64, shape of `partial_sums` without `axis`

    Notes
    -----
    theory.md, S5; Azuma-Hoeffding on S1: Ipsen and Zhou 2020, Connolly, Higham and Mary 2021.
    Assumes E[d_k given d_1 .. d_(k-1)] = 0: a model for round to nearest.
    """
    squares = np.square(np.asarray(partial_sums, dtype=np.float64))
    return np.asarray(azuma_z(failure) * u * np.sqrt(squares.sum(axis=axis)))


def tree_sum_error_estimate(
    x: ArrayLike, height: int, u: float, *, failure: float, axis: int = -1
) -> NDArray[np.float64]:
    """The same from the addends alone: z u sqrt(h) (1 + gamma(h, u)) (|x_1| + .. + |x_n|).

    Parameters
    ----------
    x : array_like of float, any shape
        Addends.
    height : int
        Height h of the summation tree: `recursive_height`, `pairwise_height`, `chunked_height`.
    u, failure, axis
        As for `sum_error_estimate`.

    Returns
    -------
    ndarray of float64, shape of `x` without `axis`

    Raises
    ------
    SpecError
        If height u >= 1.

    Notes
    -----
    theory.md, S5; Higham and Mary 2020. Assumption as in `sum_error_estimate`: a model for round
    to nearest.
    """
    magnitude = np.abs(np.asarray(x, dtype=np.float64)).sum(axis=axis)
    factor = azuma_z(failure) * u * math.sqrt(height) * (1 + gamma(height, u))
    return np.asarray(factor * magnitude)


def product_error_estimate(n: int, u: float, *, failure: float) -> float:
    """Relative error of n rounding factors in a row, the probabilistic `gamma`.

    Parameters
    ----------
    n : int
        Number of factors (1 + d_i)^(+-1), |d_i| <= u.
    u : float
        Bound on one relative rounding error, below 1.
    failure : float
        Failure probability.

    Returns
    -------
    float
        ``exp(z sqrt(n) u + n u^2/(1 - u)) - 1`` with ``2 exp(-z^2 (1 - u)^2/2) = failure``.

    Notes
    -----
    theory.md, S6; Higham and Mary 2019, theorem 2.4. Assumes independent d_i of mean zero: a model
    for round to nearest.
    """
    z = azuma_z(failure) / (1 - u)
    return math.expm1(z * math.sqrt(n) * u + n * u**2 / (1 - u))


def ordinary_attention_error_estimate(
    probabilities: ArrayLike, values: ArrayLike, *, u: float
) -> NDArray[np.float64]:
    """Root mean square error of an attention that rounds its weights and its output to 16 bits.

    Parameters
    ----------
    probabilities : array_like of float, [..., T]
        Exact softmax probabilities.
    values : array_like of float, [..., T, D]
    u : float
        Unit roundoff of the 16-bit type.

    Returns
    -------
    ndarray of float64, [..., D]
        ``0.72 u/sqrt(3) (sum_t p_t^2 v_tj^2 + o_j^2)^(1/2)`` per channel.

    Notes
    -----
    theory.md, section 7.3. Assumes independent rounding errors, uniform within half an ulp; the
    bound beside it is `ordinary_attention_error_bound`.
    """
    probabilities = np.asarray(probabilities, dtype=np.float64)
    values = np.asarray(values, dtype=np.float64)
    output = np.einsum("...t,...td->...d", probabilities, values)
    squares = np.einsum("...t,...td->...d", probabilities**2, values**2)
    return np.asarray(_relative_rms(u) * np.sqrt(squares + output**2))


def rounded_inputs_score_error_estimate(
    query: ArrayLike, keys: ArrayLike, *, scaling: float, u: float
) -> NDArray[np.float64]:
    """Root mean square error of scores whose query and keys were rounded to 16 bits.

    Parameters
    ----------
    query : array_like of float, [..., D]
    keys : array_like of float, [..., T, D]
    scaling : float
        Softmax scale.
    u : float
        Unit roundoff of the 16-bit type.

    Returns
    -------
    ndarray of float64, [..., T]
        ``0.72 u/sqrt(3) |scaling| (2 sum_i q_i^2 k_ti^2)^(1/2)``.

    Notes
    -----
    theory.md, section 7.3. Assumes independent rounding errors, uniform within half an ulp.
    """
    query = np.asarray(query, dtype=np.float64)
    keys = np.asarray(keys, dtype=np.float64)
    squares = np.einsum("...td,...d->...t", keys**2, query**2)
    return np.asarray(_relative_rms(u) * abs(scaling) * np.sqrt(2 * squares))


def _relative_rms(u: float) -> float:
    """Root mean square relative error of rounding to nearest."""
    return _MEAN_INVERSE_SIGNIFICAND * u / math.sqrt(3)
