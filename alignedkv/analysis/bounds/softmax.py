"""Deterministic bounds on softmax and log-sum-exp when their scores are inexact."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from alignedkv.analysis.bounds.sums import enlarged
from alignedkv.errors import SpecError


def total_variation_bound(oscillation: ArrayLike) -> NDArray[np.float64]:
    """Bound on the total variation distance of two softmax distributions: tanh(oscillation / 4).

    Parameters
    ----------
    oscillation : array_like of float, any shape
        Largest minus smallest score error; 2e if errors are at most e in magnitude.

    Returns
    -------
    ndarray of float64, shape of `oscillation`
        Bound on ``sum_t |p'_t - p_t| / 2``, at most 1; attained.

    Raises
    ------
    SpecError
        If an oscillation is negative.

    Notes
    -----
    theory.md, Lemma 13. p' is proportional to p e^error; no other assumption.
    """
    oscillation = np.asarray(oscillation, dtype=np.float64)
    if np.any(oscillation < 0):
        raise SpecError(
            f"oscillation is {oscillation.min():.3g}; it is the largest minus the smallest score "
            "error and cannot be negative"
        )
    return np.minimum(1.0, enlarged(np.tanh(oscillation / 4)))


def average_change_bound(
    oscillation: ArrayLike, values: ArrayLike, *, axis: int = -2
) -> NDArray[np.float64]:
    """Bound on the change of a softmax average by score errors, from the spread of its values.

    Parameters
    ----------
    oscillation : array_like of float
        As for `total_variation_bound`; broadcasts against the result.
    values : array_like of float, [..., T, D]
        What is averaged.
    axis : int
        Axis of the tokens.

    Returns
    -------
    ndarray of float64, shape of `values` without `axis`
        ``tanh(oscillation / 4) (max v - min v)``; attained.

    Raises
    ------
    SpecError
        If an oscillation is negative.

    Notes
    -----
    theory.md, Lemma 13: the a priori counterpart of Theorem 5.
    """
    values = np.asarray(values, dtype=np.float64)
    spread = values.max(axis=axis) - values.min(axis=axis)
    return enlarged(total_variation_bound(oscillation) * spread)


def softmax_error_bound(
    scores: ArrayLike,
    *,
    score_error: ArrayLike,
    exp_error: float,
    height: int,
    u: float,
    axis: int = -1,
) -> NDArray[np.float64]:
    """Bound on |ln(computed p_t / p_t)| of a softmax in floating point.

    Parameters
    ----------
    scores : array_like of float, any shape
        Computed scores.
    score_error : array_like of float
        Bound on |computed - exact| of each score, everything before the softmax included;
        broadcasts against `scores`.
    exp_error : float
        Bound on the relative error of the exponential, below 1/2. An argument scaled on the way
        (exp2 of score times log2 e) errs by more: count that in `score_error`.
    height : int
        Height of the tree that adds the weights (`recursive_height`, ...).
    u : float
        Unit roundoff of the arithmetic.
    axis : int
        Axis of the tokens.

    Returns
    -------
    ndarray of float64, shape of `scores`
        ``e'_t + max e' + (height + 1) u/(1 - u)``, ``e'_t = e + u |s_t - max s| + 2 exp_error``.

    Raises
    ------
    SpecError
        If `exp_error` is not in [0, 1/2).

    Notes
    -----
    theory.md, Lemma 14; first order: Blanchard, Higham and Higham 2021. Assumes that the maximum is
    subtracted, that weights and probabilities do not underflow, and round to nearest.
    """
    weight_error = _log_weight_error(scores, score_error, exp_error, u, axis)
    largest = weight_error.max(axis=axis, keepdims=True)
    return enlarged(weight_error + largest + (height + 1) * u / (1 - u))


def log_sum_exp_error_bound(
    scores: ArrayLike,
    computed: ArrayLike,
    *,
    score_error: ArrayLike,
    exp_error: float,
    log_error: float,
    height: int,
    u: float,
    axis: int = -1,
) -> NDArray[np.float64]:
    """Bound on the error of log-sum-exp in floating point.

    Parameters
    ----------
    scores, score_error, exp_error, height, u, axis
        As for `softmax_error_bound`.
    computed : array_like of float, shape of `scores` without `axis`
        The log-sum-exp that was computed.
    log_error : float
        Bound on the absolute error of the logarithm of the sum.

    Returns
    -------
    ndarray of float64, shape of `computed`
        ``max e' + height u/(1 - u) + log_error + u |computed|``.

    Raises
    ------
    SpecError
        If `exp_error` is not in [0, 1/2).

    Notes
    -----
    theory.md, Lemma 14, under the assumptions of `softmax_error_bound`.
    """
    weight_error = _log_weight_error(scores, score_error, exp_error, u, axis).max(axis=axis)
    return enlarged(weight_error + height * u / (1 - u) + log_error + u * np.abs(computed))


def _log_weight_error(
    scores: ArrayLike, score_error: ArrayLike, exp_error: float, u: float, axis: int
) -> NDArray[np.float64]:
    """e'_t of Lemma 14: bound on the error of the logarithm of each computed weight."""
    if not 0 <= exp_error < 0.5:
        raise SpecError(f"exp_error is {exp_error}; a relative error in [0, 1/2) is needed")
    scores = np.asarray(scores, dtype=np.float64)
    below_maximum = scores.max(axis=axis, keepdims=True) - scores
    log_of_relative_error = 2 * exp_error  # |ln(1 + x)| <= 2|x| for |x| < 1/2
    error: NDArray[np.float64] = score_error + u * below_maximum + log_of_relative_error
    return error
