"""Cases that try to break a bound: ordinary rows, adversarial ones, and a counterexample."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from alignedkv.analysis.activations import AttentionCase
from alignedkv.analysis.scores import PositionScores

Rng = np.random.Generator
#: ``family(rng, T, D)`` -> rows [T, D].
Family = Callable[[Rng, int, int], NDArray[np.float64]]
#: Query heads of one random case: each is a case of its own for the count.
HEADS = 512


def random_rows(rng: Rng, T: int, D: int) -> NDArray[np.float64]:
    """Rows of ordinary size."""
    return rng.standard_normal((T, D)) * np.exp(rng.standard_normal(D))


def identical_rows(rng: Rng, T: int, D: int) -> NDArray[np.float64]:
    """One row again and again: all errors of a dither class agree."""
    return np.repeat(rng.standard_normal((1, D)), T, axis=0)


def alternating_rows(rng: Rng, T: int, D: int) -> NDArray[np.float64]:
    """Two rows in turn."""
    return rng.standard_normal((2, D))[np.arange(T) % 2]


def constant_channels(rng: Rng, T: int, D: int) -> NDArray[np.float64]:
    """Most channels are constant, some of them large."""
    rows = np.repeat(8 * rng.standard_normal((1, D)), T, axis=0)
    rows[:, ::4] = rng.standard_normal((T, len(rows[0, ::4])))
    return rows


def one_huge_element(rng: Rng, T: int, D: int) -> NDArray[np.float64]:
    """A number that leaves the others of its row no digits."""
    rows = rng.standard_normal((T, D))
    rows[rng.integers(T), rng.integers(D)] = 10.0 ** rng.uniform(2, 4.5)
    return rows


def one_huge_row(rng: Rng, T: int, D: int) -> NDArray[np.float64]:
    """A row far larger than the rest."""
    rows = rng.standard_normal((T, D))
    rows[rng.integers(T)] *= 10.0 ** rng.uniform(1, 4)
    return rows


def subnormal_rows(rng: Rng, T: int, D: int) -> NDArray[np.float64]:
    """Multiples of fp16's smallest number."""
    return rng.integers(-3, 4, (T, D)) * 2.0**-24


def zero_rows(rng: Rng, T: int, D: int) -> NDArray[np.float64]:
    """Half of the rows are zero."""
    rows = rng.standard_normal((T, D))
    rows[rng.random(T) < 0.5] = 0
    return rows


def digit_edges(rng: Rng, T: int, D: int) -> NDArray[np.float64]:
    """Numbers on the edges of the first plane's cells."""
    return rng.integers(-15, 16, (T, D)) / 15.0


FAMILIES: tuple[Family, ...] = (
    random_rows,
    identical_rows,
    alternating_rows,
    constant_channels,
    one_huge_element,
    one_huge_row,
    subnormal_rows,
    zero_rows,
    digit_edges,
)


def random_case(rng: Rng, heads: int = HEADS) -> AttentionCase:
    """Keys and values of two families, queries from flat softmax to one token."""
    T = int(rng.choice([1, 2, 3, 7, 16, 33, 64]))
    D = int(rng.choice([2, 4, 8, 16, 64, 80]))
    key, value = (
        FAMILIES[rng.integers(len(FAMILIES))](rng, T, D).astype(np.float16) for _ in range(2)
    )
    size = 10.0 ** rng.uniform(-2, 1.5, (heads, 1, 1))
    kinds = [rng.standard_normal((heads, 1, D)), rng.choice([-1.0, 1.0], (heads, 1, D))]
    query = kinds[rng.integers(2)] * size
    return AttentionCase(
        name="random",
        layer=0,
        kv_head=0,
        query=query.astype(np.float16),
        key=key,
        value=value,
        positions=np.array([T - 1]),
        dtype="float16",
        scaling=D**-0.5,
        window=int(rng.integers(1, T + 1)) if rng.random() < 0.2 else None,
        softcap=float(rng.uniform(1, 50)) if rng.random() < 0.2 else None,
        sinks=rng.standard_normal(heads) if rng.random() < 0.2 else None,
    )


def worst_queries(scores: PositionScores, rng: Rng) -> NDArray[np.float16]:
    """Queries whose signs are those of one row's digit errors: they reach the score's bound.

    Only for scores of keys without transform, where errors and queries have the same channels.
    """
    stored = scores.encoded.keys
    planes = int(rng.integers(1, stored.stored + 1))
    wrong = stored.planes().prefix(planes)[:, : scores.encoded.case.head_dim]
    wrong = wrong - scores.encoded.case.key.astype(np.float64)
    group = scores.encoded.case.group
    rows = rng.integers(len(wrong), size=group)
    step = stored.half_step(planes)[rows]
    aim = 10.0 ** rng.uniform(-2, 0.5, group)
    size = aim / (step * wrong.shape[1] * abs(scores.encoded.case.scaling))
    size = np.minimum(size, 6e4)[:, None] * rng.choice([-1.0, 1.0], (group, 1))
    return (size * np.where(wrong[rows] < 0, -1.0, 1.0)).astype(np.float16)


def counterexample_case(rng: Rng, tokens: int) -> AttentionCase:
    """theory.md 5.5: half of the rows lie on a threshold, v > 0, half far below it, v < 0.

    A row on the threshold stays at one plane exactly when its score came out low: the errors of all
    of them add up, while the estimate takes them for independent.  sigma(1) is small, so that the
    mean of the second-order term does not hide it.
    """
    D, largest, sigma = 64, 3.0, 0.06
    high = np.arange(tokens) % 2 == 0
    scaling = sigma * 2 * math.sqrt(3) / (largest / 7.5)
    gap = 6 * sigma
    key = rng.uniform(-largest, largest, (tokens, D))
    key[:, 0] = np.where(high, 0.0, -gap / scaling)  # the query is the first unit vector
    key[:, 1] = largest  # so that all rows have one scale
    value = np.where(high, 1.0, -math.exp(gap))  # both halves weigh the same
    query = np.zeros((1, 1, D))
    query[0, 0, 0] = 1.0
    return AttentionCase(
        name="counterexample",
        layer=0,
        kv_head=0,
        query=query.astype(np.float32),
        key=key.astype(np.float32),
        value=np.repeat(value[:, None], D, axis=1).astype(np.float32),
        positions=np.array([tokens - 1]),
        dtype="float32",
        scaling=scaling,
    )
