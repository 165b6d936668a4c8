"""Deterministic bounds on sums inside matrix instructions (MMA), which do not round to nearest.

An MMA adds the accumulator and k exact products at once: it shifts them to the largest exponent
among them, cuts off what lies more than ``alignment_bits`` below the last bit of the result format,
adds, and truncates the result.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from alignedkv.analysis.bounds.sums import enlarged
from alignedkv.errors import SpecError
from alignedkv.formats import FP32


def mma_error_bound(
    products: ArrayLike,
    accumulator: ArrayLike,
    result: ArrayLike,
    *,
    alignment_bits: int = 0,
    u: float = FP32.unit_roundoff,
    axis: int = -1,
) -> NDArray[np.float64]:
    """Bound on the error of one matrix instruction.

    Parameters
    ----------
    products : array_like of float, any shape
        Exact products x_i y_i; k of them along `axis`.
    accumulator, result : array_like of float, shape of `products` without `axis`
        What the instruction adds them to, and what it returned.
    alignment_bits : int
        Bits kept below the last bit of the result format when addends are aligned: 2 measured on
        an H100 (fp16 in, fp32 out); 0, the default, where unknown.
    u : float
        Unit roundoff of the accumulator's format.
    axis : int
        Axis of summation.

    Returns
    -------
    ndarray of float64, shape of `result`
        ``((k + 1) 2^-alignment_bits + 1) 2u max(|accumulator|, |products|, |result|)``.

    Raises
    ------
    SpecError
        If `alignment_bits` is negative.

    Notes
    -----
    theory.md, S7; Fasi, Higham, Mikaitis and Pranesh 2021. Assumes alignment to the largest
    exponent, truncation toward zero, exact products, no overflow and no underflow.
    """
    products = np.abs(np.asarray(products, dtype=np.float64))
    largest = np.maximum(np.abs(accumulator), np.abs(result))
    largest = np.maximum(largest, products.max(axis=axis))
    return enlarged(_relative_error(products.shape[axis], alignment_bits, u) * largest)


def mma_dot_error_bound(
    x: ArrayLike,
    y: ArrayLike,
    *,
    products_per_mma: int,
    alignment_bits: int = 0,
    u: float = FP32.unit_roundoff,
    accumulator: ArrayLike = 0.0,
    axis: int = -1,
) -> NDArray[np.float64]:
    """Bound on the error of a dot product that runs through matrix instructions.

    Parameters
    ----------
    x, y : array_like of float, shapes that broadcast
        Operands, n along `axis` after broadcasting.
    products_per_mma : int
        Products k that one instruction adds (its K dimension: 16 for 16-bit operands).
    alignment_bits, u
        As for `mma_error_bound`.
    accumulator : array_like of float
        What the first instruction adds its products to.
    axis : int
        Axis of summation of the broadcast product.

    Returns
    -------
    ndarray of float64, shape of ``x * y`` without `axis`
        ``ceil(n / k) ((k + 1) 2^-alignment_bits + 1) 2u (|accumulator| + |x_1 y_1| + ..)``.

    Raises
    ------
    SpecError
        If `products_per_mma` is below 1 or `alignment_bits` negative.

    Notes
    -----
    theory.md, S7, and its assumptions as in `mma_error_bound`. As truncation toward zero never
    enlarges a magnitude, every accumulator on the way is at most the sum of all magnitudes.
    """
    if products_per_mma < 1:
        raise SpecError(f"products_per_mma is {products_per_mma}; it must be at least 1")
    products = np.abs(np.asarray(x, dtype=np.float64) * np.asarray(y, dtype=np.float64))
    instructions = -(-products.shape[axis] // products_per_mma)
    magnitude = np.abs(accumulator) + products.sum(axis=axis)
    per_instruction = _relative_error(products_per_mma, alignment_bits, u)
    return enlarged(instructions * per_instruction * magnitude)


def _relative_error(products: int, alignment_bits: int, u: float) -> float:
    """Error of one instruction over the largest magnitude in it."""
    if alignment_bits < 0:
        raise SpecError(f"alignment_bits is {alignment_bits}; it must be 0 or more")
    last_bit = 2 * u
    aligned = (products + 1) * 2.0**-alignment_bits  # each addend loses less than one kept bit
    return (aligned + 1) * last_bit  # and the result less than its own last bit
