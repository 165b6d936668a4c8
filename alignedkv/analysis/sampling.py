"""The error of rows that are read by chance: Bennett's inequality (sampling.md, Theorem S1)."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

#: b is tried at these multiples of the minimiser for M = 0, which is too large for M > 0. Any b
#: gives a bound; the best of the grid is within 0.2 % of the infimum.
_MULTIPLES = np.geomspace(1.0, 0.01, 128)


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
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        b = (deviations / np.sqrt(total))[..., None] * _MULTIPLES
        x = b * M[..., None]
        bound = (
            b * (G / 2)[..., None]
            + V[..., None] * b * second_order_factor(x)
            + deviations**2 / (2 * b)
        )
    bound = np.nanmin(np.where(np.isnan(bound), np.inf, bound), axis=-1)
    return np.where(total == 0, 0.0, bound)


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
