"""The settled rule (5.4) for a thread's token, and its part of the class sums of Corollary 8."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import cuda

from alignedkv.kernels.numba_cuda.columns import (
    CLASS_SUMS,
    LARGEST_SHIFT,
    LIKELY,
    LINEAR_ONE,
    LINEAR_SIZE,
    LOG_Z,
    NORM2,
    SHIFT,
    SHIFTED,
    SHIFTED_SIZE,
    SIZE,
    SPREAD,
    SQUARE_ONE,
    SQUARE_SIZE,
    THETA,
    VALUE,
)
from alignedkv.kernels.numba_cuda.maths import curvature, exp, expm1
from alignedkv.kernels.numba_cuda.plan import gains_of, half_step
from alignedkv.kernels.numba_cuda.rows import device, member_function
from alignedkv.kernels.spec import DecodeSpec

_ROOT_3 = math.sqrt(3.0)


def settled_function(spec: DecodeSpec, refine: Any) -> Any:
    """``read_keys`` of one token: `reference_plan._settled`.

    Parameters
    ----------
    refine : device function
        From `plan.score_functions`.
    """
    group, stored, gains = spec.subgroup, spec.stored_planes, gains_of(spec)

    @device
    def exceeds(score, facts, g, half, size):
        """Whether a weight of e^(score - L), with the error of ``half``, is above theta."""
        theta = facts[g, THETA]
        addend = exp(score - facts[g, LOG_Z]) * (facts[g, NORM2] * half / _ROOT_3)
        return theta == 0.0 or addend * (size + facts[g, SPREAD]) > theta

    @device
    def read_keys(
        cache, address, key_scale, size, own, queries, products, facts, step, dots, score, halves,
        finest,
    ):  # fmt: skip
        """Planes read; each head's score, its half step, and its score from all that was read."""
        z, first, read = step.deviations, 0.5 * key_scale, 1
        for n in range(2, stored + 1):
            coarser = half_step(key_scale, gains, n - 1)
            finer = half_step(key_scale, gains, n)
            for g in range(group):
                deviation = facts[g, NORM2] / _ROOT_3
                hopeful = score[g] + z * deviation * (first + 2.0 * finer)
                if exceeds(hopeful, facts, g, coarser, size):
                    read = n
        for g in range(group):
            halves[g], finest[g] = first, score[g]
        for n in range(2, read + 1):
            refine(
                cache, address, n - 1, n, key_scale, own, queries, products, facts, step.softcap,
                dots, finest,
            )  # fmt: skip
            coarser = half_step(key_scale, gains, n - 1)
            finer = half_step(key_scale, gains, n)
            for g in range(group):
                settled = finest[g] + z * (facts[g, NORM2] * finer / _ROOT_3)
                if exceeds(settled, facts, g, coarser, size):
                    score[g], halves[g] = finest[g], finer
        return read

    return read_keys


def class_functions(spec: DecodeSpec, weight_error: float) -> tuple[Any, Any]:
    """``class_terms`` of one token and ``gather`` of a tile's: `reference_sums._class_sums`.

    Parameters
    ----------
    weight_error : float
        e^w of (7.2).
    """
    stored, classes, gains = spec.stored_planes, spec.dither_rows, gains_of(spec)
    half_range = spec.layout.half_range
    member_of = member_function(classes)

    @device
    def stops(facts, g, finest, spread, key_scale, size, half, z):
        """gamma sigma^2, once for every plane count at which the token may stop."""
        theta, reach = facts[g, THETA], size + facts[g, SPREAD]
        deviation = facts[g, NORM2] / _ROOT_3
        lowest = exp(finest - spread - facts[g, LOG_Z])
        total, coarser = 0.0, np.inf
        for n in range(1, stored + 1):
            own_half = half_step(key_scale, gains, n)
            sigma = deviation * own_half
            reached = stopped = True
            if n > 1:
                highest = exp(finest + spread + 2.0 * z * sigma - facts[g, LOG_Z])
                reached = highest * coarser * reach > theta
            if n < stored:
                stopped = lowest * sigma * reach <= theta
            if own_half == half or (reached and stopped):
                total += curvature(z * sigma) * sigma * sigma
            coarser = sigma
        return total

    @device
    def class_terms(
        sums, facts, g, score, top, key_scale, half, finest, finest_half, value_scale, value_half,
        live, z, terms,
    ):  # fmt: skip
        """What a token adds to its class, into its column of ``terms``, and to head g's sums."""
        lane, weight = cuda.threadIdx.x, math.exp(score - top)
        size, deviation = half_range * value_scale, facts[g, NORM2] / _ROOT_3
        spread = z * deviation * finest_half
        upper = exp(finest - top + spread)
        shift = live * key_scale * facts[g, SHIFT] + weight_error
        one, two = upper * deviation * half, 0.0
        if live > 0.0:
            two = upper * stops(facts, g, finest, spread, key_scale, size, half, z)
        terms[LINEAR_ONE, lane], terms[LINEAR_SIZE, lane] = one, one * size
        terms[SQUARE_ONE, lane], terms[SQUARE_SIZE, lane] = two, two * size
        terms[VALUE, lane] = weight * value_half
        shifted = upper * expm1(shift)
        sums[g, SHIFTED] += shifted
        sums[g, SHIFTED_SIZE] += shifted * size
        sums[g, LIKELY] += exp(finest - top - spread)
        sums[g, SIZE] = max(sums[g, SIZE], size)
        sums[g, LARGEST_SHIFT] = max(sums[g, LARGEST_SHIFT], shift)

    @device
    def gather(sums, terms, factor, first, last):
        """Add the terms of tokens ``first`` to ``last`` to class sums [CLASS_SUMS, P].

        A thread owns a class or several: it knows where its class comes in every P tokens.

        Parameters
        ----------
        terms : float64 array [CLASS_SUMS or more, threads]
            Of token ``first`` and those after it.
        factor : float
            By which what was there is multiplied.
        """
        for own in range(cuda.threadIdx.x, classes, cuda.blockDim.x):
            for k in range(CLASS_SUMS):
                sums[k, own] *= factor
            for block in range(first // classes, (last - 1) // classes + 1):
                t = member_of(block, own)
                if first <= t < last:
                    for k in range(CLASS_SUMS):
                        sums[k, own] += terms[k, t - first]

    return class_terms, gather
