"""What a plan reads: scores, weights and the output, as a kernel would have them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from alignedkv.analysis.hot_loops.sums import (
    EXACT,
    SKIPPED,
    ValueRows,
    channel_deviations,
    weighted_rows,
)
from alignedkv.analysis.plan import Plan
from alignedkv.analysis.scores import (
    VALUE_ROUNDING,
    PositionScores,
    largest_of_rows,
    log_sum_exp,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """The hatted quantities of theory.md for one plan.

    Attributes
    ----------
    scores : PositionScores
    plan : Plan
    score : float64 array [G, T]
    score_deviation, score_error : float64 arrays [G, T]
        sigma_t and e_t + b_t of the planes used.
    log_z : float64 array [G]
    probability : float64 array [G, T]
        Weights of the rows; with a sink's they sum to 1.
    row_factor : float64 array [T]
        What a row's weight is multiplied by in the output: 0 or 1, or 1/pi for a drawn row.
    value_error : float64 array [T]
        Largest error of a channel of the value rows; the size of a skipped one.
    output : float64 array [G, D]
    """

    scores: PositionScores
    plan: Plan
    score: NDArray[np.float64]
    score_deviation: NDArray[np.float64]
    score_error: NDArray[np.float64]
    log_z: NDArray[np.float64]
    probability: NDArray[np.float64]
    row_factor: NDArray[np.float64]
    value_error: NDArray[np.float64]
    output: NDArray[np.float64]

    @property
    def spread(self) -> NDArray[np.float64]:
        """The output's largest distance from the mean of the values [G]."""
        mean = self.scores.encoded.value_mean
        return largest_of_rows(self.output - mean)

    def channel_sums(
        self,
        linear: NDArray[np.float64],
        square: NDArray[np.float64],
        slack: NDArray[np.float64],
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Sums of w (|v_tj - o_j| + slack_t) and of w (|v_tj - o_j| + slack_t)^2, v and o as read.

        Parameters
        ----------
        linear, square : float64 arrays [G, T]
            Weights w of the two sums.
        slack : float64 array [T]

        Returns
        -------
        two float64 arrays [G, D]
        """
        centre = np.ascontiguousarray(self.output - self.scores.encoded.value_mean)
        out_linear, out_square = np.zeros_like(centre), np.zeros_like(centre)
        rows = _rows_read(self.scores, self.plan, self.row_factor)
        channel_deviations(linear, square, centre, slack, rows, out_linear, out_square)
        return out_linear, out_square


def read(scores: PositionScores, plan: Plan, *, seed: int = 0) -> Reading:
    """Read what the plan says and attend.

    Parameters
    ----------
    scores : PositionScores
    plan : Plan
    seed : int
        Of the draws of sampled value rows.
    """
    used = np.maximum(plan.key_used, 1).astype(np.int64)[None] - 1
    counts = range(1, scores.keys.stored + 1)
    score = np.take_along_axis(scores.planes, used, axis=0)[0]
    deviation = np.stack([scores.score_deviation(n) for n in counts])
    error = np.stack([scores.score_error(n) for n in counts])
    log_z = log_sum_exp(score, scores.sinks)
    probability = np.exp(score - log_z[:, None])

    drawn = np.random.default_rng(seed).random(scores.tokens) < plan.probability
    row_factor = drawn / np.where(drawn, plan.probability, 1.0)
    centred_output = np.zeros((len(score), scores.encoded.case.head_dim))
    rows = _rows_read(scores, plan, row_factor)
    weighted_rows(probability * row_factor, rows, centred_output)
    rounding = np.where(scores.is_exact, 0.0, VALUE_ROUNDING * scores.values.unit)
    return Reading(
        scores=scores,
        plan=plan,
        score=score,
        score_deviation=np.take_along_axis(deviation, used, axis=0)[0],
        score_error=np.take_along_axis(error, used, axis=0)[0] + scores.base_error,
        log_z=log_z,
        probability=probability,
        row_factor=row_factor,
        value_error=scores.value_error(plan.value_planes) + rounding,
        output=scores.with_mean(centred_output, log_z),
    )


def _rows_read(scores: PositionScores, plan: Plan, row_factor: NDArray[np.float64]) -> ValueRows:
    values = scores.values
    bits = np.append(SKIPPED, values.unread_bits())
    unread = np.where(row_factor > 0, bits[plan.value_planes], SKIPPED)
    return ValueRows(
        words=values.words,
        unit=values.unit,
        table=values.dither,
        classes=values.classes,
        unread=np.where(scores.is_exact, EXACT, unread),
        exact=scores.value_rows,
        mean=scores.encoded.value_mean.astype(np.float64),
    )
