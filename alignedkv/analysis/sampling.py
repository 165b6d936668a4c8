"""The error of rows that are read by chance: Bennett's inequality (sampling.md, Theorem S1)."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

#: Steps of the golden section in log b. Any b gives a bound: more steps only make it smaller.
_STEPS = 40
_GOLDEN = (math.sqrt(5) - 1) / 2
#: e to this power is finite in float64.
_LARGEST_EXPONENT = 700.0


def bennett_bound(
    gaussian: ArrayLike, variance: ArrayLike, largest: ArrayLike, deviations: float
) -> NDArray[np.float64]:
    """beta(G; V, M): what the sum of two independent errors exceeds with probability 2e^(-z^2/2).

    Parameters
    ----------
    gaussian : float array
        G, proxy variance of a sub-Gaussian error.
    variance : float array
        V, variance of a sum of independent errors of mean zero.
    largest : float array
        M, the largest of them.
    deviations : float
        z.

    Returns
    -------
    float64 array
        ``min_b [b G/2 + V psi(b M)/(b M^2) + z^2/(2b)]``, psi(x) = e^x - 1 - x; for M = 0 it is
        z sqrt(G + V).

    Notes
    -----
    sampling.md (S2).
    """
    G, V, M = np.broadcast_arrays(
        np.asarray(gaussian, np.float64), np.asarray(variance, np.float64), largest
    )
    total = G + V
    if deviations == 0 or not M.any():
        gaussian_bound: NDArray[np.float64] = deviations * np.sqrt(total)
        return gaussian_bound
    z = deviations
    safe_total = np.where(total == 0, 1.0, total)
    safe_largest = np.maximum(M, np.finfo(np.float64).tiny)

    def bound(log_b: NDArray[np.float64]) -> NDArray[np.float64]:
        b = np.exp(log_b)
        return b * (G / 2 + V * second_order_factor(b * M)) + z**2 / (2 * b)

    # The minimiser of a convex function: below that for M = 0, not below where psi is quadratic.
    log_gauss = np.log(z) - np.log(safe_total) / 2
    log_unit = -np.log(safe_largest)
    low = np.minimum(log_gauss, log_unit) - 1
    high = np.minimum(log_gauss, log_unit + math.log(_LARGEST_EXPONENT))
    left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    at_left, at_right = bound(left), bound(right)
    for _ in range(_STEPS):
        to_left = at_left < at_right
        low, high = np.where(to_left, low, left), np.where(to_left, right, high)
        new = np.where(to_left, high - _GOLDEN * (high - low), low + _GOLDEN * (high - low))
        at_new = bound(new)
        left, right = np.where(to_left, new, right), np.where(to_left, left, new)
        at_left, at_right = (
            np.where(to_left, at_new, at_right),
            np.where(to_left, at_left, at_new),
        )
    return np.where(total == 0, 0.0, np.minimum(at_left, at_right))


def second_order_factor(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Gamma(x) = psi(x)/x^2, psi(x) = e^x - 1 - x: increasing from 1/2 at 0."""
    small = x < 1e-3
    safe = np.where(small, 1.0, x)
    series = 0.5 + x / 6 + x * x / 20
    return np.where(small, series, (np.expm1(safe) - safe) / safe**2)


def sampled_sums(
    weight: NDArray[np.float64], largest: NDArray[np.float64], probability: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Vbar and M of Theorem S1 [G], over rows with a probability between 0 and 1.

    Parameters
    ----------
    weight : float64 array [G, T]
    largest : float64 array [T]
        a+, the largest number that a row can show when it is read.
    probability : float64 array [T]
        pi.
    """
    sampled = (probability > 0) & (probability < 1)
    if not sampled.any():
        return np.zeros(len(weight)), np.zeros(len(weight))
    share = weight * np.where(sampled, largest, 0.0)
    odds = 1.0 / np.where(sampled, probability, 1.0)
    return share**2 @ (odds - 1), (share * odds).max(axis=1, initial=0.0)
