"""Synthetic heads whose scores have a known shape.

Keys look like a model's: alike from token to token, channels of unequal size, a few channels with a
large mean, a rotary embedding over all of it.  A query is scaled so that its scores have the wanted
standard deviation, and token 0 may be made a sink.

Arrays are NumPy's, CuPy's or torch's: whoever calls says where numbers come from.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from alignedkv.errors import TuningError
from alignedkv.kernels.arrays import Array


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreKind:
    """The shape of the scores of one kind of head.

    Attributes
    ----------
    spread : float or None
        Standard deviation of the scores; None draws one per head so that the tokens beside the
        sink weigh as much as 8 to 60 equal ones.
    correlation : float
        Of the keys of neighbouring tokens.
    sink_mass : float or None
        Share of the softmax weight on token 0; None for no sink.
    """

    spread: float | None
    correlation: float
    sink_mass: float | None


#: Flat heads average over thousands of tokens, mixed ones over tens to hundreds, peaky ones look at
#: a few; model-like heads are what captured activations mostly show.
KINDS: Final = {
    "flat": ScoreKind(spread=0.7, correlation=0.0, sink_mass=None),
    "mixed": ScoreKind(spread=2.2, correlation=0.7, sink_mass=0.4),
    "peaky": ScoreKind(spread=5.0, correlation=0.7, sink_mass=None),
    "model": ScoreKind(spread=None, correlation=0.7, sink_mass=0.3),
}
#: Base of the rotary embedding's angles.
ROTARY_BASE: Final = 1e4
#: Tokens whose moving average makes neighbours alike.
_CORRELATED_TOKENS: Final = 12
#: Channels with a large mean.
_OUTLIER_CHANNELS: Final = 4
_BISECTIONS: Final = 30


class Numbers(Protocol):
    """Random numbers as arrays of one module, on one device."""

    #: ``numpy``, ``cupy`` or ``torch``: what these three call alike is used of it.
    xp: Any

    def normal(self, *shape: int) -> Array:
        """Standard normal float32 numbers."""

    def uniform(self, *shape: int) -> Array:
        """float32 numbers in [0, 1)."""

    def integers(self, low: int, high: int, count: int) -> Array:
        """Whole numbers from ``low`` to ``high - 1`` [count]."""

    def put(self, array: NDArray[Any]) -> Array:
        """The module's array of a NumPy array."""

    def get(self, array: Array) -> NDArray[Any]:
        """The NumPy array of a module's array."""


class GeneratorNumbers:
    """`Numbers` of NumPy or CuPy; their normal numbers differ.

    Parameters
    ----------
    xp : module
        ``numpy`` or ``cupy``.
    seed : tuple of int
    """

    def __init__(self, xp: Any, seed: tuple[int, ...]) -> None:
        self.xp = xp
        self._few = np.random.default_rng(seed)
        self._many = xp.random.default_rng(int(self._few.integers(1 << 62)))

    def normal(self, *shape: int) -> Array:
        """See `Numbers`."""
        return self._many.standard_normal(shape, dtype=np.float32)

    def uniform(self, *shape: int) -> Array:
        """See `Numbers`."""
        return self.put(self._few.random(shape, dtype=np.float32))

    def integers(self, low: int, high: int, count: int) -> Array:
        """See `Numbers`."""
        return self.put(self._few.integers(low, high, count))

    def put(self, array: NDArray[Any]) -> Array:
        """See `Numbers`."""
        return self.xp.asarray(array)

    def get(self, array: Array) -> NDArray[Any]:
        """See `Numbers`."""
        found: NDArray[Any] = array if self.xp is np else self.xp.asnumpy(array)
        return found


