"""How many bits of an addend a sum can use: the principle of precision alignment."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from alignedkv.analysis.bounds.sums import enlarged, running_sum
from alignedkv.formats import FloatFormat, exponent, ulp


@dataclass(frozen=True, slots=True, kw_only=True)
class AddendBits:
    """What a recursive sum can use of each of its addends."""

    #: Leading significand bits of each addend that the sum can use, 0..p; shape of the addends.
    #: The leading one, implicit in a stored number, counts.
    bits: NDArray[np.int32]
    #: Absolute error that is allowed in each addend, ulp(S_i)/2; shape of the addends.
    addend_error: NDArray[np.float64]
    #: Bound on the change of the exact sum by such errors, ``sum_i ulp(S_i)/2``; one per sum.
    error_bound: NDArray[np.float64]
    #: Bound on the error that the summation itself commits, the same without its first term.
    summation_error_bound: NDArray[np.float64]


def addend_bits(number_format: FloatFormat, x: ArrayLike, *, axis: int = -1) -> AddendBits:
    """Leading bits of each addend that a recursive sum in the given format can use.

    Parameters
    ----------
    number_format : FloatFormat
        Format of the addends and of the accumulator.
    x : array_like of float, any shape
        Addends, each a number of the format, in the order in which they are added.
    axis : int
        Axis of summation.

    Returns
    -------
    AddendBits
        ``bits = max(0, p - (E - e_x))``, at most p, with e_x the exponent of the addend and E that
        of the running sum S_i it has been added to (the first addend meets S_2 like the second).

    Raises
    ------
    SpecError
        As `running_sum`, which supplies the partial sums.

    Notes
    -----
    theory.md, Lemma 15. An addend with all p bits is exact; one read as the middle of all numbers
    with its sign, exponent and `bits` leading bits is off by at most `addend_error`. All such
    errors together change the exact sum by at most `error_bound`: what the summation itself may
    lose anyway, plus half an ulp of S_2. Round to nearest, no overflow.
    """
    x = np.asarray(x, dtype=np.float64)
    met = np.moveaxis(running_sum(number_format, x, axis=axis).partial_sums, axis, 0).copy()
    if len(met) > 1:
        met[0] = met[1]

    addend_error = ulp(number_format, met) / 2
    sum_exponent = np.maximum(exponent(met), number_format.min_exponent)
    precision = number_format.precision
    usable = precision - (sum_exponent - exponent(np.moveaxis(x, axis, 0)))
    bits = np.clip(usable, 0, precision).astype(np.int32)
    return AddendBits(
        bits=np.moveaxis(bits, 0, axis),
        addend_error=np.moveaxis(addend_error, 0, axis),
        error_bound=enlarged(addend_error.sum(axis=0)),
        summation_error_bound=enlarged(addend_error[1:].sum(axis=0)),
    )
