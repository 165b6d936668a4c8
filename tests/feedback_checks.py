"""What theta and margin a step must leave, whose bound is the reference's or a little more."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from alignedkv.kernels.arrays import HeadState
from alignedkv.kernels.reference_hints import feed_back, read_hints

#: Of theta: its least and its most are multiples of tau, which is known up to 1e-4.
_RELATIVE = 2e-4


def check_feedback(
    state: HeadState,
    found: HeadState,
    *,
    bound: NDArray[Any],
    most: NDArray[Any],
    tau: NDArray[Any],
    missed: NDArray[Any],
    heads: Any = ...,
) -> None:
    """Hold what a first pass made of ``state`` to the policy's formula.

    Parameters
    ----------
    state, found : HeadState
        What the step was told, and what it tells the next.
    bound, most : float array [B, H]
        The reference's bound, and the largest that this step may have had instead.
    tau : float array [B, H]
        The tolerance times the output's size.
    missed : bool array [B, H]
        Where this step's own bound missed.  At the edge of the tolerance the reference's may have
        held: there the margin rises instead of falling, and theta aims that much lower.
    heads : index of [B, H]
        Those that are compared.
    """
    hints = read_hints(state, slice(None), slice(None), np.uint64(0))
    with np.errstate(all="ignore"):
        lowest, margin = feed_back(hints, np.float64(most), np.float64(tau), missed)
        highest, _ = feed_back(hints, np.float64(bound), np.float64(tau), missed)
        # As float32, like what is found: subnormal numbers have no relative error.
        least = np.float32((1 - _RELATIVE) * lowest)
        largest = np.float32((1 + _RELATIVE) * highest)
    np.testing.assert_allclose(found.margin[heads], margin[heads], rtol=1e-6)
    assert (found.theta[heads] >= least[heads]).all()
    assert (found.theta[heads] <= largest[heads]).all()