def synthetic_head(
    kind: str, *, tokens: int, group: int, head_dim: int, numbers: Numbers
) -> tuple[Array, Array, Array]:
    """Keys [T, D], values [T, D] and queries [G, D] of one KV head, float32.

    Raises
    ------
    TuningError
        If the kind is unknown or the head dimension odd.
    """
    if kind not in KINDS:
        raise TuningError(f"data {kind!r}: give one of {', '.join(KINDS)}")
    if head_dim % 2:
        raise TuningError(f"head_dim {head_dim}: rotary pairs need an even number")
    shape, xp, half = KINDS[kind], numbers.xp, head_dim // 2
    content = numbers.normal(tokens, head_dim)
    if shape.correlation:
        content = _averaged(content, shape.correlation, xp)
    # Outlier channels sit among the slow rotations, as they do in models.
    slow = numbers.integers(half - half // 4, half, _OUTLIER_CHANNELS)
    slow[_OUTLIER_CHANNELS // 2 :] += half
    mean = xp.zeros_like(content[0])
    mean[slow] = xp.sign(numbers.normal(_OUTLIER_CHANNELS)) * (
        5 + 7 * numbers.uniform(_OUTLIER_CHANNELS)
    )
    cosine, sine = (numbers.put(part) for part in _rotation(tokens, head_dim))
    content = content * xp.exp(0.5 * numbers.normal(head_dim))
    keys = _rotated(content + mean, (cosine, sine), xp)
    values = numbers.normal(tokens, head_dim) * xp.exp(0.3 * numbers.normal(head_dim))
    values = values + 0.3 * numbers.normal(head_dim)

    query = numbers.normal(group, head_dim) + 0.05 * mean
    query = _rotated(query, (cosine[-1:], sine[-1:]), xp)
    scores = query @ keys.T / math.sqrt(head_dim)
    deviation = _deviation(scores)
    if shape.spread is None:
        wanted = 8 * 7.5 ** numbers.uniform(group, 1)
        query = query * (_spread_for(scores / deviation, wanted, xp) / deviation)
    else:
        query = query * (shape.spread / deviation)
    if shape.sink_mass is not None:
        keys[0] = _sink(keys, query, shape.sink_mass, numbers)
        values[0] *= 0.05  # a sink's value is small: that is what makes it one
    return keys, values, query


def _averaged(rows: Array, correlation: float, xp: Any) -> Array:
    """A moving average over tokens that leaves the variance as it is."""
    weights = correlation ** np.arange(_CORRELATED_TOKENS)
    weights /= math.sqrt(float((weights**2).sum()))
    total = xp.zeros_like(rows)
    for shift, weight in enumerate(weights):
        total += float(weight) * xp.roll(rows, shift, 0)
    return total


@functools.lru_cache(maxsize=1)
def _rotation(tokens: int, head_dim: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosine and sine [T, D/2] of the rotary embedding's angles."""
    half = head_dim // 2
    angles = np.arange(tokens)[:, None] * ROTARY_BASE ** (-np.arange(half) / half)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def _rotated(rows: Array, turn: tuple[Array, Array], xp: Any) -> Array:
    """Rows [T, D] after the rotary embedding, halves paired."""
    cosine, sine = turn
    half = rows.shape[1] // 2
    a, b = rows[:, :half], rows[:, half:]
    return xp.concatenate([a * cosine - b * sine, b * cosine + a * sine], 1)


def _deviation(scores: Array) -> Array:
    """Standard deviation [G, 1] of scores [G, T]."""
    centred = scores - scores.mean(1)[:, None]
    return ((centred * centred).sum(1)[:, None] / (scores.shape[1] - 1)) ** 0.5


def _spread_for(scores: Array, wanted: Array, xp: Any) -> Array:
    """Factor on scores [G, T] at which 1 / sum p^2 is ``wanted`` [G, 1], by bisection."""
    low, high = xp.zeros_like(wanted), xp.zeros_like(wanted) + 50.0
    relative = scores - xp.amax(scores, 1)[:, None]
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        weights = xp.exp(middle * relative)
        effective = (weights.sum(1) ** 2 / (weights**2).sum(1))[:, None]
        low = xp.where(effective > wanted, middle, low)
        high = xp.where(effective > wanted, high, middle)
    return high


def _sink(keys: Array, query: Array, mass: float, numbers: Numbers) -> Array:
    """The smallest key [D] of token 0 that draws ``mass`` of every head's weight."""
    xp, size = numbers.xp, math.sqrt(keys.shape[1])
    scores = query @ keys[1:].T / size
    largest = xp.amax(scores, 1)
    rest = largest + xp.log(xp.exp(scores - largest[:, None]).sum(1))
    wanted = (numbers.get(rest) + math.log(mass / (1 - mass))).astype(np.float64) * size
    queries = numbers.get(query).astype(np.float64)
    key = queries.T @ np.linalg.solve(queries @ queries.T, wanted)
    return numbers.put(key.astype(np.float32))
