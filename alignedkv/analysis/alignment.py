"""Precision alignment: how many planes of each row the sum can use.

A plane is read while the row's share of the output would otherwise err by more than theta, the same
absolute amount for all rows (theory.md, Theorem 10 and (6.2)).  Raising theta drops planes one by
one and never adds one, so each plane of each key row has *one* theta from which on it is left
unread.  Those thresholds are computed once; a plan for any theta is a comparison with them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from alignedkv.analysis.plan import (
    DecisionGroups,
    Decisions,
    Hint,
    Plan,
    Shares,
    bits_read,
    previous_step_hint,
    two_pass_hint,
)
from alignedkv.analysis.scores import PositionScores
from alignedkv.errors import SpecError
from alignedkv.policy import BoundKind, PrecisionPolicy, planes_for

#: A sampled row is drawn with at least this probability: one step of a 24-bit random number.
SMALLEST_PROBABILITY = 2.0**-24
_LOG2_E = math.log2(math.e)
_Number = TypeVar("_Number", bound=np.number[Any])


@dataclass(frozen=True, slots=True, kw_only=True)
class Alignment:
    """Rule (6.2) at one position, for all multiples of a reference theta at once.

    Attributes
    ----------
    scores : PositionScores
    policy : PrecisionPolicy
    decisions : Decisions
    groups : DecisionGroups
    hint : Hint
    theta : float64 array [G]
        Reference threshold of each query head.
    key_thresholds : float64 array [N - 1, T]
        log2 of the multiple from which on key plane n + 2 is left unread.
    use_thresholds : float64 array [N - 1, G, T] or None
        Of settled plans: from which on a head does not use it.
    value_weights : float64 array [N, T]
        log2 of the largest p^U / theta of the heads, from the first n + 1 key planes.
    """

    scores: PositionScores
    policy: PrecisionPolicy
    decisions: Decisions
    groups: DecisionGroups
    hint: Hint
    theta: NDArray[np.float64]
    key_thresholds: NDArray[np.float64]
    use_thresholds: NDArray[np.float64] | None
    value_weights: NDArray[np.float64]

    def key_planes(self, log2_multiple: float) -> NDArray[np.int8]:
        """Key planes read with theta times ``2^log2_multiple`` [T]."""
        read = 1 + (self.key_thresholds > log2_multiple).sum(axis=0, dtype=np.int8)
        return np.where(self.scores.is_exact, np.int8(0), read)

    def value_planes(
        self, key_planes: NDArray[np.int8], log2_multiple: float, shares: Shares
    ) -> tuple[NDArray[np.int8], NDArray[np.float64]]:
        """Value planes and the probability of reading each row [T].

        Parameters
        ----------
        key_planes : int8 array [T]
            From `key_planes`, for the same multiple.
        log2_multiple : float
        shares : Shares
        """
        scores, groups, values = self.scores, self.groups, self.scores.values
        level = np.maximum(key_planes, 1).astype(np.int64) - 1
        weight = np.take_along_axis(self.value_weights, level[None], axis=0)[0] - log2_multiple
        # After one plane a row errs by at most g/2; its largest number is half_range g.
        per_scale = math.log2(value_error_factor(self.policy) / (2 * shares.value))
        excess = weight + (values.log2_scale + per_scale)
        planes = planes_for(excess, values.layout, values.stored)
        if self.decisions is Decisions.FIRST_PLANE:
            weight = self.value_weights[0] - log2_multiple
        if shares.row:
            per_row = math.log2(values.layout.half_range / shares.row)
            size = weight + (values.log2_scale + per_row)
        else:
            size = np.full_like(weight, np.inf)  # nothing is too small, whatever theta
        if self.policy.sampled:
            # A row that deserves a second plane is too large to be left to chance.
            drawn = np.clip(np.exp2(np.minimum(size, 0)), SMALLEST_PROBABILITY, 1.0)
            probability = np.where((planes > 1) | scores.is_exact, 1.0, drawn)
            return np.where(scores.is_exact, np.int8(0), planes), probability
        wanted = self._group_max(size, max(groups.values, groups.value_rows)) > 0
        planes = np.where(wanted, self._group_max(planes, groups.values), np.int8(0))
        planes = np.where(scores.is_exact, np.int8(0), planes)
        return planes, ((planes > 0) | scores.is_exact).astype(np.float64)

    def plan(self, log2_multiple: float = 0.0, shares: Shares | None = None) -> Plan:
        """The plan for theta times ``2^log2_multiple``.

        Parameters
        ----------
        log2_multiple : float
        shares : Shares, optional
            Default: those of the policy.
        """
        scores = self.scores
        keys = self.key_planes(log2_multiple)
        values, probability = self.value_planes(
            keys, log2_multiple, Shares.of(self.policy) if shares is None else shares
        )
        used = np.broadcast_to(keys, scores.exact.shape)
        if self.use_thresholds is not None:
            used = _largest_used(self.use_thresholds > log2_multiple, keys)
        return Plan(
            decisions=self.decisions,
            theta=self.theta * 2.0**log2_multiple,
            hint=self.hint,
            key_planes=keys,
            key_used=used,
            value_planes=values,
            probability=probability,
            key_bits=bits_read(scores, keys, scores.keys.layout),
            value_bits=bits_read(scores, values, scores.values.layout) * probability,
        )

    def _group_max(self, per_token: NDArray[_Number], tokens: int) -> NDArray[_Number]:
        return group_max(per_token, tokens, self.scores.first)


def align(
    scores: PositionScores,
    policy: PrecisionPolicy,
    *,
    theta: NDArray[np.float64],
    decisions: Decisions | None = None,
    groups: DecisionGroups | None = None,
    hint: Hint | None = None,
) -> Alignment:
    """Thresholds of all planes of all visible rows.

    Parameters
    ----------
    scores : PositionScores
    policy : PrecisionPolicy
    theta : float64 array [G]
        Absolute threshold of an addend's error, per query head; any positive reference if a
        multiple is to be searched.
    decisions : Decisions, optional
        Default: settled for a statistical bound, else by every plane.
    groups : DecisionGroups, optional
        Default: every token for itself.
    hint : Hint, optional
        Default: of two passes; for settled plans, which may not look at this step's scores, of
        the previous step.

    Notes
    -----
    Addends of key rows: p^U sigma(n) R, of value rows: p^U delta(n)/sqrt 3, with p^U from the
    score plus ``policy.plan_margin`` standard deviations (of settled plans: plus z of them).  For
    a deterministic bound: p^U e(n) R and p^U delta(n).
    """
    statistical = policy.bound is BoundKind.STATISTICAL
    decisions = decisions or (Decisions.SETTLED if statistical else Decisions.EVERY_PLANE)
    groups = groups or DecisionGroups()
    if policy.sampled and max(groups.values, groups.value_rows) > 1:
        raise SpecError("sampled value rows are drawn one by one: give value groups of 1")
    settled = decisions is Decisions.SETTLED
    if hint is None:
        hint = previous_step_hint(scores) if settled else two_pass_hint(scores)
    margin = policy.plan_margin
    if settled:
        margin = policy.deviations(scores.encoded.case.head_dim, scores.encoded.case.tokens)
    with np.errstate(divide="ignore"):  # log2 of 0: nothing is ever read for such an addend
        log2_theta = np.log2(theta)[:, None]
        deviation = np.stack([scores.score_deviation(n + 1) for n in range(scores.keys.stored)])
        addend = np.log2(_key_addend(scores, policy, hint))
    upper = _log2_weight(scores.planes + margin * deviation, hint) - log2_theta

    thresholds = []
    for n in range(1, scores.keys.stored):
        if decisions is Decisions.FIRST_PLANE:
            weight = upper[0]
        elif settled:
            reach = margin * (deviation[n - 1] + 2 * deviation[n])
            weight = _log2_weight(scores.planes[n - 1] + reach, hint) - log2_theta
        else:
            weight = upper[n - 1]
        excess = (weight + addend).max(axis=0) - scores.keys.layout.gain(n)
        thresholds.append(group_max(excess, groups.keys, scores.first))
    # A plane is reached only through those before it.
    read = np.minimum.accumulate(np.reshape(thresholds, (-1, scores.tokens)), axis=0)
    use = None
    if settled:
        gains = [scores.keys.layout.gain(n) for n in range(1, scores.keys.stored)]
        use = upper[1:] + addend - np.reshape(gains, (-1, 1, 1))
        use = np.minimum(use, read[:, None])
    return Alignment(
        scores=scores,
        policy=policy,
        decisions=decisions,
        groups=groups,
        hint=hint,
        theta=theta,
        key_thresholds=read,
        use_thresholds=use,
        value_weights=upper.max(axis=1),
    )


def group_max(per_token: NDArray[_Number], tokens: int, first: int) -> NDArray[_Number]:
    """Give every token the maximum of its group; groups start at multiples of ``tokens``.

    Parameters
    ----------
    per_token : array [T]
    tokens : int
        Of a group.
    first : int
        Number of the first token in its sequence.
    """
    if tokens == 1:
        return per_token
    starts = np.arange(-(first % tokens), len(per_token), tokens)
    starts[0] = 0
    sizes = np.diff(np.append(starts, len(per_token)))
    return np.repeat(np.maximum.reduceat(per_token, starts), sizes)


def value_error_factor(policy: PrecisionPolicy) -> float:
    """What a half step is multiplied by for an addend's error: its deviation, or all of it."""
    return 1.0 if policy.bound is BoundKind.DETERMINISTIC else 3.0**-0.5


def _key_addend(scores: PositionScores, policy: PrecisionPolicy, hint: Hint) -> NDArray[np.float64]:
    """Error of a score after one plane times the size of what it weighs [G, T]."""
    deterministic = policy.bound is BoundKind.DETERMINISTIC
    error = scores.score_error(1) if deterministic else scores.score_deviation(1)
    return error * (scores.values.magnitude + hint.spread[:, None])


def _log2_weight(upper_scores: NDArray[np.float64], hint: Hint) -> NDArray[np.float64]:
    """log2 p^U of scores [..., G, T]."""
    return np.minimum((upper_scores - hint.log_z[:, None]) * _LOG2_E, 0.0)


def _largest_used(tested: NDArray[np.bool_], read: NDArray[np.int8]) -> NDArray[np.int8]:
    """Largest plane whose test holds, 1 if none, 0 where nothing is read [G, T]."""
    counts = np.arange(2, len(tested) + 2, dtype=np.int8)[:, None, None]
    largest: NDArray[np.int8] = np.where(tested, counts, np.int8(1)).max(axis=0, initial=1)
    return np.minimum(largest, read)
