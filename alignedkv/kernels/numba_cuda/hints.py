"""What a head is told before a step, sharpens itself, and tells the next: `reference_hints`.

A hint that is not a number says nothing.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
from numba import cuda

from alignedkv.kernels.numba_cuda.block import added, larger_or_nan, reduce_function
from alignedkv.kernels.numba_cuda.maths import is_finite
from alignedkv.kernels.numba_cuda.plan import score_functions
from alignedkv.kernels.numba_cuda.rows import (
    address_function,
    bfloat16,
    class_function,
    device,
    token_range,
)
from alignedkv.kernels.spec import DecodeSpec
from alignedkv.policy import (
    FEEDBACK_GAIN,
    LEAST_REST,
    MARGIN_FALL,
    MARGIN_RANGE,
    MARGIN_RISE,
    NEAR_FIRST,
    NEAR_LAST,
    REST_GAIN,
    START_MARGIN,
    THETA_RANGE,
)

_NEAR = NEAR_FIRST + NEAR_LAST
_LEAST_BEYOND = math.log1p(LEAST_REST)
_LEAST_MARGIN, _MOST_MARGIN = MARGIN_RANGE
_LEAST_THETA, _MOST_THETA = THETA_RANGE


def near_function(spec: DecodeSpec, threads: int) -> Any:
    """``look_near(cache, home, step, queries, products, facts)`` of one query head.

    All threads of a block call it, with the head's rows of the workspace as arrays of one row, and
    all get the log-sum-exp of the near rows' scores, as scores are counted, and their mean g^2.
    """
    score_first, _, _ = score_functions(replace(spec, group=1))
    row_of, class_of = address_function(spec.page_tokens), class_function(spec.dither_rows)
    largest = reduce_function(1, threads, larger_or_nan)
    total = reduce_function(2, threads, added)

    @device
    def look_near(cache, home, step, queries, products, facts):
        lane = cuda.threadIdx.x
        scratch = cuda.shared.array((2, threads), np.float64)
        scores = cuda.shared.array(_NEAR, np.float64)
        dots = cuda.local.array(1, np.float64)
        score = cuda.local.array(1, np.float64)
        start, length = token_range(cache, home, step.window)
        older = length - 1  # rows but the newest
        count = max(min(older - start, _NEAR), 0)
        scratch[0, lane], squares = -np.inf, 0.0
        for i in range(lane, count, threads):
            t = start + i if i < NEAR_FIRST else older - count + i
            address = row_of(cache, home, t)
            scale = np.float64(bfloat16(np.int64(cache.scales[address]) & 0xFFFF))
            score_first(
                cache, address, scale, class_of(t), queries, products, facts, step.softcap, dots,
                score,
            )  # fmt: skip
            scores[i] = score[0]
            scratch[0, lane] = larger_or_nan(0, scratch[0, lane], score[0])
            squares += scale * scale
        largest(scratch)
        top = scratch[0, 0]
        cuda.syncthreads()
        scratch[0, lane], scratch[1, lane] = 0.0, squares
        for i in range(lane, count, threads):
            scratch[0, lane] += math.exp(scores[i] - top)
        total(scratch)
        log_sum = top
        if is_finite(top):
            log_sum += math.log(scratch[0, 0])
        return log_sum, scratch[1, 0] / max(count, 1)

    return look_near


@device
def told_rest(rest):
    """`reference_hints.read_hints`."""
    return np.float64(rest) if is_finite(rest) else -np.inf


@device
def told_margin(margin):
    """`reference_hints.read_hints`."""
    return np.float64(margin) if margin == margin else START_MARGIN


@device
def next_rest(rest, near, offset, log_z):
    """`reference_hints.next_rest`."""
    beyond = log_z - near
    if not (beyond > _LEAST_BEYOND and is_finite(beyond)):
        return rest
    found = log_z + math.log(-math.expm1(-beyond)) - offset
    if not is_finite(found):
        return rest
    return rest + REST_GAIN * (found - rest) if is_finite(rest) else found


@device
def next_margin(margin, missed):
    """`policy.feedback_margin`."""
    moved = margin + (MARGIN_RISE if missed else -MARGIN_FALL)
    return min(max(moved, _LEAST_MARGIN), _MOST_MARGIN)


@device
def next_theta(theta, bound, tau, margin):
    """`policy.feedback_theta`."""
    wanted = (tau / max(bound, 1e-300) * 2.0**-margin) ** FEEDBACK_GAIN
    factor = min(max(wanted, 0.25), 4.0)
    return min(max(theta * factor, _LEAST_THETA * tau), _MOST_THETA * tau)
