"""The arrays of a decode step, named once for all implementations.

An array is whatever the implementation takes: NumPy for `reference` and `cpu`, CuPy or torch device
arrays for `launch`.  Shapes use B sequences, Hkv KV heads, H = G Hkv query heads, T tokens of
capacity, D channels, C = D padded to a multiple of 32, N stored planes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from alignedkv.policy import START_MARGIN, PrecisionPolicy

Array = Any

#: Hints of a head of which nothing is known: with them a step reads first planes alone.
START_HINTS = {
    "log_z": 0.0,
    "rest": -math.inf,
    "spread": 0.0,
    "theta": math.inf,
    "margin": START_MARGIN,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheArrays:
    """One layer's cache.

    Attributes
    ----------
    key_planes, value_planes : tuple of N uint8 arrays [B, Hkv, T, C * width / 8]
        In paged storage [pages, Hkv, page_tokens, C * width / 8].
    scales : uint32 array [B, Hkv, T] or [pages, Hkv, page_tokens]
        bfloat16 row scales: the key's in the low half, the value's in the high half.
    key_mean, balance, value_mean : float32 arrays [B, Hkv, D]
        The key transform's mean and powers of two; the centre of the values.
    signs : float32 array [C]
        Random signs of the Hadamard transform (its block is ``hadamard_block(C)``).
    dither : int16 array [2, P, C]
        Dither rows of keys and values, in units of 2^-4 of a word's last bit.
    lengths, starts : int32 arrays [B]
        Valid tokens are ``starts[b] <= t < lengths[b]``; a sequence padded on the left starts late.
    block_table : int32 array [B, max_pages] or None
        Page of every ``page_tokens`` tokens; None for contiguous storage.
    exact_keys, exact_values : arrays [B, Hkv, exact_first + exact_last, D] in row_dtype, or None
        Slot i < exact_first holds token starts[b] + i; slot exact_first + t % exact_last holds
        token t of the last ``exact_last``.  The planes hold these rows as well.
    exact_first, exact_last : int
    """

    key_planes: tuple[Array, ...]
    value_planes: tuple[Array, ...]
    scales: Array
    key_mean: Array
    balance: Array
    value_mean: Array
    signs: Array
    dither: Array
    lengths: Array
    starts: Array
    block_table: Array | None = None
    exact_keys: Array | None = None
    exact_values: Array | None = None
    exact_first: int = 0
    exact_last: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadState:
    """What a step wants to know of each query head beforehand; wrong hints cost bytes, not truth.

    Attributes
    ----------
    log_z : float32 array [B, H]
        Natural log-sum-exp of the scores (sink included) of the step before.
    rest : float32 array [B, H]
        What all but the near rows add to it, as a natural logarithm less what the query alone
        explains (`reference_hints`), averaged over steps; -inf if nothing is known.  A statistical
        bound plans with ``log_z`` instead, and leaves ``rest`` as it is.
    spread : float32 array [B, H]
        rho = max_j |o_j - value_mean_j|.
    theta : float32 array [B, H]
        Absolute threshold of an addend's error.
    margin : float32 array [B, H]
        Bits below the tolerance at which feedback aims; NaN counts as `START_MARGIN`.
    step : uint32 array [1]
        Counts steps; the counter of the sampling hash.
    work : float32 array [B, H], optional
        Rows that the head's KV head read, of all planes; 0 if nothing is known.  The blocks of CUDA
        C++ kernels go where it is; without it they share KV heads evenly.
    """

    log_z: Array
    rest: Array
    spread: Array
    theta: Array
    margin: Array
    step: Array
    work: Array | None = None

    def mapped(self, change: Callable[[Array], Array]) -> HeadState:
        """A state of what ``change`` makes of each array that is there."""
        arrays = {name: getattr(self, name) for name in self.__slots__}
        return HeadState(**{n: None if x is None else change(x) for n, x in arrays.items()})

    def assign(self, other: HeadState) -> None:
        """Overwrite each array that both have."""
        for name in self.__slots__:
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine is not None and theirs is not None:
                mine[...] = theirs


#: The fields of `HeadState` that say what to expect of each query head.
HEAD_HINTS: Final = tuple(name for name in HeadState.__slots__ if name not in ("step", "work"))


@dataclass(frozen=True, slots=True, kw_only=True)
class StepArguments:
    """Run-time numbers of a step.

    Attributes
    ----------
    scaling : float
        Softmax scale lambda.
    tolerance : float
        Allowed error relative to max_j |o_j|.
    deviations : float
        z of the bound (`PrecisionPolicy.deviations`); 0 for a deterministic one.
    skip_share, plan_margin : float
        chi, and the margin of a planned weight (`PrecisionPolicy`).
    window : int
        Only the last ``window`` tokens are seen; 0 for all.
    softcap : float
        Scores become ``softcap * tanh(score / softcap)``; 0 for none.
    seed : int
        Of the sampling hash.
    repairs : int
        Times a head whose bound missed is read again, finer; the last time with all its planes.
    """

    scaling: float
    tolerance: float
    deviations: float
    skip_share: float
    plan_margin: float
    window: int = 0
    softcap: float = 0.0
    seed: int = 0
    repairs: int = 1

    @classmethod
    def from_policy(
        cls, policy: PrecisionPolicy, *, scaling: float, head_dim: int, tokens: int, **facts: Any
    ) -> StepArguments:
        """Arguments that serve ``policy`` for caches of up to ``tokens`` tokens."""
        return cls(
            scaling=scaling,
            tolerance=policy.tolerance,
            deviations=policy.deviations(head_dim, tokens),
            skip_share=policy.skip_share,
            plan_margin=policy.plan_margin,
            **facts,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeResult:
    """A step's answer.

    Attributes
    ----------
    output : array [B, H, D] in query_dtype
    bound : float32 array [B, H]
        Bound on max_j |output_j - exact_j|, absolute, before the output is rounded to its dtype.
    size : float32 array [B, H]
        max_j |output_j|.
    missed : uint8 array [B, H]
        1 where bound <= tolerance * (size - bound) does not hold, after all repairs.
    reads : uint32 array [B, Hkv, 2, N]
        Rows of keys (0) and values (1) of which plane n was read, repairs included.  A pass, of
        which a step makes one for each part of a group and repairs add more, counts the first key
        plane of every attended token that is not kept exact, once.
    state : HeadState
        For the next step.
    """

    output: Array
    bound: Array
    size: Array
    missed: Array
    reads: Array
    state: HeadState
