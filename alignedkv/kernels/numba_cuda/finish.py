"""After the splits: merge them, bound the output, and say whether the KV head is read again.

One block a query head: `reference_bounds.merge` and the end of `reference.decode`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import cuda

from alignedkv.kernels.arithmetic import Arithmetic
from alignedkv.kernels.numba_cuda.block import larger_or_nan, reduce_function
from alignedkv.kernels.numba_cuda.bounds import bound_function
from alignedkv.kernels.numba_cuda.columns import (
    BASE,
    CLASS_SUMS,
    LOG_Z,
    NEAR,
    OFFSET,
    SPREAD,
    THETA,
    WEIGHT,
)
from alignedkv.kernels.numba_cuda.hints import (
    next_margin,
    next_rest,
    next_theta,
    told_margin,
    told_rest,
)
from alignedkv.kernels.numba_cuda.rows import device, rounder, token_range
from alignedkv.kernels.numba_cuda.sums import combine_functions, count_sums
from alignedkv.kernels.spec import DecodeSpec
from alignedkv.policy import BoundKind

_SMALLEST = 2.0**-149


def finish_kernel(spec: DecodeSpec, threads: int, arithmetic: Arithmetic) -> Any:
    """``finish[places, G](cache, asked, step, work, answer, attempt)``."""
    group, subgroups = spec.subgroup, spec.subgroups
    head_dim, columns = spec.head_dim, count_sums(spec)
    softcap, sinks = spec.softcap, spec.sinks
    settled = spec.bound is BoundKind.STATISTICAL
    rows = spec.dither_rows if settled else 1
    rescaled, combined = combine_functions(spec)
    bound_of = bound_function(spec, arithmetic.accumulation)
    rounded = rounder(spec.query_dtype)
    largest = reduce_function(3, threads, larger_or_nan)

    @device
    def tell_nothing(asked, answer, place, g, facts, log_z):
        """The answer of a sequence without tokens."""
        answer.bound[place, g] = answer.size[place, g] = answer.spread[place, g] = 0.0
        answer.missed[place, g] = 0
        answer.log_z[place, g] = np.float32(log_z)
        answer.rest[place, g] = np.float32(told_rest(asked.rest[place, g]))
        answer.theta[place, g] = np.float32(facts[THETA])
        answer.margin[place, g] = np.float32(told_margin(asked.margin[place, g]))

    @device
    def feed_back(asked, answer, place, g, facts, bound, tau, missed, log_z):
        """Hints for the next step, from the first pass: `reference_hints`."""
        theta = facts[THETA]
        margin = told_margin(asked.margin[place, g])
        rest = told_rest(asked.rest[place, g])
        if 0.0 < tau < np.inf:
            margin = next_margin(margin, missed)
            theta = next_theta(theta, bound, tau, margin)
        if not settled:
            rest = next_rest(rest, facts[NEAR], facts[OFFSET], log_z)
        answer.theta[place, g] = np.float32(theta)
        answer.margin[place, g] = np.float32(margin)
        answer.rest[place, g] = np.float32(rest)

    @device
    def merge(work, place, g, top, sums, classes):
        """Sums of all splits, each thread its columns and its classes."""
        splits = work.tops.shape[1]
        for k in range(cuda.threadIdx.x, columns, threads):
            total = 0.0
            for part in range(splits):
                factor = math.exp(work.tops[place, part, g] - top)
                share = rescaled(k, work.sums[place, part, g, k], factor)
                total = combined(k, total, share)
            sums[k] = total
        if settled:
            for own in range(cuda.threadIdx.x, rows, threads):
                for k in range(CLASS_SUMS):
                    total = 0.0
                    for part in range(splits):
                        factor = math.exp(work.tops[place, part, g] - top)
                        total += factor * work.classes[place, part, g, k, own]
                    classes[k, own] = total

    def finish(cache, asked, step, work, answer, attempt):
        place, g, lane = cuda.blockIdx.x, cuda.blockIdx.y, cuda.threadIdx.x
        home = place // subgroups
        wanted = 0
        for member in range(group):
            wanted |= work.wanted[attempt, place, member]
        if wanted == 0:
            return
        sums = cuda.shared.array(columns, np.float64)
        classes = cuda.shared.array((CLASS_SUMS, rows), np.float64)
        scratch = cuda.shared.array((3, threads), np.float64)
        facts = work.facts[place, g]
        origin = 0.0 if softcap else facts[BASE]
        logit = -np.inf
        if sinks:
            head = place % (cache.kv_heads * subgroups) * group + g
            logit = np.float64(asked.sinks[head]) - origin
        start, length = token_range(cache, home, step.window)
        if start == length:
            for channel in range(lane, head_dim, threads):
                answer.output[place, g, channel] = rounded(0.0)
            if lane == 0:
                tell_nothing(asked, answer, place, g, facts, logit + origin)
            return

        splits = work.tops.shape[1]
        top = logit
        for part in range(splits):
            top = max(top, work.tops[place, part, g])
        merge(work, place, g, top, sums, classes)
        cuda.syncthreads()
        sink = math.exp(logit - top)
        weight = sums[WEIGHT] + sink
        sink /= weight

        if settled:
            for own in range(lane, rows, threads):
                for k in range(CLASS_SUMS):
                    classes[k, own] /= weight
        scratch[0, lane] = scratch[1, lane] = scratch[2, lane] = 0.0
        for channel in range(lane, head_dim, threads):
            value = 0.0
            for part in range(splits):
                factor = math.exp(work.tops[place, part, g] - top)
                value += factor * work.outputs[place, part, g, channel]
            mean = np.float64(cache.value_mean[home, channel])
            value = value / weight + (1.0 - sink) * mean
            answer.output[place, g, channel] = rounded(value)
            scratch[0, lane] = larger_or_nan(0, scratch[0, lane], abs(value))
            scratch[1, lane] = larger_or_nan(1, scratch[1, lane], abs(value - mean))
            scratch[2, lane] = max(scratch[2, lane], abs(mean))
        largest(scratch)
        if lane == 0:
            size, spread, mean_size = scratch[0, 0], scratch[1, 0], scratch[2, 0]
            for k in range(columns):
                sums[k] = rescaled(k, sums[k], 1.0 / weight)
            bound = bound_of(sums, classes, sink, facts[SPREAD], spread, mean_size, step)
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
                feed_back(asked, answer, place, g, facts, bound, tau, missed, log_z)
            # A pass that follows starts from what this one found, unless that depends on the
            # dither and must not.
            if not settled:
                facts[LOG_Z], facts[SPREAD] = log_z, spread
            if missed:
                finer = facts[THETA] * min(0.5, tau / bound / 2.0)
                last = attempt + 1 >= step.repairs
                facts[THETA] = 0.0 if last or finer != finer else finer
                work.wanted[attempt + 1, place, g] = 1

    return finish
