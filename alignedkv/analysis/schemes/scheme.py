"""What a scheme is and gives: an output, the bits that it reads, the bytes that it stores.

Also the attention that schemes share.  Only what a scheme stores and rounds on purpose is modelled;
its remaining arithmetic is float64, in the scheme's favour.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from alignedkv.analysis.activations import AttentionCase
from alignedkv.analysis.scores import largest_of_rows, log_sum_exp


@dataclass(frozen=True, slots=True, kw_only=True)
class SchemeResult:
    """A scheme at one query position.

    Attributes
    ----------
    name : str
    output, exact : float64 arrays [G, D]
    key_bits, value_bits : float
        Bits read per element of the visible rows, scales included.
    bytes_stored : float
        Of the keys and values that the query sees.
    """

    name: str
    output: NDArray[np.float64]
    exact: NDArray[np.float64]
    key_bits: float
    value_bits: float
    bytes_stored: float

    @property
    def error(self) -> NDArray[np.float64]:
        """Largest |output - exact| [G]."""
        return largest_of_rows(self.output - self.exact)

    @property
    def relative_error(self) -> NDArray[np.float64]:
        """Error over the largest component of the exact output [G]."""
        size = largest_of_rows(self.exact)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(self.error == 0, 0.0, self.error / size)

    @property
    def read_fraction(self) -> float:
        """Bits read as a share of 16 bits per element."""
        return (self.key_bits + self.value_bits) / 32


class Scheme(Protocol):
    """A way to keep and read a cache."""

    @property
    def name(self) -> str:
        """As tables show it."""

    def apply(self, case: AttentionCase, index: int) -> SchemeResult:
        """Attend at ``case.positions[index]``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VisibleRows:
    """Inputs of one query position in float64: query [G, D], key and value [T, D]."""

    query: NDArray[np.float64]
    key: NDArray[np.float64]
    value: NDArray[np.float64]

    @classmethod
    def of(cls, case: AttentionCase, index: int) -> VisibleRows:
        """What the query at ``case.positions[index]`` sees."""
        first, end = case.visible(index)
        return cls(
            query=case.query[:, index].astype(np.float64),
            key=case.key[first:end].astype(np.float64),
            value=case.value[first:end].astype(np.float64),
        )


def capped_scores(
    case: AttentionCase, query: NDArray[np.float64], key: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Scaled and capped scores [G, T]."""
    scores: NDArray[np.float64] = case.scaling * (query @ key.T)
    return scores if case.softcap is None else case.softcap * np.tanh(scores / case.softcap)


def softmax_weights(
    scores: NDArray[np.float64], sinks: NDArray[np.float64] | None
) -> NDArray[np.float64]:
    """Softmax of scores [G, T]; sink logits [G] take their share."""
    sinks = np.full(len(scores), -np.inf) if sinks is None else sinks
    weights: NDArray[np.float64] = np.exp(scores - log_sum_exp(scores, sinks)[:, None])
    return weights


def exact_output(case: AttentionCase, index: int) -> NDArray[np.float64]:
    """Attention output in float64 [G, D]."""
    rows = VisibleRows.of(case, index)
    output: NDArray[np.float64] = (
        softmax_weights(capped_scores(case, rows.query, rows.key), case.sinks) @ rows.value
    )
    return output
