"""What a plan is, what it is made from, and the bits that it reads."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from alignedkv.analysis.scores import PositionScores, log_sum_exp
from alignedkv.errors import SpecError
from alignedkv.planes import PlaneLayout
from alignedkv.policy import PrecisionPolicy

#: theta_s / (chi theta): rows smaller than theta_s are sampled where chi theta would skip them.
SAMPLE_OVER_SKIP = 8.0
#: Standard deviations by which a log-sum-exp of inexact scores is lowered (theory.md, Lemma 11).
_LOG_Z_MARGIN = 5.0


class Decisions(StrEnum):
    """What decides whether a plane is read."""

    #: One pass: the score of the first plane decides about all planes, as in a kernel that loads
    #: a tile's refinements at once.
    FIRST_PLANE = "first_plane"
    #: Plane n + 1 is decided by the score that n planes give: fewer reads, one round trip each.
    EVERY_PLANE = "every_plane"
    #: As before with wider margins, and a plane that turns out not to be needed is not used:
    #: the settled rule (5.4), which a statistical bound wants.
    SETTLED = "settled"
    #: Nothing that the dither has touched: the same planes for all rows.
    FIXED = "fixed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Hint:
    """What a step knows of each query head beforehand.  A wrong hint costs bits, not truth.

    Attributes
    ----------
    log_z : float64 array [G]
        Log-sum-exp of the scores, natural logarithm, sink included.
    spread : float64 array [G]
        rho, the largest |o_j - value_mean_j|.
    """

    log_z: NDArray[np.float64]
    spread: NDArray[np.float64]


def previous_step_hint(scores: PositionScores) -> Hint:
    """The hint of a one-pass kernel: what an exact step at this position would have left."""
    return Hint(log_z=scores.log_z, spread=scores.spread)


def two_pass_hint(scores: PositionScores) -> Hint:
    """The hint of a kernel that reads all first planes before it decides.

    Notes
    -----
    theory.md 6, "Sharper, for planning": errors average out in the sum too.  The spread is not
    known after the first pass either; it comes from the previous step.
    """
    first = scores.planes[0]
    log_z = log_sum_exp(first, scores.sinks)
    weighted = np.exp(first - log_z[:, None]) * scores.score_deviation(1)
    spread_of_sum = np.sqrt((weighted**2).sum(axis=1))
    return Hint(log_z=log_z - np.log1p(_LOG_Z_MARGIN * spread_of_sum), spread=scores.spread)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecisionGroups:
    """Consecutive tokens that take the largest plane count among them.

    Attributes
    ----------
    keys, values : int
        Tokens of a group; groups start at multiples of it.
    value_rows : int
        Tokens whose first value plane is skipped only together; at least ``values``.
    """

    keys: int = 1
    values: int = 1
    value_rows: int = 1

    def __post_init__(self) -> None:
        if min(self.keys, self.values, self.value_rows) < 1:
            raise SpecError(f"{self}: give positive numbers of tokens")

    @classmethod
    def of(cls, tokens: int) -> DecisionGroups:
        """The same groups for keys, values and skipped rows."""
        return cls(keys=tokens, values=tokens, value_rows=tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """Thresholds of value rows as multiples of theta.

    Attributes
    ----------
    value : float
        Of the standard error of a value row that is read.
    row : float
        Of the size of a value row: a smaller one is skipped, or sampled.
    """

    value: float = 1.0
    row: float = 0.2

    @classmethod
    def of(cls, policy: PrecisionPolicy) -> Shares:
        """What the policy says: chi, or the larger threshold that sampling affords."""
        factor = SAMPLE_OVER_SKIP if policy.sampled else 1.0
        return cls(row=policy.skip_share * factor)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Planes read of every visible row, for one group of query heads.

    Attributes
    ----------
    decisions : Decisions
        How it was made: what may be claimed of its error depends on it.
    theta : float64 array [G]
        Absolute threshold of an addend's error, per query head; NaN for fixed plans.
    hint : Hint
        From which it was made.
    key_planes : int8 array [T]
        Key planes read, 1..N; 0 for rows that are used exactly.
    key_used : int8 array [G, T]
        Key planes that each head uses of them.
    value_planes : int8 array [T]
        Value planes read, 0..N; of a sampled row, if it is drawn.
    probability : float64 array [T]
        With which a value row is read: 0 where it is skipped, 1 or, of a sampled row, less.
    key_bits, value_bits : float64 arrays [T]
        Bits per channel read; of sampled values, in expectation.
    """

    decisions: Decisions
    theta: NDArray[np.float64]
    hint: Hint
    key_planes: NDArray[np.int8]
    key_used: NDArray[np.int8]
    value_planes: NDArray[np.int8]
    probability: NDArray[np.float64]
    key_bits: NDArray[np.float64]
    value_bits: NDArray[np.float64]

    @property
    def mean_bits(self) -> tuple[float, float]:
        """Bits per element read of keys and of values."""
        return float(self.key_bits.mean()), float(self.value_bits.mean())

    @property
    def read_fraction(self) -> float:
        """Bits read of keys and values as a share of 16 bits per element."""
        return float((self.key_bits + self.value_bits).mean() / 32)

    @property
    def is_sampled(self) -> NDArray[np.bool_]:
        """Value rows that are read with a probability between 0 and 1 [T]."""
        return (self.probability > 0) & (self.probability < 1)


def fixed_plan(scores: PositionScores, *, key_planes: int, value_planes: int) -> Plan:
    """The same planes for all rows, whatever the scores.

    Parameters
    ----------
    scores : PositionScores
    key_planes : int
        1 to the planes stored.
    value_planes : int
        0 to the planes stored.
    """
    if not (1 <= key_planes <= scores.keys.stored and 0 <= value_planes <= scores.values.stored):
        raise SpecError(
            f"{key_planes} key and {value_planes} value planes: give 1..{scores.keys.stored} and "
            f"0..{scores.values.stored}"
        )
    group, tokens = scores.exact.shape
    keys = np.where(scores.is_exact, 0, key_planes).astype(np.int8)
    values = np.where(scores.is_exact, 0, value_planes).astype(np.int8)
    probability = ((values > 0) | scores.is_exact).astype(np.float64)
    return Plan(
        decisions=Decisions.FIXED,
        theta=np.full(group, np.nan),
        hint=previous_step_hint(scores),
        key_planes=keys,
        key_used=np.broadcast_to(keys, (group, tokens)),
        value_planes=values,
        probability=probability,
        key_bits=bits_read(scores, keys, scores.keys.layout),
        value_bits=bits_read(scores, values, scores.values.layout) * probability,
    )


def bits_read(
    scores: PositionScores, planes: NDArray[np.int8], layout: PlaneLayout
) -> NDArray[np.float64]:
    """Bits per channel of rows read to ``planes`` planes, or in the input type [T]."""
    per_count = np.array([layout.bits(n) for n in range(len(layout) + 1)], np.float64)
    return np.where(scores.is_exact, scores.encoded.case.input_bits, per_count[planes])
