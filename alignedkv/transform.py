"""The key transform: k' and q' with q'.k' = q.k - q.mean, so that a row scale wastes no bits.

``k' = H S (k - mean) / (b beta)`` and ``q' = H S (beta q)``, with H the unnormalised Hadamard
matrix over blocks of ``b`` channels, S random signs and beta powers of two (theory.md (1.2)).  The
whole power-of-two factor 1/b sits on the key side: no key can overflow, and the softmax scale stays
as the model gave it.  Values are only centred.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from alignedkv.errors import SpecError
from alignedkv.planes import padded_channels

#: Largest ratio of two balance factors, as a power of two.
MAX_BALANCE_EXPONENT = 13

TRANSFORM_PARTS = ("mean", "balance", "hadamard")

Real = TypeVar("Real", np.float32, np.float64)


def hadamard_block(channels: int) -> int:
    """Largest power of two that divides the (padded) number of channels."""
    return channels & -channels


def hadamard(rows: NDArray[Real], block: int) -> NDArray[Real]:
    """Unnormalised Walsh-Hadamard transform of each block of ``block`` channels, in rows' dtype.

    The butterfly runs over distances 1, 2, 4, ...: kernels repeat this order bit for bit in
    float32.
    """
    out = rows.copy()
    shape = out.shape
    distance = 1
    while distance < block:
        pairs = out.reshape(*shape[:-1], -1, 2, distance)
        low, high = pairs[..., 0, :].copy(), pairs[..., 1, :].copy()
        pairs[..., 0, :], pairs[..., 1, :] = low + high, low - high
        distance *= 2
    return out


def random_signs(channels: int, *, seed: int) -> NDArray[np.float32]:
    """Signs of the Hadamard part, +1 or -1 with equal probability [channels]."""
    return np.random.default_rng(seed).choice(np.array([-1, 1], np.float32), channels)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyTransform:
    """Transform of the keys and queries of one KV head.

    Attributes
    ----------
    mean : float32 array [pages, D]
        Subtracted from the keys of each page (one row: the same mean for all tokens).
    balance : float32 array [D]
        beta: powers of two, at least 1.
    signs : float32 array [padded D]
        Random signs; all ones where the transform has no Hadamard part.
    block : int
        Channels of a Hadamard block; 1 for none.
    page : int or None
        Tokens of a page, None for one page.
    """

    mean: NDArray[np.float32]
    balance: NDArray[np.float32]
    signs: NDArray[np.float32]
    block: int
    page: int | None = None

    @property
    def key_gain(self) -> NDArray[np.float32]:
        """Power-of-two factor of each key channel before the butterfly [D]."""
        return np.float32(1.0 / self.block) / self.balance

    def _mean_of(self, tokens: int) -> NDArray[np.float32]:
        if self.page is None:
            return np.broadcast_to(self.mean[0], (tokens, self.mean.shape[1]))
        return self.mean[np.arange(tokens) // self.page]

    def keys(self, k: ArrayLike) -> NDArray[np.float32]:
        """k' [T, padded D] of keys [T, D]; one rounding before the butterfly.

        Scaling first (exact) and subtracting the scaled mean cannot overflow where k cannot.
        """
        k32 = np.asarray(k, np.float32)
        gain = self.key_gain
        centred = k32 * gain - self._mean_of(len(k32)) * gain
        return hadamard(_pad(centred, len(self.signs)) * self.signs, self.block)

    def queries(self, q: ArrayLike) -> NDArray[np.float32]:
        """q' [..., padded D] of queries [..., D], in the float32 operations of the kernels."""
        return self._turn(np.asarray(q, np.float32))

    def exact_queries(self, q: ArrayLike) -> NDArray[np.float64]:
        """`queries` in float64: no error that a bound would have to know of."""
        return self._turn(np.asarray(q, np.float64))

    def _turn(self, q: NDArray[Real]) -> NDArray[Real]:
        scaled = q * self.balance.astype(q.dtype)
        return hadamard(_pad(scaled, len(self.signs)) * self.signs.astype(q.dtype), self.block)

    def offsets(self, q: ArrayLike, tokens: int) -> NDArray[np.float64]:
        """q.mean of each token's page [..., T]: what q'.k' lacks of q.k."""
        per_page = np.asarray(q, np.float64) @ self.mean.astype(np.float64).T
        if self.page is None:
            return np.broadcast_to(per_page, (*per_page.shape[:-1], tokens))
        return per_page[..., np.arange(tokens) // self.page]


def fit_key_transform(
    k: ArrayLike,
    query_size: ArrayLike | None = None,
    *,
    parts: str = "mean+balance+hadamard",
    page: int | None = None,
    seed: int = 0,
) -> KeyTransform:
    """Choose mean, balance and signs from the keys at hand.

    Parameters
    ----------
    k : float array [T, D]
        Keys (after their rotation) whose statistics are used.
    query_size : float array [D], optional
        E|q| per channel; needed for "balance".
    parts : str
        Any of "mean", "balance", "hadamard", joined by "+", or "none".
    page : int, optional
        A mean for every ``page`` tokens instead of one (measurements.md 4).
    seed : int
        Of the random signs.

    Notes
    -----
    beta_i is the power of two nearest to sqrt(rms_t(k_ti - mean_i) / E|q_i|), equal for the two
    channels of a rotary pair, so that it commutes with the rotation and could be folded into the
    projection weights (theory.md 1, measurements.md 4).
    """
    wanted = set() if parts == "none" else set(parts.split("+"))
    if not wanted <= set(TRANSFORM_PARTS):
        raise SpecError(f"transform {parts!r}: join any of {', '.join(TRANSFORM_PARTS)} by '+'")
    keys = np.asarray(k, np.float64)
    tokens, head_dim = keys.shape
    channels = padded_channels(head_dim)
    starts = [0] if page is None else range(0, tokens, page)
    mean = np.zeros((len(starts), head_dim), np.float32)
    if "mean" in wanted:
        span = tokens if page is None else page
        for i, start in enumerate(starts):
            mean[i] = keys[start : start + span].mean(axis=0)
    balance = np.ones(head_dim, np.float32)
    if "balance" in wanted:
        if query_size is None:
            raise SpecError("the balance part needs query_size, the mean |q| of every channel")
        row_mean = mean if page is None else mean[np.arange(tokens) // page]
        spread = np.sqrt(((keys - row_mean) ** 2).mean(axis=0))
        balance = _balance(spread, np.asarray(query_size, np.float64))
    signs = np.ones(channels, np.float32)
    block = 1
    if "hadamard" in wanted:
        signs = random_signs(channels, seed=seed)
        block = hadamard_block(channels)
    return KeyTransform(mean=mean, balance=balance, signs=signs, block=block, page=page)


def _balance(spread: NDArray[np.float64], size: NDArray[np.float64]) -> NDArray[np.float32]:
    """Powers of two near sqrt(spread / size), equal in a rotary pair, the smallest 1."""
    half = len(spread) // 2
    spread = np.tile(np.sqrt((spread[:half] ** 2 + spread[half:] ** 2) / 2), 2)
    size = np.tile((size[:half] + size[half:]) / 2, 2)
    exponent = np.round((_log2_floored(spread) - _log2_floored(size)) / 2)
    exponent = np.maximum(exponent, exponent.max() - MAX_BALANCE_EXPONENT)
    balance: NDArray[np.float32] = np.exp2(exponent - exponent.min()).astype(np.float32)
    return balance


def _log2_floored(size: NDArray[np.float64]) -> NDArray[np.float64]:
    """log2, as if no channel were 2^-20 times smaller than the largest.

    A channel that no query uses, or whose keys are all alike, has no say in the balance of others.
    """
    floor = max(size.max() * 2.0**-20, np.finfo(np.float64).tiny)
    logarithm: NDArray[np.float64] = np.log2(np.maximum(size, floor))
    return logarithm


def _pad(rows: NDArray[Real], channels: int) -> NDArray[Real]:
    missing = channels - rows.shape[-1]
    return np.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, missing)]) if missing else rows
