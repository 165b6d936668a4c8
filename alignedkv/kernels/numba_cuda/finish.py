"""After the splits: merge them, bound the output, and say whether the KV head is read again.

One block a query head: `reference_bounds` and the end of `reference.decode`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import cuda

from alignedkv.kernels.arithmetic import REACH as PREFIX_REACH
from alignedkv.kernels.arithmetic import Arithmetic
from alignedkv.kernels.numba_cuda.block import larger_or_nan, reduce_function
from alignedkv.kernels.numba_cuda.columns import (
    BASE,
    ERROR,
    ERROR_SIZE,
    KEY_SQUARE,
    LOG_Z,
    REACH,
    SAMPLED_LARGEST,
    SAMPLED_SQUARE,
    SECOND,
    SKIPPED,
    SMALLEST,
    SPREAD,
    THETA,
    VALUE_ERROR,
    VALUE_SQUARE,
    WEIGHT,
)
from alignedkv.kernels.numba_cuda.maths import curvature
from alignedkv.kernels.numba_cuda.rows import device, rounder, token_range
from alignedkv.kernels.numba_cuda.sums import combine_functions, count_sums
from alignedkv.kernels.reference_bounds import PREFIX_EXCESS
from alignedkv.kernels.spec import DecodeSpec
from alignedkv.policy import FEEDBACK_GAIN, FEEDBACK_MARGIN_BITS, THETA_RANGE, BoundKind

_LEAST_THETA, _MOST_THETA = THETA_RANGE
_FEEDBACK = 2.0**-FEEDBACK_MARGIN_BITS
#: Covers what scores in float32 change in the weights that an estimate is formed with (twice e^a,
#: for rows whose first plane means anything), and the rounding of float64 sums and of the result.
_SAFETY = 1.0 + 2.0**-10
_SMALLEST = 2.0**-149


def bound_function(spec: DecodeSpec, accumulation: float) -> Any:
    """``bound_of(sums, sink, hint, spread, z)`` of normalised sums [SUMS]."""
    sampled = spec.sample_values

    @device
    def drawn_bound(variance, sums, z):
        """beta of (S2): `reference_bounds.sampling_bound`."""
        drawn = PREFIX_EXCESS**2 * sums[SAMPLED_SQUARE]
        largest = PREFIX_EXCESS * sums[SAMPLED_LARGEST]
        total = variance + drawn
        best = z * z * largest / 6.0
        best += math.sqrt(best * best + z * z * total)
        if 0.0 < total < np.inf:
            for j in range(48):
                b = z / math.sqrt(total) * 2.0 ** (-j / 8.0)
                bennett = b * variance / 2.0 + z * z / (2.0 * b)
                bennett += b * drawn * curvature(b * largest)
                best = min(best, bennett)
        return best

    @device
    def estimate(sums, sink, hint, spread, z):
        stale = 1.0
        if spread > hint:
            stale = spread / hint if hint > 0.0 else np.inf
        variance = stale * stale * sums[KEY_SQUARE] + sums[VALUE_SQUARE]
        second = stale * sums[SECOND]
        if sampled:
            random = drawn_bound(variance, sums, z)
        else:
            random = z * math.sqrt(variance) + sums[SKIPPED]
        return (random + second + accumulation * PREFIX_REACH * sums[REACH]) * _SAFETY

    @device
    def deterministic(sums, sink, hint, spread, z):
        value = sums[VALUE_ERROR]
        smallest = sums[SMALLEST] + sink
        if smallest == 0.0:
            return np.inf
        scores = (sums[ERROR_SIZE] + (spread + value) * sums[ERROR]) / smallest
        return (value + scores + accumulation * PREFIX_REACH * sums[REACH]) * _SAFETY

    return estimate if spec.bound is BoundKind.ESTIMATE else deterministic


def finish_kernel(spec: DecodeSpec, threads: int, arithmetic: Arithmetic) -> Any:
    """``finish[places, G](cache, asked, step, work, answer, attempt)``."""
    group, head_dim, columns = spec.group, spec.head_dim, count_sums(spec)
    softcap, sinks = spec.softcap, spec.sinks
    rescaled, combined = combine_functions(spec)
    bound_of = bound_function(spec, arithmetic.accumulation)
    rounded = rounder(spec.query_dtype)
    largest = reduce_function(2, threads, larger_or_nan)

    @device
    def following_theta(theta, bound, tau):
        """`policy.feedback_theta`."""
        wanted = (tau / max(bound, 1e-300) * _FEEDBACK) ** FEEDBACK_GAIN
        return min(max(theta * min(max(wanted, 0.25), 4.0), _LEAST_THETA * tau), _MOST_THETA * tau)

    def finish(cache, asked, step, work, answer, attempt):
        place, g, lane = cuda.blockIdx.x, cuda.blockIdx.y, cuda.threadIdx.x
        wanted = 0
        for member in range(group):
            wanted |= work.wanted[attempt, place, member]
        if wanted == 0:
            return
        sums = cuda.shared.array(columns, np.float64)
        scratch = cuda.shared.array((2, threads), np.float64)
        facts = work.facts[place, g]
        origin = 0.0 if softcap else facts[BASE]
        logit = -np.inf
        if sinks:
            logit = np.float64(asked.sinks[place % cache.kv_heads * group + g]) - origin
        start, length = token_range(cache, place, step.window)
        if start == length:
            for channel in range(lane, head_dim, threads):
                answer.output[place, g, channel] = rounded(0.0)
            if lane == 0:
                answer.bound[place, g] = answer.size[place, g] = answer.spread[place, g] = 0.0
                answer.missed[place, g] = 0
                answer.log_z[place, g] = np.float32(logit + origin)
                answer.theta[place, g] = np.float32(facts[THETA])
            return

        splits = work.tops.shape[1]
        top = logit
        for part in range(splits):
            top = max(top, work.tops[place, part, g])
        for k in range(lane, columns, threads):
            total = 0.0
            for part in range(splits):
                factor = math.exp(work.tops[place, part, g] - top)
                share = rescaled(k, work.sums[place, part, g, k], factor)
                total = combined(k, total, share)
            sums[k] = total
        cuda.syncthreads()
        sink = math.exp(logit - top)
        weight = sums[WEIGHT] + sink
        sink /= weight

        scratch[0, lane] = scratch[1, lane] = 0.0
        for channel in range(lane, head_dim, threads):
            value = 0.0
            for part in range(splits):
                factor = math.exp(work.tops[place, part, g] - top)
                value += factor * work.outputs[place, part, g, channel]
            mean = np.float64(cache.value_mean[place, channel])
            value = value / weight + (1.0 - sink) * mean
            answer.output[place, g, channel] = rounded(value)
            scratch[0, lane] = larger_or_nan(0, scratch[0, lane], abs(value))
            scratch[1, lane] = larger_or_nan(1, scratch[1, lane], abs(value - mean))
        largest(scratch)
        if lane == 0:
            size, spread = scratch[0, 0], scratch[1, 0]
            for k in range(columns):
                sums[k] = rescaled(k, sums[k], 1.0 / weight)
            bound = bound_of(sums, sink, facts[SPREAD], spread, step.deviations)
            if bound != bound and size == size:
                bound = np.inf
            tau = step.tolerance * size
            missed = not bound <= step.tolerance * (size - bound)
            log_z = top + math.log(weight)
            answer.bound[place, g] = np.float32(bound + _SMALLEST)
            answer.size[place, g] = np.float32(size)
            answer.missed[place, g] = 1 if missed else 0
            answer.log_z[place, g] = np.float32(log_z + origin)
            answer.spread[place, g] = np.float32(spread)
            if attempt == 0:
                theta = following_theta(facts[THETA], bound, tau)
                answer.theta[place, g] = np.float32(bound if bound != bound else theta)
            # A pass that follows starts from what this one found.
            facts[LOG_Z], facts[SPREAD] = log_z, spread
            if missed:
                finer = facts[THETA] * min(0.5, tau / bound / 2.0)
                last = attempt + 1 >= step.repairs
                facts[THETA] = 0.0 if last or finer != finer else finer
                work.wanted[attempt + 1, place, g] = 1

    return finish
