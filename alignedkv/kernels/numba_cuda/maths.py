"""Functions that Python, and so the simulator, refuses to compute where a device says infinity."""

from __future__ import annotations

import math

import numpy as np

from alignedkv.kernels.numba_cuda.rows import device

_LOG_2 = math.log(2.0)


@device
def exp(x):
    """e^x; infinite beyond e^700, NaN for NaN."""
    if x > 700.0:
        return np.inf
    return math.exp(x)


@device
def expm1(x):
    """e^x - 1; infinite beyond e^700, NaN for NaN."""
    if x > 700.0:
        return np.inf
    return math.expm1(x)


@device
def curvature(x):
    """`reference_bounds.curvature`."""
    if x > 0.3:
        return (expm1(x) - x) / (x * x)
    tail = 1 / 720 + x * (1 / 5040 + x / 40320)
    return 0.5 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * tail)))


@device
def log_add(one, other):
    """log(e^one + e^other), for infinities as well; NaN for NaN."""
    if one == other:
        return one + _LOG_2
    low, top = (one, other) if one < other else (other, one)
    return top + math.log1p(math.exp(low - top))


@device
def is_finite(x):
    """Whether x is neither infinite nor NaN."""
    return abs(x) < np.inf


@device
def at_most_zero(x):
    """The smaller of x and 0; NaN for NaN."""
    return 0.0 if x > 0.0 else x
