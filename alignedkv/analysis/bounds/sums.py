"""Deterministic bounds on the error of floating-point sums and dot products."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from alignedkv.errors import SpecError
from alignedkv.formats import FloatFormat, round_to

#: A float64 sum of two numbers of at most this precision, rounded again to that precision, is what
#: a single rounding gives (Figueroa 1995: 53 >= 2p + 2).
_MAX_EMULATED_PRECISION = 25


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningSum:
    """A recursive sum in a given format with its running error bound."""

    #: Computed partial sums S_1 .. S_n along the axis of summation, shape of the addends.
    partial_sums: NDArray[np.float64]
    #: Computed sums S_n; the shape of the addends without the axis of summation.
    value: NDArray[np.float64]
    #: Bound on |value - exact sum|, shape of `value`.
    error_bound: NDArray[np.float64]


def gamma(n: int, u: float) -> float:
    """Higham's constant n u / (1 - n u): the relative error of n rounding factors in a row.

    Parameters
    ----------
    n : int
        Number of factors (1 + d)^(+-1), |d| <= u.
    u : float
        Unit roundoff.

    Raises
    ------
    SpecError
        If n u >= 1 or n < 0: then nothing is bounded.

    Notes
    -----
    Higham 2002, lemma 3.1.
    """
    if n < 0 or n * u >= 1:
        raise SpecError(
            f"gamma needs n >= 0 and n u < 1; got n = {n}, u = {u:.3g}. "
            "For long sums use sum_error_bound, which has no such condition"
        )
    return n * u / (1 - n * u)


def recursive_height(n: int) -> int:
    """Height of the tree that adds n numbers one after the other: n - 1."""
    _require_positive("number of addends", n)
    return n - 1


def pairwise_height(n: int) -> int:
    """Height of the tree that adds n numbers in pairs, the pairs in pairs, ..: ceil(log2 n)."""
    _require_positive("number of addends", n)
    return (n - 1).bit_length()


def chunked_height(n: int, chunk: int) -> int:
    """Height of the tree that adds n numbers by chunks: each recursively, then the chunk sums.

    Returns ``chunk + ceil(n / chunk) - 2``; smallest near chunk = sqrt(n).

    Notes
    -----
    Blanchard, Higham and Mary 2020.
    """
    _require_positive("number of addends", n)
    _require_positive("chunk", chunk)
    chunk = min(chunk, n)
    return chunk + -(-n // chunk) - 2


def running_sum(number_format: FloatFormat, x: ArrayLike, *, axis: int = -1) -> RunningSum:
    """Add recursively in the given format and bound the error in the same loop.

    Parameters
    ----------
    number_format : FloatFormat
        Format of the accumulator, of precision at most 25.
    x : array_like of float, any shape
        Addends, each a number of the format.
    axis : int
        Axis of summation; the loop is vectorised over the others.

    Returns
    -------
    RunningSum
        `error_bound` is ``u (|S_2| + .. + |S_n|)``.

    Raises
    ------
    SpecError
        If there is nothing to add, an addend is not a number of the format, or the format is too
        precise to be emulated in float64.

    Notes
    -----
    theory.md, S1; Higham 2002, sections 3.3 and 4.2. Assumes round to nearest and no overflow
    (after an overflow the bound is infinite or NaN). The bound knows the data: it is far below
    `sum_error_bound` when addends cancel early.
    """
    if number_format.precision > _MAX_EMULATED_PRECISION:
        raise SpecError(
            f"cannot emulate {number_format.name} sums: precision {number_format.precision} is "
            f"above {_MAX_EMULATED_PRECISION}, where rounding through float64 rounds twice"
        )
    x = np.asarray(x, dtype=np.float64)
    addends = np.moveaxis(x, axis, 0)
    _require_positive("number of addends", len(addends))
    if not np.array_equal(round_to(number_format, addends), addends, equal_nan=True):
        raise SpecError(
            f"some addends are not {number_format.name} numbers; "
            "round them first with formats.round_to"
        )

    partial_sums = np.empty_like(addends)
    partial = partial_sums[0] = addends[0]
    magnitudes = np.zeros_like(partial)
    for k in range(1, len(addends)):
        partial = partial_sums[k] = round_to(number_format, partial + addends[k])
        magnitudes = magnitudes + np.abs(partial)
    return RunningSum(
        partial_sums=np.moveaxis(partial_sums, 0, axis),
        value=partial,
        error_bound=enlarged(number_format.unit_roundoff * magnitudes),
    )


def sum_error_bound(x: ArrayLike, u: float, *, axis: int = -1) -> NDArray[np.float64]:
    """Bound on the error of a sum in any order: (n - 1) u (|x_1| + .. + |x_n|).

    Parameters
    ----------
    x : array_like of float, any shape
        Addends, each a number of the accumulator's format.
    u : float
        Unit roundoff of the accumulator.
    axis : int
        Axis of summation.

    Returns
    -------
    ndarray of float64, shape of `x` without `axis`
        Bound on |computed - exact|; no condition on n.

    Notes
    -----
    theory.md, S2; Rump 2012; Jeannerod and Rump 2013. Round to nearest, no overflow.
    """
    magnitudes = np.abs(np.asarray(x, dtype=np.float64))
    n = magnitudes.shape[axis]
    return enlarged(recursive_height(n) * u * magnitudes.sum(axis=axis))


def tree_sum_error_bound(
    x: ArrayLike, height: int, u: float, *, axis: int = -1
) -> NDArray[np.float64]:
    """Bound on the error of a sum along a tree: gamma(height, u) (|x_1| + .. + |x_n|).

    Parameters
    ----------
    x : array_like of float, any shape
        Addends, each a number of the accumulator's format.
    height : int
        Largest number of additions that an addend passes through: `recursive_height`,
        `pairwise_height` or `chunked_height` of n.
    u : float
        Unit roundoff of the accumulator.
    axis : int
        Axis of summation.

    Returns
    -------
    ndarray of float64, shape of `x` without `axis`
        Bound on |computed - exact|.

    Raises
    ------
    SpecError
        If height u >= 1.

    Notes
    -----
    theory.md, S3; Higham 2002, section 4.2. Round to nearest, no overflow.
    """
    magnitudes = np.abs(np.asarray(x, dtype=np.float64))
    return enlarged(gamma(height, u) * magnitudes.sum(axis=axis))


def dot_error_bound(x: ArrayLike, y: ArrayLike, u: float, *, axis: int = -1) -> NDArray[np.float64]:
    """Bound on the error of a dot product: n u (|x_1 y_1| + .. + |x_n y_n|).

    Parameters
    ----------
    x, y : array_like of float, shapes that broadcast
        Numbers of the format in which products and sums are rounded.
    u : float
        Unit roundoff of that format.
    axis : int
        Axis of summation of the broadcast product.

    Returns
    -------
    ndarray of float64, shape of ``x * y`` without `axis`
        Bound on |computed - exact|, with or without fused multiply-add, in any order, for any n.

    Notes
    -----
    theory.md, S4; Jeannerod and Rump 2013, section 3. Round to nearest, no overflow, no product
    underflows.
    """
    products = np.abs(np.asarray(x, dtype=np.float64) * np.asarray(y, dtype=np.float64))
    n = products.shape[axis]
    _require_positive("number of products", n)
    return enlarged(n * u * products.sum(axis=axis))


def enlarged(bound: ArrayLike) -> NDArray[np.float64]:
    """Enlarge a bound by 2^-32 of itself.

    A sum or product of non-negative float64 numbers of at most m roundings is at least
    (1 - 2^-53)^m times the exact one, so this makes the evaluation of a bound safe for m <= 2^20.
    """
    return np.asarray(bound, dtype=np.float64) * (1 + 2.0**-32)


def _require_positive(what: str, n: int) -> None:
    if n < 1:
        raise SpecError(f"{what} is {n}; it must be at least 1")
