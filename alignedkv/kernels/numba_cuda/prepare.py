"""Before the splits: q', its norms, its products with the dither, and the hints.

One block a query head.  Everything is float64, and q' is rounded to float32 once; the products use
the rounded q', as the splits do.  Under a statistical bound log Z is expected to be what it was: a
hint from this step's near rows would depend on their dither (theory.md 5.3).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import cuda

from alignedkv.kernels.arithmetic import Arithmetic
from alignedkv.kernels.numba_cuda.columns import (
    BASE,
    LOG_Z,
    NEAR,
    NORM1,
    NORM2,
    OFFSET,
    SHIFT,
    SPREAD,
    THETA,
)
from alignedkv.kernels.numba_cuda.hints import near_function, told_rest
from alignedkv.kernels.numba_cuda.maths import is_finite, log_add
from alignedkv.kernels.numba_cuda.rows import loader
from alignedkv.kernels.reference_plan import ENCODER_BUTTERFLY, ENCODER_DIGITS
from alignedkv.kernels.spec import DecodeSpec
from alignedkv.planes import DITHER_FRACTION_BITS
from alignedkv.policy import NEAR_SPREAD, BoundKind
from alignedkv.transform import hadamard_block


def prepare_kernel(spec: DecodeSpec, threads: int, arithmetic: Arithmetic) -> Any:
    """``prepare[places, G](cache, asked, step, work, answer)``."""
    head_dim, channels = spec.head_dim, spec.channels
    stored, classes, softcap = spec.stored_planes, spec.dither_rows, spec.softcap
    subgroups = spec.subgroups
    block = hadamard_block(channels)
    load = loader(spec.query_dtype)
    unit = 2.0**-spec.layout.scale_shift
    dither_unit = unit * 2.0**-DITHER_FRACTION_BITS
    butterfly_error = ENCODER_BUTTERFLY * (math.log2(block) + 1.0) * math.sqrt(channels) * unit
    digits_error = (2.0 ** -(DITHER_FRACTION_BITS + 1) + ENCODER_DIGITS) * unit
    arithmetic_error = arithmetic.score_norm1
    settled = spec.bound is BoundKind.STATISTICAL
    look_near = near_function(spec, threads)

    def prepare(cache, asked, step, work, answer):
        place, g, lane = cuda.blockIdx.x, cuda.blockIdx.y, cuda.threadIdx.x
        home = place // subgroups
        turned = cuda.shared.array(channels, np.float64)
        for i in range(lane, channels, threads):
            turned[i] = 0.0
            if i < head_dim:
                scaled = load(asked.query[place, g, i]) * np.float64(cache.balance[home, i])
                turned[i] = step.scaling * scaled * np.float64(cache.signs[i])
        cuda.syncthreads()
        distance = 1
        while distance < block:
            for pair in range(lane, channels // 2, threads):
                low = pair // distance * (2 * distance) + pair % distance
                a, b = turned[low], turned[low + distance]
                turned[low], turned[low + distance] = a + b, a - b
            cuda.syncthreads()
            distance *= 2

        if lane == 0:
            norm1, square, offset = 0.0, 0.0, 0.0
            for i in range(channels):
                norm1 += abs(turned[i])
                square += turned[i] * turned[i]
            for i in range(head_dim):
                offset += load(asked.query[place, g, i]) * np.float64(cache.key_mean[home, i])
            norm2 = math.sqrt(square)
            base = step.scaling * offset
            facts = work.facts[place, g]
            facts[BASE], facts[NORM1], facts[NORM2] = base, norm1, norm2
            facts[SHIFT] = butterfly_error * norm2 + (digits_error + arithmetic_error) * norm1
            log_z = np.float64(asked.log_z[place, g])
            spread = np.float64(asked.spread[place, g])
            theta = np.float64(asked.theta[place, g])
            # What is not a number says nothing, and then everything is read.
            facts[LOG_Z] = log_z - base if log_z == log_z else -np.inf
            facts[SPREAD] = spread if is_finite(spread) else 0.0
            facts[THETA] = theta if theta == theta else 0.0
            for attempt in range(step.repairs + 2):
                work.wanted[attempt, place, g] = 1 if attempt == 0 else 0
            if place % subgroups == 0 and g == 0:
                for n in range(stored):
                    answer.reads[home, 0, n] = 0
                    answer.reads[home, 1, n] = 0
            if place == 0 and g == 0:
                answer.step[0] = asked.step[0] + np.uint32(1)
        cuda.syncthreads()

        for i in range(lane, channels, threads):
            rounded = np.float32(turned[i])
            work.queries[place, g, i] = rounded
            turned[i] = np.float64(rounded)
        cuda.syncthreads()
        for own in range(lane, classes, threads):
            product = 0.0
            for i in range(channels):
                product += turned[i] * np.float64(cache.dither[0, own, i])
            work.products[place, g, own] = product * dither_unit

        if not settled:
            cuda.syncthreads()
            mine = slice(g, g + 1)
            facts = work.facts[place, mine]
            near, square = look_near(
                cache, home, step, work.queries[place, mine], work.products[place, mine], facts
            )
            if lane == 0:
                if softcap:
                    offset = step.softcap * math.tanh(facts[0, BASE] / step.softcap)
                else:
                    offset = NEAR_SPREAD * facts[0, NORM2] * facts[0, NORM2] * square
                expected = log_add(near, told_rest(asked.rest[place, g]) + offset)
                facts[0, NEAR], facts[0, OFFSET] = near, offset
                facts[0, LOG_Z] = expected if expected == expected else -np.inf

    return prepare
