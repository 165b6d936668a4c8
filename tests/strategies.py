"""What tests draw from: rows and layouts for Hypothesis, and activations built to be hard.

``ADVERSARIAL`` names every kind of input that a KV cache may meet and that breaks a careless
bound; each is a function of a generator and a shape.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from alignedkv.planes import PlaneLayout

LAYOUTS = [PlaneLayout.parse(text) for text in ("4|4|4|4", "4|4|8", "4|2|2|8")]

Rng = np.random.Generator


@dataclass(frozen=True, slots=True, kw_only=True)
class Activations:
    """Keys and values [B, Hkv, T, D], queries [B, H, D], float64; round them as the test needs."""

    keys: NDArray[np.float64]
    values: NDArray[np.float64]
    query: NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of a small attention problem."""

    batch: int = 1
    kv_heads: int = 1
    group: int = 2
    tokens: int = 133
    head_dim: int = 64


def layouts() -> st.SearchStrategy[PlaneLayout]:
    return st.sampled_from(LAYOUTS)


def rows(channels: int, count: int = 3) -> st.SearchStrategy[NDArray[np.float32]]:
    """Finite float32 rows [count, channels]: all exponents, zeros, repeated numbers, outliers."""
    number = st.one_of(
        st.floats(width=32, min_value=-8, max_value=8),
        st.floats(width=32, allow_nan=False, allow_infinity=False),
        st.sampled_from([0.0, -0.0, 1.0, 7.5, 2.0**-149, 2.0**-126, 3.3e38, -3.3e38]),
    )
    row = st.one_of(
        st.lists(number, min_size=channels, max_size=channels),
        number.map(lambda x: [x] * channels),
    )
    return st.lists(row, min_size=count, max_size=count).map(lambda r: np.array(r, np.float32))


def normal(rng: Rng, shape: Shape, *, spread: float = 1.5) -> Activations:
    """Independent normal numbers; scores have a standard deviation of about ``spread``."""
    rows = (shape.batch, shape.kv_heads, shape.tokens, shape.head_dim)
    heads = (shape.batch, shape.kv_heads * shape.group, shape.head_dim)
    return Activations(
        keys=rng.standard_normal(rows),
        values=rng.standard_normal(rows),
        query=spread * rng.standard_normal(heads),
    )


def _changed(
    change: Callable[[Rng, Activations], Activations],
) -> Callable[[Rng, Shape], Activations]:
    return lambda rng, shape: change(rng, normal(rng, shape))


def _identical_rows(rng: Rng, a: Activations) -> Activations:
    keys, values = a.keys.copy(), a.values.copy()
    keys[:], values[:] = keys[:, :, :1], values[:, :, :1]
    return Activations(keys=keys, values=values, query=a.query)


def _repeated_rows(rng: Rng, a: Activations) -> Activations:
    """Two rows that alternate with a period dividing every number of dither rows."""
    period = np.arange(a.keys.shape[2]) % 4
    return Activations(keys=a.keys[:, :, period], values=a.values[:, :, period], query=a.query)


def _constant_channels(rng: Rng, a: Activations) -> Activations:
    keys, values = a.keys.copy(), a.values.copy()
    keys[..., ::2], values[..., ::2] = 3.0, -5.0
    return Activations(keys=keys, values=values, query=a.query)


def _one_huge_element(rng: Rng, a: Activations) -> Activations:
    keys, values = a.keys.copy(), a.values.copy()
    keys[:, :, keys.shape[2] // 2, 1], values[:, :, 0, 2] = 100.0, 1000.0
    return Activations(keys=keys, values=values, query=a.query)


def _one_huge_channel(rng: Rng, a: Activations) -> Activations:
    keys = a.keys.copy()
    keys[..., 3] = 50.0 + 5.0 * keys[..., 3]
    return Activations(keys=keys, values=a.values, query=a.query)


def _subnormal(rng: Rng, a: Activations) -> Activations:
    return Activations(keys=a.keys * 2.0**-130, values=a.values * 2.0**-130, query=a.query)


def _near_bf16_max(rng: Rng, a: Activations) -> Activations:
    """Values reach half of the range: a value less the mean has to be a float32 as well."""
    keys, values = np.clip(a.keys, -1, 1) * 3.3e38, np.clip(a.values, -1, 1) * 1.6e38
    return Activations(keys=keys, values=values, query=a.query / 3.3e38)


def _zero_rows(rng: Rng, a: Activations) -> Activations:
    keys, values = a.keys.copy(), a.values.copy()
    keys[:, :, ::3], values[:, :, ::2] = 0.0, 0.0
    return Activations(keys=keys, values=values, query=a.query)


def _flat(rng: Rng, a: Activations) -> Activations:
    return Activations(keys=a.keys, values=a.values, query=np.zeros_like(a.query))


def _one_token_softmax(rng: Rng, a: Activations) -> Activations:
    """One key takes all the weight."""
    keys = a.keys.copy()
    group = a.query.shape[1] // keys.shape[1]
    keys[:, :, keys.shape[2] // 3] = 4.0 * a.query[:, ::group]
    return Activations(keys=keys, values=a.values, query=a.query)


def _cancelling(rng: Rng, a: Activations) -> Activations:
    """Outputs that almost cancel: values of alternating signs under equal weights."""
    signs = np.where(np.arange(a.keys.shape[2]) % 2, 1.0, -1.0)[:, None]
    values = signs * np.abs(a.values[:, :, :1])
    return Activations(keys=a.keys, values=values, query=a.query * 1e-3)


def _peaky(rng: Rng, a: Activations) -> Activations:
    return Activations(keys=a.keys, values=a.values, query=a.query * 4)


ADVERSARIAL: dict[str, Callable[[Rng, Shape], Activations]] = {
    "normal": normal,
    "peaky": _changed(_peaky),
    "flat": _changed(_flat),
    "one-token-softmax": _changed(_one_token_softmax),
    "identical-rows": _changed(_identical_rows),
    "repeated-rows": _changed(_repeated_rows),
    "constant-channels": _changed(_constant_channels),
    "one-huge-element": _changed(_one_huge_element),
    "one-huge-channel": _changed(_one_huge_channel),
    "subnormal": _changed(_subnormal),
    "near-bf16-max": _changed(_near_bf16_max),
    "zero-rows": _changed(_zero_rows),
    "cancelling": _changed(_cancelling),
}


def activations(name: str, shape: Shape, *, seed: int = 0) -> Activations:
    """One of `ADVERSARIAL`, reproducibly."""
    return ADVERSARIAL[name](np.random.default_rng(seed), shape)
