"""Scores at one query position: exact, and as 1, 2, ... planes tell them, with their errors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from alignedkv.analysis.encoding import EncodedCase, StoredRows
from alignedkv.analysis.hot_loops.sums import prefix_products, weighted_exact_rows
from alignedkv.planes import DITHER_FRACTION_BITS

#: Rounding in the encoder, per unit f and stage of the butterfly: (3.1) of theory.md.
_STAGE_ROUNDING = 0.002
#: Rounding of x/f and of its sum with the dither, in units f: (3.1).
_STEP_ROUNDING = 2.0**-8
#: Share of a unit f by which the encoder's rounding can move a value: theory.md 2.
VALUE_ROUNDING = 0.01


@dataclass(frozen=True, kw_only=True)
class PositionScores:
    """What one query position sees of an encoded case.  T counts its visible tokens here.

    Attributes
    ----------
    encoded : EncodedCase
    index : int
        Of the position in the case.
    first, end : int
        Visible tokens ``first <= t < end`` of the case.
    exact : float64 array [G, T]
        Scores of the exact rows, scaled and capped.
    planes : float64 array [N, G, T]
        Scores as the first 1, ..., N planes tell them; those of exactly kept rows are exact.
    one_norm, two_norm : float64 arrays [G]
        |scaling| ||q'||_1 and |scaling| ||q'||_2.
    is_exact : bool array [T]
        Rows that are also kept in the input type.

    Notes
    -----
    Lemma 3 of theory.md.  A soft cap is 1-Lipschitz: it leaves every error bound true.
    """

    encoded: EncodedCase
    index: int
    first: int
    end: int
    exact: NDArray[np.float64]
    planes: NDArray[np.float64]
    one_norm: NDArray[np.float64]
    two_norm: NDArray[np.float64]
    is_exact: NDArray[np.bool_]

    @property
    def position(self) -> int:
        """Token number of the query."""
        return int(self.encoded.case.positions[self.index])

    @property
    def tokens(self) -> int:
        """T, visible tokens."""
        return self.end - self.first

    @cached_property
    def keys(self) -> StoredRows:
        """Stored keys of the visible tokens."""
        return self.encoded.keys.span(self.first, self.end)

    @cached_property
    def values(self) -> StoredRows:
        """Stored values of the visible tokens."""
        return self.encoded.values.span(self.first, self.end)

    @cached_property
    def value_rows(self) -> NDArray[np.float32]:
        """Exact values of the visible tokens [T, D]."""
        return self.encoded.value_rows[self.first : self.end]

    @property
    def sinks(self) -> NDArray[np.float64]:
        """Sink logits [G], -inf where there are none."""
        sinks = self.encoded.case.sinks
        return np.full(len(self.exact), -np.inf) if sinks is None else sinks

    @cached_property
    def log_z(self) -> NDArray[np.float64]:
        """Exact log-sum-exp of the scores, sink included [G]."""
        return log_sum_exp(self.exact, self.sinks)

    @cached_property
    def probability(self) -> NDArray[np.float64]:
        """Exact p [G, T]."""
        return np.exp(self.exact - self.log_z[:, None])

    @cached_property
    def output(self) -> NDArray[np.float64]:
        """Exact attention output o [G, D]; a sink has the value 0."""
        total = np.zeros((len(self.exact), self.encoded.case.head_dim))
        weighted_exact_rows(self.probability, self.value_rows, total)
        return total

    @cached_property
    def size(self) -> NDArray[np.float64]:
        """Largest |o_j| [G]: what a tolerance is relative to."""
        return largest_of_rows(self.output)

    @cached_property
    def spread(self) -> NDArray[np.float64]:
        """rho, the largest |o_j - value_mean_j| [G]."""
        return largest_of_rows(self.output - self.encoded.value_mean)

    def with_mean(
        self, centred_output: NDArray[np.float64], log_z: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Output of a sum of centred values: a sink takes its share of the mean away [G, D]."""
        rest = -np.expm1(np.minimum(self.sinks - log_z, 0.0))
        mean: NDArray[np.float64] = rest[:, None] * self.encoded.value_mean.astype(np.float64)
        return centred_output + mean

    def score_error(self, planes: int) -> NDArray[np.float64]:
        """e_t(n), (3.2): largest error of a score [G, T]."""
        return self.one_norm[:, None] * self._key_half_step(planes)

    def score_deviation(self, planes: int) -> NDArray[np.float64]:
        """sigma_t(n), (3.3): sub-Gaussian scale of a score's error [G, T]."""
        return self.two_norm[:, None] * self._key_half_step(planes) / math.sqrt(3.0)

    @cached_property
    def base_error(self) -> NDArray[np.float64]:
        """b_t, (3.1): bound of what is not random in a score's error [G, T]."""
        transform = self.encoded.transform
        stages = math.log2(transform.block) + 1
        channels = len(transform.signs)
        per_unit = (
            2.0 ** (-DITHER_FRACTION_BITS - 1) + _STEP_ROUNDING
        ) * self.one_norm + _STAGE_ROUNDING * stages * math.sqrt(channels) * self.two_norm
        return per_unit[:, None] * np.where(self.is_exact, 0.0, self.keys.unit)

    def value_error(self, planes: NDArray[np.integer]) -> NDArray[np.float64]:
        """Largest error of a channel of each value row after ``planes[t]`` planes [T]."""
        index = np.asarray(planes, np.int64)[None]
        chosen: NDArray[np.float64] = np.take_along_axis(self._value_steps, index, axis=0)[0]
        return chosen

    @cached_property
    def _value_steps(self) -> NDArray[np.float64]:
        values = self.values
        steps = [values.magnitude, *(values.half_step(n + 1) for n in range(values.stored))]
        return np.where(self.is_exact, 0.0, np.stack(steps))

    @property
    def value_bias(self) -> NDArray[np.float64]:
        """What is not random in a value row's error, (5.5) [T]."""
        return self.values.unit * (2.0 ** (-DITHER_FRACTION_BITS - 1) + VALUE_ROUNDING)

    def _key_half_step(self, planes: int) -> NDArray[np.float64]:
        return np.where(self.is_exact, 0.0, self.keys.half_step(planes))


