"""What the user asks of precision, and the thresholds and plane counts that follow from it.

The plan rule stands here once, as NumPy; the reference uses it as it is, the kernels repeat it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from alignedkv.errors import SpecError
from alignedkv.planes import DEFAULT_LAYOUT, PlaneLayout

#: theta / tau at 4096 tokens from which feedback starts (theory.md 6, "Suggested default").
START_THETA = 2.0**-7.5
#: Share of the way to its aim that feedback moves theta in a step, in bits: it must average over
#: the scatter of neighbouring tokens, not follow it.
FEEDBACK_GAIN = 0.25
#: Bits below the tolerance at which feedback aims, per head: at the start; what a missed bound adds
#: and a kept one takes; the least and the most.  So about one step in 126 misses, however much a
#: head's tokens differ, and a head whose hints are steady wastes little.  More misses would save
#: bytes (SmolLM2, 2^-7: 26.2 % read at one in 26, 27.1 % so, repairs included), but on a GPU all
#: heads wait for the repair of one.
START_MARGIN = 1.0
MARGIN_RISE, MARGIN_FALL = 0.25, 0.002
MARGIN_RANGE = (0.15, 3.0)
#: Steps in which a margin falls from its start to its least, with a miss on the way: what is timed
#: before says nothing of a long decode, whose margins are narrower.
SETTLING_STEPS = math.ceil((START_MARGIN + MARGIN_RISE - MARGIN_RANGE[0]) / MARGIN_FALL)
#: Near rows: the first and the last of the attended tokens but the newest, whose scores a step
#: looks at before it plans.  They hold most of what changes from one query to the next.
NEAR_FIRST, NEAR_LAST = 4, 128
#: What a unit of (lambda ||q'|| g)^2 adds to log Z: half the variance of a score whose key has
#: entries of root mean square 7.5 g / sqrt 8, as a rotated row of 64 to 256 channels has.
NEAR_SPREAD = 7.5**2 / 16.0
#: Share of the way that the remembered weight of all other rows moves in a step; and the share of
#: the near rows' weight below which theirs is rounding.
REST_GAIN, LEAST_REST = 0.25, 2.0**-10
#: First rows that `output_policy` and `model_policy` keep exact.  A head that looks at the first
#: token alone has an output far below other value rows; what 16 bits of that row leave open may
#: exceed the tolerance of such an output, and then every plane of every row is read in vain.
#: SmolLM2 at 4096 tokens, 2^-7: 34.9 % read with four exact rows, 41.8 % without.
PRESET_EXACT_FIRST = 4
#: theta stays within these multiples of tau whatever feedback says.
THETA_RANGE = (2.0**-20, 4.0)


class BoundKind(StrEnum):
    """The three bounds; each is called by its name everywhere."""

    #: Theorem 5: always true, whatever the data and the plan.
    DETERMINISTIC = "deterministic"
    #: Theorem 7 and Corollary 8: fails with at most the stated probability over the dither.
    STATISTICAL = "statistical"
    #: Estimate 9: the tightest and the cheapest; not proved (theory.md 5.4 names every gap).
    ESTIMATE = "estimate"


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionPolicy:
    """How accurate an attention output has to be, and with which kind of bound.

    Attributes
    ----------
    tolerance : float
        Allowed error of an output relative to its largest component, in (0, 1).
    failure : float
        Probability with which a statistical bound (or an estimate, if its assumptions held) may
        fail, for one output of one head.
    bound : BoundKind
    key_layout, value_layout : PlaneLayout
    stored_planes : int or None
        Planes kept in memory (None: all).  A missing plane shows as a larger bound.
    dither_rows : int
        P, a power of two.  64 is enough in practice, 256 makes statistical bounds tighter
        (measurements.md 4).
    skip_share : float
        chi: a value row is not read when its weight times its size is below chi theta.
    plan_margin : float
        Standard deviations of the score that the plan adds to a weight it has only estimated.
        Costs or saves bytes; bounds are computed from what was read.
    sample_values : bool or None
        Value rows below theta_s are read with probability their size over theta_s and weighted by
        its inverse (sampling.md, Theorem S1) instead of being skipped: fewer bytes for the same
        bound, and draws that are the same for the same seed.  None: with an estimate only (see
        `sampled`).
    exact_first, exact_last : int
        Rows at either end that are also kept in the input type and used exactly (attention sinks,
        recent tokens).
    """

    tolerance: float = 2.0**-7
    failure: float = 1e-9
    bound: BoundKind = BoundKind.ESTIMATE
    key_layout: PlaneLayout = DEFAULT_LAYOUT
    value_layout: PlaneLayout = DEFAULT_LAYOUT
    stored_planes: int | None = None
    dither_rows: int = 64
    skip_share: float = 0.2
    plan_margin: float = 0.5
    sample_values: bool | None = None
    exact_first: int = 0
    exact_last: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "bound", _bound_kind(self.bound))
        for name in ("key_layout", "value_layout"):
            if isinstance(layout := getattr(self, name), str):
                object.__setattr__(self, name, PlaneLayout.parse(layout))
        _require(0 < self.tolerance < 1, "tolerance", self.tolerance, "a number in (0, 1)")
        _require(0 < self.failure < 1, "failure", self.failure, "a probability in (0, 1)")
        rows = self.dither_rows
        _require(rows >= 1 and not rows & (rows - 1), "dither_rows", rows, "a power of two")
        _require(self.skip_share >= 0, "skip_share", self.skip_share, "at least 0")
        _require(self.plan_margin >= 0, "plan_margin", self.plan_margin, "at least 0")
        _require(self.exact_first >= 0, "exact_first", self.exact_first, "at least 0")
        _require(self.exact_last >= 0, "exact_last", self.exact_last, "at least 0")
        most = min(len(self.key_layout), len(self.value_layout))
        if self.stored_planes is not None:
            _require(
                1 <= self.stored_planes <= most,
                "stored_planes",
                self.stored_planes,
                f"1 to {most}, the planes of both layouts",
            )
        if self.sample_values and self.bound is BoundKind.DETERMINISTIC:
            raise SpecError(
                "sample_values with a deterministic bound: a sampled row has no bound that never "
                "fails; take bound='estimate' or 'statistical', or sample_values=False"
            )

    @property
    def sampled(self) -> bool:
        """Whether small value rows are sampled: as asked, or as suits the bound."""
        if self.sample_values is None:
            return self.bound is BoundKind.ESTIMATE
        return self.sample_values

    def planes_stored(self, layout: PlaneLayout) -> int:
        """Planes of ``layout`` that are in memory."""
        return len(layout) if self.stored_planes is None else self.stored_planes

    def deviations(self, head_dim: int, tokens: int) -> float:
        """z: standard deviations at which the bound's failure probability is ``failure``.

        2D outcomes share it in the estimate (theory.md 5.4), 6D + 2NT + 1 in the theorem
        (Corollary 8); a deterministic bound has none, and z is 0.
        """
        if self.bound is BoundKind.DETERMINISTIC:
            return 0.0
        events = 2.0 * head_dim
        if self.bound is BoundKind.STATISTICAL:
            events = 6.0 * head_dim + 2.0 * len(self.key_layout) * tokens + 1.0
        return math.sqrt(2.0 * math.log(events / self.failure))

    def start_theta(self, tokens: int) -> float:
        """theta / tau for a head of which nothing is known yet.

        From three kinds of head only (theory.md 6): a start for feedback, not a guarantee.  A
        deterministic bound adds absolute errors, so its theta falls with T, not sqrt(T).
        """
        if self.bound is BoundKind.DETERMINISTIC:
            return START_THETA * min(1.0, 64.0 / tokens) * 16.0
        return START_THETA * math.sqrt(4096.0 / tokens)


def output_policy(**changes: object) -> PrecisionPolicy:
    """Outputs as accurate as bf16 FlashAttention's: tolerance 2^-7 (measurements.md 5)."""
    return _preset(2.0**-7, changes)


