"""The cheapest plan that meets a tolerance: bisection over theta, as an offline analysis can do it.

The search uses the exact p and o, the plan's certificate does not: what the search returns has been
certified from what the plan reads.  For a deterministic bound or an estimate the key rows' part of
the bound is known for every theta after one pass over the rows (`KeyErrorTable`), because each
plane of each row has one theta from which on it is left unread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from alignedkv.analysis.alignment import Alignment, align
from alignedkv.analysis.bound_sums import growth, squared_growth
from alignedkv.analysis.certificate import Certificate, certify
from alignedkv.analysis.hot_loops.sums import threshold_tables
from alignedkv.analysis.plan import (
    DecisionGroups,
    Decisions,
    Hint,
    Plan,
    Shares,
    bits_read,
    fixed_plan,
)
from alignedkv.analysis.sampling import bennett_bound, sampled_sums
from alignedkv.analysis.scores import PositionScores
from alignedkv.policy import BoundKind, PrecisionPolicy

#: log2 of the multiples of tau among which theta is searched.
THETA_GRID = np.arange(-24.0, 4.0, 1 / 32)
#: Shares tried, per kind of bound and for sampled rows. Key addends are sized with R in place of
#: |v - o|, and class sums of keys grow faster than those of values: value rows balance that.
SKIPPED_SHARES = {
    BoundKind.ESTIMATE: tuple(Shares(value=0.6, row=row) for row in (0.5, 0.2, 0.06, 0.02)),
    BoundKind.STATISTICAL: tuple(Shares(value=4.0, row=row) for row in (1.0, 2.0, 4.0)),
    BoundKind.DETERMINISTIC: tuple(Shares(value=1.0, row=row) for row in (1.0, 0.5)),
}
SAMPLED_SHARES = tuple(Shares(value=v, row=row) for v in (0.5, 1.0) for row in (0.25, 0.5, 1.0))
#: The certificate uses what was read where the search used exact numbers; theta is lowered by this
#: many steps at a time until the certificate agrees.
_RETREAT_STEPS = 3
_MAX_RETREATS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """A plan and its certificate.

    Attributes
    ----------
    plan : Plan
    certificate : Certificate
    log2_multiple : float
        log2(theta / tau), tau the tolerance times the size of the output.
    shares : Shares
    """

    plan: Plan
    certificate: Certificate
    log2_multiple: float
    shares: Shares


def search_plan(
    scores: PositionScores,
    policy: PrecisionPolicy,
    *,
    decisions: Decisions | None = None,
    groups: DecisionGroups | None = None,
    hint: Hint | None = None,
    shares: Sequence[Shares] | None = None,
    seed: int = 0,
) -> SearchResult:
    """Search the largest theta whose bound meets the tolerance for every head of the group.

    Parameters
    ----------
    scores : PositionScores
    policy : PrecisionPolicy
    decisions, groups, hint
        As in `align`.
    shares : sequence of Shares, optional
        Those tried; the cheapest plan wins.
    seed : int
        Of the draws of sampled value rows.

    Returns
    -------
    SearchResult
        Where no theta meets the tolerance, all stored planes: its certificate says ``missed``.

    Notes
    -----
    Of a statistical bound the search tries some dozens of settled plans and keeps the best: the
    failure probability is that of one plan times their number. A run-time step has one theta.
    """
    tau = np.maximum(policy.tolerance * scores.size, np.finfo(np.float64).tiny)
    alignment = align(scores, policy, theta=tau, decisions=decisions, groups=groups, hint=hint)
    if shares is None:
        shares = SAMPLED_SHARES if policy.sampled else SKIPPED_SHARES[policy.bound]
    trial: _Trial
    if policy.bound is BoundKind.STATISTICAL:
        trial = _Certified(alignment=alignment, seed=seed)
    else:
        with np.errstate(over="ignore", invalid="ignore"):
            table = KeyErrorTable.of(alignment)
        trial = _Foreseen(alignment=alignment, table=table, tau=tau)
    cheapest, found = np.inf, None
    for share in shares:
        # Where a bound overflows it meets no tolerance, and finer planes are tried.
        with np.errstate(over="ignore", invalid="ignore"):
            step, cost = _bisect(trial, share, cheapest)
        if step is not None:
            cheapest, found = cost, (step, share)
    if found is not None:
        step, share = found
        for lowered in range(step, max(step - _MAX_RETREATS * _RETREAT_STEPS, -1), -_RETREAT_STEPS):
            plan = alignment.plan(THETA_GRID[lowered], share)
            certificate = certify(scores, plan, policy, seed=seed)
            if not certificate.missed.any():
                return SearchResult(
                    plan=plan,
                    certificate=certificate,
                    log2_multiple=float(THETA_GRID[lowered]),
                    shares=share,
                )
    plan = fixed_plan(scores, key_planes=scores.keys.stored, value_planes=scores.values.stored)
    return SearchResult(
        plan=plan,
        certificate=certify(scores, plan, policy, seed=seed),
        log2_multiple=-np.inf,
        shares=shares[0],
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyErrorTable:
    """The key rows' part of a bound for every theta of a grid, per channel [thetas, G, D].

    Attributes
    ----------
    linear
        Sums of w |v_tj - o_j|: w = p sigma^2, or p phi(e) for a deterministic bound.
    square
        Sums of p^2 omega^2 (v_tj - o_j)^2.
    """

    linear: NDArray[np.float64]
    square: NDArray[np.float64]

    @classmethod
    def of(cls, alignment: Alignment) -> KeyErrorTable:
        """One pass over the value rows, for the multiples of theta in `THETA_GRID`."""
        scores = alignment.scores
        relative = scores.exact - scores.log_z[:, None]
        linear, square = [], []
        for n in range(1, scores.keys.stored + 1):
            variance = scores.score_deviation(n) ** 2
            if alignment.policy.bound is BoundKind.DETERMINISTIC:
                linear.append(growth(relative, scores.score_error(n) + scores.base_error))
                square.append(np.zeros_like(relative))
            else:
                linear.append(scores.probability * variance)
                square.append(squared_growth(relative, variance))
        # What is added where plane n + 1 goes unread; the last error is there at every theta.
        steps = [
            np.stack([*(a - b for a, b in pairwise(sums)), sums[-1]]) for sums in (linear, square)
        ]
        bins = np.zeros((scores.keys.stored, scores.tokens), np.int64)
        bins[:-1] = np.searchsorted(THETA_GRID, alignment.key_thresholds)
        centre = scores.output
        tables = [np.zeros((len(THETA_GRID) + 1, *centre.shape)) for _ in range(2)]
        threshold_tables(bins, steps[0], steps[1], centre, scores.value_rows, tables[0], tables[1])
        # In place, and without the last slot: planes that are read at every theta of the grid.
        linear_sums, square_sums = (np.cumsum(t, axis=0, out=t)[:-1] for t in tables)
        return cls(linear=linear_sums, square=square_sums)


class _Trial(Protocol):
    """A plan of one theta of the grid: whether it meets the tolerance, and the bits it reads."""

    def __call__(self, step: int, shares: Shares) -> tuple[bool, float]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _Certified:
    """By the certificate itself."""

    alignment: Alignment
    seed: int

    def __call__(self, step: int, shares: Shares) -> tuple[bool, float]:
        plan = self.alignment.plan(THETA_GRID[step], shares)
        certificate = certify(self.alignment.scores, plan, self.alignment.policy, seed=self.seed)
        return not certificate.missed.any(), sum(plan.mean_bits)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Foreseen:
    """By the bound with exact p and o in place of what would be read."""

    alignment: Alignment
    tau: NDArray[np.float64]
    table: KeyErrorTable

    def __call__(self, step: int, shares: Shares) -> tuple[bool, float]:
        alignment, scores = self.alignment, self.alignment.scores
        keys = alignment.key_planes(THETA_GRID[step])
        values, probability = alignment.value_planes(keys, THETA_GRID[step], shares)
        bits = bits_read(scores, keys, scores.keys.layout)
        bits += bits_read(scores, values, scores.values.layout) * probability
        error = scores.value_error(values)
        if alignment.policy.bound is BoundKind.DETERMINISTIC:
            bound = self._deterministic(step, keys, error)
        else:
            bound = self._estimate(step, error, probability)
        return bool((bound <= self.tau).all()), float(bits.mean())

    def _deterministic(
        self, step: int, keys: NDArray[np.int8], error: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        scores = self.alignment.scores
        level = np.maximum(keys, 1)
        score_error = (
            scores.base_error
            + np.stack([scores.score_error(n + 1) for n in range(scores.keys.stored)])[
                level - 1, :, np.arange(scores.tokens)
            ].T
        )
        relative = scores.exact - scores.log_z[:, None]
        grown = growth(relative, score_error)
        values = scores.probability @ error
        sink = np.exp(scores.sinks - scores.log_z)
        shrunk = np.exp(relative - score_error).sum(axis=1) + sink
        deviation = self.table.linear[step].max(axis=1) + grown @ error
        bound: NDArray[np.float64] = values + (deviation + grown.sum(axis=1) * values) / shrunk
        return bound

    def _estimate(
        self, step: int, error: NDArray[np.float64], probability: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        scores, policy = self.alignment.scores, self.alignment.policy
        p, skipped = scores.probability, probability == 0
        gaussian = p**2 @ np.where(skipped, 0.0, error**2 / 3)
        variance, largest = sampled_sums(p, scores.values.largest_shown, probability)
        random = bennett_bound(
            self.table.square[step] + gaussian[:, None],
            variance[:, None],
            largest[:, None],
            policy.deviations(scores.encoded.case.head_dim, scores.encoded.case.tokens),
        )
        per_channel = random + self.table.linear[step]
        bound: NDArray[np.float64] = per_channel.max(axis=1) + p @ np.where(skipped, error, 0.0)
        return bound


def _bisect(trial: _Trial, shares: Shares, cheapest: float) -> tuple[int | None, float]:
    """Largest theta that meets the tolerance and reads less than ``cheapest``: step and bits."""
    found, cost_found = None, cheapest
    low, high = 0, len(THETA_GRID)
    while low < high:
        step = (low + high) // 2
        meets, cost = trial(step, shares)
        if meets and cost < cheapest:
            found, cost_found = step, cost
        # A plan that is not cheaper cannot win, whatever its bound: look at larger theta.
        if meets or cost >= cheapest:
            low = step + 1
        else:
            high = step
    return found, cost_found
