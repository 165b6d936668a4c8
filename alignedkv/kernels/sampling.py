"""The counter hash that decides which value rows are sampled (sampling.md 1 and 7).

One number per (seed, step, KV head, token): whoever asks gets the same, so a step is reproducible
bit for bit whatever its split.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

#: Bits of a draw: a probability is rounded up to a multiple of 2^-24, and is then met exactly.
DRAW_BITS = 24
#: theta_s / (chi theta): below it a value row is sampled (phi of sampling.md, Theorem S3).
SAMPLING_FACTOR = 8.0
#: 2^32 / golden ratio, which spreads consecutive counters over 32 bits, and the multipliers of
#: MurmurHash3's finaliser (A. Appleby, public domain).
SPREAD, MIX_1, MIX_2 = 0x9E3779B9, 0x85EBCA6B, 0xC2B2AE35

_MASK = np.uint64(0xFFFFFFFF)


def mix(word: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """MurmurHash3's 32-bit finaliser: a bijection in which every bit moves every other."""
    word = word ^ (word >> np.uint64(16))
    word = (word * np.uint64(MIX_1)) & _MASK
    word = word ^ (word >> np.uint64(13))
    word = (word * np.uint64(MIX_2)) & _MASK
    return word ^ (word >> np.uint64(16))


def stream_key(seed: int, step: int, head: int) -> np.uint64:
    """Key of one KV head's draws in one step: ``mix(mix(mix(seed + SPREAD) ^ step) ^ head)``.

    Parameters
    ----------
    seed, step : int
        Taken modulo 2^32.
    head : int
        ``b Hkv + h``.
    """
    word = np.array([(seed + SPREAD) & 0xFFFFFFFF], np.uint64)
    for counter in (step, head):
        word = mix(word) ^ np.uint64(counter & 0xFFFFFFFF)
    return np.uint64(mix(word)[0])


def draws(key: np.uint64, tokens: NDArray[np.integer]) -> NDArray[np.int64]:
    """Integers uniform on 0 .. 2^24 - 1, one a token: ``mix(t SPREAD ^ key) >> 8``."""
    spread = (tokens.astype(np.uint64) * np.uint64(SPREAD)) & _MASK
    return (mix(spread ^ key) >> np.uint64(32 - DRAW_BITS)).astype(np.int64)


def chances(probability: NDArray[np.float64]) -> NDArray[np.int64]:
    """Draws below this number read the row: ``ceil(pi 2^24)``, at least 1.

    The row's probability *is* this over 2^24, so weights divided by it leave no bias at all.
    """
    wanted = np.ceil(np.clip(probability, 0.0, 1.0) * 2.0**DRAW_BITS)
    return np.maximum(wanted, 1.0).astype(np.int64)