def model_policy(**changes: object) -> PrecisionPolicy:
    """Next-token distribution closer to exact than bf16 arithmetic: 2^-5 (measurements.md 7)."""
    return _preset(2.0**-5, changes)


def _preset(tolerance: float, changes: dict[str, object]) -> PrecisionPolicy:
    settings = {"tolerance": tolerance, "exact_first": PRESET_EXACT_FIRST, **changes}
    return PrecisionPolicy(**settings)  # type: ignore[arg-type]


def feedback_theta(
    theta: NDArray[np.float64],
    bound: NDArray[np.float64],
    tau: NDArray[np.float64],
    margin: NDArray[np.float64],
) -> NDArray[np.float64]:
    """The next step's theta from this step's bound.

    In bits, `FEEDBACK_GAIN` of the way to ``margin`` below the tolerance; at most a factor of 4 a
    step, and never outside `THETA_RANGE`.

    Parameters
    ----------
    theta, bound, tau : float array
        Absolute thresholds, bounds and allowed errors of the heads, any one shape.
    margin : float array
        Bits, from `feedback_margin`.
    """
    wanted = tau / np.maximum(bound, np.finfo(np.float64).tiny) * np.exp2(-margin)
    factor = np.clip(wanted**FEEDBACK_GAIN, 0.25, 4.0)
    lowest, highest = (ratio * tau for ratio in THETA_RANGE)
    following: NDArray[np.float64] = np.clip(theta * factor, lowest, highest)
    return following


def feedback_margin(margin: NDArray[np.float64], missed: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The margin after a step: wider where its bound missed, a little narrower where it held."""
    known = np.where(np.isnan(margin), START_MARGIN, margin)
    following: NDArray[np.float64] = np.clip(
        known + np.where(missed, MARGIN_RISE, -MARGIN_FALL), *MARGIN_RANGE
    )
    return following


def planes_for(excess: NDArray[np.floating], layout: PlaneLayout, stored: int) -> NDArray[np.int8]:
    """Rule (6.2): planes that bring an addend down to theta.

    Parameters
    ----------
    excess : float array
        log2(c / theta), c the addend's standard error after the first plane.
    layout : PlaneLayout
    stored : int
        Planes in memory.

    Returns
    -------
    int8 array
        1 to ``stored``: plane n + 1 is read iff n planes leave the addend above theta.
    """
    planes = np.ones(np.shape(excess), np.int8)
    for n in range(1, stored):
        planes += excess > layout.gain(n)
    return planes


def _bound_kind(kind: BoundKind | str) -> BoundKind:
    try:
        return BoundKind(kind)
    except ValueError:
        names = ", ".join(BoundKind)
        raise SpecError(f"bound {kind!r}: give one of {names}") from None


def _require(holds: bool, name: str, given: object, allowed: str) -> None:
    if not holds:
        raise SpecError(f"{name} {given!r}: give {allowed}")
