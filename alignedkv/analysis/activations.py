"""Attention inputs of one KV head, checked: what the analysis works on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alignedkv.errors import ActivationError

DTYPES = ("float16", "bfloat16", "float32")


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCase:
    """Inputs of attention for one KV head and the G query heads that read it.

    Attributes
    ----------
    name : str
        Where it comes from, for tables and messages.
    layer, kv_head : int
    query : float array [G, S, D]
        After the rotary embedding, not yet scaled.
    key, value : float arrays [T, D]
    positions : int64 array [S]
        The query of position p sees tokens up to and including p.
    dtype : str
        float16, bfloat16 or float32: what the arrays' numbers are; bfloat16 is held in float32.
    scaling : float
        Softmax scale.
    window : int or None
        A query sees at most this many tokens, itself included.
    softcap : float or None
        Scores s become softcap tanh(s / softcap).
    sinks : float64 array [G] or None
        Logits that join the softmax with value 0.
    start : int
        First token that is not padding.
    prefill : int or None
        Tokens whose statistics may be used to prepare the storage; None: all. Later rows were
        decoded one by one.

    Raises
    ------
    ActivationError
        If shapes, types or numbers cannot be attention inputs; the message names the tensor.
    """

    name: str
    layer: int
    kv_head: int
    query: NDArray[Any]
    key: NDArray[Any]
    value: NDArray[Any]
    positions: NDArray[np.int64]
    dtype: str
    scaling: float
    window: int | None = None
    softcap: float | None = None
    sinks: NDArray[np.float64] | None = None
    start: int = 0
    prefill: int | None = None

    def __post_init__(self) -> None:
        _check_shapes(self)
        _check_numbers(self)

    @property
    def tokens(self) -> int:
        """T."""
        return int(self.key.shape[0])

    @property
    def group(self) -> int:
        """G, query heads per KV head."""
        return int(self.query.shape[0])

    @property
    def head_dim(self) -> int:
        """D."""
        return int(self.key.shape[1])

    @property
    def input_bits(self) -> int:
        """Bits of a number in the input type."""
        return 32 if self.dtype == "float32" else 16

    def visible(self, index: int) -> tuple[int, int]:
        """Tokens ``first <= t < end`` that the query of ``positions[index]`` sees."""
        end = int(self.positions[index]) + 1
        first = self.start if self.window is None else max(self.start, end - self.window)
        return first, end


def _check_shapes(case: AttentionCase) -> None:
    query, key, value = case.query, case.key, case.value
    if query.ndim != 3 or key.ndim != 2 or value.shape != key.shape:
        raise ActivationError(
            f"{case.name}: q {list(query.shape)}, k {list(key.shape)}, v {list(value.shape)}; give "
            "q [group, positions, D] and k, v [tokens, D]"
        )
    if query.shape[2] != key.shape[1] or query.shape[1] != len(case.positions):
        raise ActivationError(
            f"{case.name}: q {list(query.shape)} does not fit {len(case.positions)} positions and "
            f"keys of {key.shape[1]} channels"
        )
    if 0 in query.shape or 0 in key.shape:
        raise ActivationError(
            f"{case.name}: q {list(query.shape)} or k {list(key.shape)} is empty; at least one "
            "token and one position are needed"
        )
    if case.dtype not in DTYPES:
        raise ActivationError(f"{case.name}: dtype {case.dtype}; give {', '.join(DTYPES)}")
    if case.sinks is not None and case.sinks.shape != (case.group,):
        raise ActivationError(
            f"{case.name}: sinks {list(case.sinks.shape)}; give one for each of the {case.group} "
            "query heads"
        )
    first, last = int(case.positions.min()), int(case.positions.max())
    if not 0 <= case.start <= first or last >= case.tokens:
        raise ActivationError(
            f"{case.name}: positions {first}..{last} with padding up to {case.start}; they must "
            f"lie in {case.start}..{case.tokens - 1}"
        )
    if case.window is not None and case.window < 1:
        raise ActivationError(f"{case.name}: window {case.window}; give at least 1, or None")


def _check_numbers(case: AttentionCase) -> None:
    arrays = {"q": case.query, "k": case.key[case.start :], "v": case.value[case.start :]}
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            place = [int(i) for i in np.argwhere(~np.isfinite(array))[0]]
            if name != "q":
                place[0] += case.start
            count = int(np.count_nonzero(~np.isfinite(array)))
            raise ActivationError(
                f"{case.name}: {name}{place} is {array[~np.isfinite(array)][0]}; {count} of "
                f"{array.size} numbers are not finite, all must be"
            )
    if not np.isfinite(case.scaling):
        raise ActivationError(f"{case.name}: scaling {case.scaling}; give a finite number")
    if case.softcap is not None and not 0 < case.softcap < np.inf:
        raise ActivationError(
            f"{case.name}: softcap {case.softcap}; give a positive number, or None"
        )
    if case.sinks is not None and np.isnan(case.sinks).any():
        raise ActivationError(f"{case.name}: sinks {case.sinks.tolist()}; give numbers, not NaN")
