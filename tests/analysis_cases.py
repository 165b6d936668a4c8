"""Small attention cases for the tests of the analysis."""

from __future__ import annotations

from typing import Any

import numpy as np

from alignedkv.analysis.activations import AttentionCase
from alignedkv.analysis.case_files import find_cases, sample_path


def make_case(
    *,
    tokens: int = 48,
    group: int = 2,
    head_dim: int = 64,
    positions: tuple[int, ...] | None = None,
    sharpness: float = 2.0,
    dtype: str = "float16",
    seed: int = 0,
    **changes: Any,
) -> AttentionCase:
    """Random rows; the softmax is flat at sharpness 0 and has one token at 30."""
    rng = np.random.default_rng(seed)
    positions = (tokens - 1,) if positions is None else positions
    kept = np.float32 if dtype == "float32" else np.float16
    arrays = {
        "query": sharpness * rng.standard_normal((group, len(positions), head_dim)),
        "key": rng.standard_normal((tokens, head_dim)) * np.exp(rng.standard_normal(head_dim)),
        "value": rng.standard_normal((tokens, head_dim)) + 0.5,
    }
    if dtype == "bfloat16":
        kept = np.float32
        arrays = {
            name: (array.astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)
            for name, array in arrays.items()
        }
    facts: dict[str, Any] = {
        "name": "made",
        "layer": 0,
        "kv_head": 0,
        "positions": np.array(positions),
        "dtype": dtype,
        "scaling": head_dim**-0.5,
    }
    facts |= {name: array.astype(kept) for name, array in arrays.items()}
    return AttentionCase(**facts | changes)


def sample_cases() -> list[AttentionCase]:
    """The nine KV heads of the bundled sample."""
    return [reference.load() for reference in find_cases(sample_path())]