def score_position(encoded: EncodedCase, index: int) -> PositionScores:
    """All scores of one query position.

    Parameters
    ----------
    encoded : EncodedCase
    index : int
        Of the position in ``encoded.case.positions``.
    """
    case, policy = encoded.case, encoded.policy
    first, end = case.visible(index)
    query = case.query[:, index].astype(np.float64)
    transform = encoded.transform
    rotated = transform.exact_queries(query)
    stored = encoded.keys.span(first, end)

    exact = query @ case.key[first:end].T.astype(np.float64)
    products = np.empty((stored.stored, case.group, end - first))
    prefix_products(
        stored.words,
        stored.unit,
        rotated,
        np.ascontiguousarray(stored.dither @ rotated.T),
        stored.classes,
        stored.unread_bits(),
        products,
    )
    products += transform.offsets(query, case.tokens)[:, first:end]
    age = np.arange(end - first)
    is_exact = (age < policy.exact_first) | (age >= len(age) - policy.exact_last)
    products[:, :, is_exact] = exact[:, is_exact]
    return PositionScores(
        encoded=encoded,
        index=index,
        first=first,
        end=end,
        exact=_scaled(exact, case.scaling, case.softcap),
        planes=_scaled(products, case.scaling, case.softcap),
        one_norm=abs(case.scaling) * np.abs(rotated).sum(axis=1),
        two_norm=abs(case.scaling) * np.linalg.norm(rotated, axis=1),
        is_exact=is_exact,
    )


def largest_of_rows(outputs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Largest |o_j| of each head [G]."""
    largest: NDArray[np.float64] = np.abs(outputs).max(axis=1)
    return largest


def log_sum_exp(scores: NDArray[np.float64], sinks: NDArray[np.float64]) -> NDArray[np.float64]:
    """Log-sum-exp of scores [G, T] and sink logits [G]."""
    largest = np.maximum(scores.max(axis=1), sinks)
    total = np.exp(scores - largest[:, None]).sum(axis=1) + np.exp(sinks - largest)
    logs: NDArray[np.float64] = largest + np.log(total)
    return logs


def _scaled(
    products: NDArray[np.float64], scaling: float, softcap: float | None
) -> NDArray[np.float64]:
    products *= scaling
    if softcap is not None:
        products /= softcap
        np.tanh(products, out=products)
        products *= softcap
    return products
