"""Deterministic bounds on what ordinary 16-bit attention commits: the yardstick for tolerances."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from alignedkv.analysis.bounds.sums import enlarged, gamma
from alignedkv.formats import FP32


def ordinary_score_error_bound(
    query: ArrayLike, keys: ArrayLike, *, scaling: float, u: float = FP32.unit_roundoff
) -> NDArray[np.float64]:
    """Bound on the error of scores that are computed in fp32.

    Parameters
    ----------
    query : array_like of float, [..., D]
    keys : array_like of float, [..., T, D]
    scaling : float
        Softmax scale.
    u : float
        Unit roundoff of products and sums.

    Returns
    -------
    ndarray of float64, [..., T]
        ``|scaling| gamma(D + 2, u) sum_i |q_i k_ti|``.

    Notes
    -----
    theory.md, section 7.3, with two more roundings: of the scale and of the product with it, both
    exact if the scale is a power of two. Round to nearest, any order, no underflow.
    """
    query = np.abs(np.asarray(query, dtype=np.float64))
    keys = np.abs(np.asarray(keys, dtype=np.float64))
    magnitudes = np.einsum("...td,...d->...t", keys, query)
    return enlarged(abs(scaling) * gamma(query.shape[-1] + 2, u) * magnitudes)


def ordinary_attention_error_bound(
    probabilities: ArrayLike, values: ArrayLike, *, u: float
) -> NDArray[np.float64]:
    """Bound on the error of an attention that rounds its weights and its output to 16 bits.

    Parameters
    ----------
    probabilities : array_like of float, [..., T]
        Exact softmax probabilities.
    values : array_like of float, [..., T, D]
    u : float
        Unit roundoff of the 16-bit type: ``FP16.unit_roundoff`` or ``BF16.unit_roundoff``.

    Returns
    -------
    ndarray of float64, [..., D]
        ``u (1 + u) sum_t p_t |v_tj| + u |o_j|`` per channel.

    Notes
    -----
    theory.md, section 7.3, with its second-order term. The normaliser is summed from unrounded
    weights, as FlashAttention does; rounded weights and outputs do not underflow; scores,
    normaliser and the sum over tokens are exact (`ordinary_score_error_bound`, `sum_error_bound`
    and `mma_dot_error_bound` are for those).
    """
    probabilities = np.asarray(probabilities, dtype=np.float64)
    values = np.asarray(values, dtype=np.float64)
    output = np.einsum("...t,...td->...d", probabilities, values)
    magnitude = np.einsum("...t,...td->...d", probabilities, np.abs(values))
    return enlarged(u * (1 + u) * magnitude + u * np.abs(output))
