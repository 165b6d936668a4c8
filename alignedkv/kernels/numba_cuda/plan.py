"""Scores of a thread's token and the planes that they ask for: `reference_plan`.

A thread holds one token and the scores of its G heads, in float64 and less the head's BASE (unless
they are capped): what all tokens share is not rounded with each.  Comparisons are those of the
reference without its logarithms.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from alignedkv.kernels.numba_cuda.columns import BASE, LOG_Z, NORM1, NORM2, SPREAD, THETA
from alignedkv.kernels.numba_cuda.maths import at_most_zero
from alignedkv.kernels.numba_cuda.rows import device, loader, product_function
from alignedkv.kernels.sampling import DRAW_BITS
from alignedkv.kernels.spec import DecodeSpec
from alignedkv.policy import BoundKind

_ROOT_3 = math.sqrt(3.0)
_DRAWS = 2.0**DRAW_BITS


@device
def half_step(scale, gains, planes):
    """delta(n) of Lemma 1, n >= 1, from the row scale."""
    return 0.5 * scale / gains[planes - 1]


def gains_of(spec: DecodeSpec) -> tuple[float, ...]:
    """How much finer 1..N planes are than the first alone."""
    return tuple(2.0 ** spec.layout.gain(n) for n in range(1, spec.stored_planes + 1))


def score_functions(spec: DecodeSpec) -> tuple[Any, Any, Any]:
    """``score_first``, ``refine`` and ``score_exact`` of one token.

    All leave G scores in ``score``; the first two keep the products in ``dots``.
    """
    group, head_dim = spec.subgroup, spec.head_dim
    stored, softcap = spec.stored_planes, spec.softcap
    first, second = (product_function(spec, n) for n in (0, 1))
    third, fourth = (product_function(spec, min(n, stored - 1)) for n in (2, 3))
    query_of, row_of = loader(spec.query_dtype), loader(spec.row_dtype)

    @device
    def capped(score, cap):
        return cap * math.tanh(score / cap)

    @device
    def combine(scale, own, products, facts, cap, dots, score):
        for g in range(group):
            score[g] = scale * (dots[g] - products[g, own])
            if softcap:
                score[g] = capped(score[g] + facts[g, BASE], cap)

    @device
    def score_first(cache, address, scale, own, queries, products, facts, cap, dots, score):
        for g in range(group):
            dots[g] = 0.0
        first(cache.key_planes[0], address, queries, dots)
        combine(scale, own, products, facts, cap, dots, score)

    @device
    def refine(
        cache, address, begin, end, scale, own, queries, products, facts, cap, dots, score
    ):  # fmt: skip
        """Scores with planes ``begin`` to ``end`` as well, counted from 0 like arrays."""
        if begin == 1:
            second(cache.key_planes[1], address, queries, dots)
        if stored > 2:  # noqa: SIM102 - Numba prunes what is constant alone
            if begin <= 2 < end:
                third(cache.key_planes[2], address, queries, dots)
        if stored > 3:  # noqa: SIM102
            if begin <= 3 < end:
                fourth(cache.key_planes[3], address, queries, dots)
        combine(scale, own, products, facts, cap, dots, score)

    @device
    def score_exact(cache, home, slot, query, scaling, cap, score):
        for g in range(group):
            product, offset = 0.0, 0.0
            for i in range(head_dim):
                q = query_of(query[g, i])
                product += q * row_of(cache.exact_keys[home, slot, i])
                offset += q * np.float64(cache.key_mean[home, i])
            if softcap:
                score[g] = capped(scaling * product, cap)
            else:
                score[g] = scaling * (product - offset)

    return score_first, refine, score_exact


def plan_functions(spec: DecodeSpec, refine: Any) -> tuple[Any, Any, Any]:
    """``read_keys``, ``value_share`` and ``plan_values`` of one token.

    Parameters
    ----------
    refine : device function
        From `score_functions`.
    """
    group, stored, gains = spec.subgroup, spec.stored_planes, gains_of(spec)
    deterministic = spec.bound is BoundKind.DETERMINISTIC

    @device
    def planes_for(addend, theta):
        """`policy.planes_for`; theta = 0 asks for every plane, whatever the addend."""
        planes = 1
        for n in range(1, stored):
            if theta == 0.0 or addend > theta * gains[n - 1]:
                planes = n + 1
        return planes

    @device
    def likely_weight(score, facts, g, half, margin):
        """Largest weight that a score makes plausible."""
        deviation = margin * (facts[g, NORM2] * half / _ROOT_3)
        return math.exp(at_most_zero(score[g] + deviation - facts[g, LOG_Z]))

    @device
    def read_keys(
        cache, address, key_scale, size, own, queries, products, facts, step, dots, score, halves,
        finest,
    ):  # fmt: skip
        """Rule (6.2): planes read, from the first plane's scores, and the scores that they give.

        All heads use what is read: ``finest``, of the settled rule, is of no meaning here.
        """
        half, planes = 0.5 * key_scale, 1
        for g in range(group):
            if deterministic:
                error = facts[g, NORM1] * half
            else:
                error = facts[g, NORM2] * half / _ROOT_3
            weight = likely_weight(score, facts, g, half, step.margin)
            addend = weight * error * (size + facts[g, SPREAD])
            planes = max(planes, planes_for(addend, facts[g, THETA]))
        if planes > 1:
            refine(
                cache, address, 1, planes, key_scale, own, queries, products, facts, step.softcap,
                dots, score,
            )  # fmt: skip
        for g in range(group):
            halves[g] = half_step(key_scale, gains, planes)
        return planes

    @device
    def value_share(score, facts, half, size, margin, share):
        """Largest of pU a over the size below which a value row is skipped or sampled."""
        largest = 0.0
        for g in range(group):
            threshold = share * facts[g, THETA] if share > 0.0 else 0.0
            if threshold == 0.0:
                return np.inf
            weight = likely_weight(score, facts, g, half, margin)
            largest = max(largest, weight * size / threshold)
        return largest

    @device
    def plan_values(score, facts, halves, scale, margin):
        """Planes of a value row that is wanted, from the refined scores."""
        error = 0.5 * scale if deterministic else 0.5 * scale / _ROOT_3
        planes = 1
        for g in range(group):
            weight = likely_weight(score, facts, g, halves[g], margin)
            planes = max(planes, planes_for(weight * error, facts[g, THETA]))
        return planes

    return read_keys, value_share, plan_values


@device
def chance_of(share):
    """pi of a value row whose size is ``share < 1`` of theta_s: `sampling.chances` / 2^24."""
    return max(math.ceil(share * _DRAWS), 1.0) / _DRAWS
