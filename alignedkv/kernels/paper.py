"""The AlignedKV paper's decode step (arXiv 2409.16546), to measure its claims beside ours.

fp16 keys and values in planes of 8, 4 and 4 bits; keys are read per channel, values per token, by
the gap between an addend's exponent and the sum's.  No error bound exists for this rule.  The
kernels are `cuda/paper.cu`; with `READ_ALL` the same kernels read everything, which is what the
paper compares with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from alignedkv.errors import LaunchError
from alignedkv.kernels.arguments import Sizes, allocate_struct, pack
from alignedkv.kernels.arrays import Array
from alignedkv.kernels.device import Place
from alignedkv.kernels.spec import DecodeSpec

HEAD_DIM = 128
#: Tokens of a tile of keys.
TILE = 128
WARP, WARPS = 32, 8
#: Blocks of a kernel per SM: as many as its registers leave room for.
BLOCKS_PER_SM = 4
PLANE_WIDTHS = (8, 4, 4)
_INPUTS = ("keys", "values", "query", "expected", "lengths")


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperRule:
    """Exponents below what the sum asks from which two planes do, and from which one does.

    Attributes
    ----------
    key_gaps, value_gaps : pair of int
        4 and 8 by default: an addend that lies so many binades lower has so many bits less to tell.
    """

    key_gaps: tuple[int, int] = (4, 8)
    value_gaps: tuple[int, int] = (4, 8)


#: The published code drops bits of value rows sooner.
PUBLISHED = PaperRule(value_gaps=(1, 2))
#: No exponent of a float32 lies that far below another.
READ_ALL = PaperRule(key_gaps=(1000, 1000), value_gaps=(1000, 1000))


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperCache:
    """Keys and values in the paper's planes, and what a step needs besides.

    Attributes
    ----------
    place : Place
    sizes : Sizes
    arrays : dict of str to CuPy array
        By their names in ``struct PaperArguments``; ``output`` [B, H, D] and ``reads``
        [B, Hkv, 2, 3] are those of the last step.
    """

    place: Place
    sizes: Sizes
    arrays: Mapping[str, Array]


def store(
    keys: Array, values: Array, lengths: Array, *, group: int, stream: int | None = None
) -> PaperCache:
    """Cut keys and values into planes.

    Parameters
    ----------
    keys, values : float16 arrays [B, Hkv, T, 128]
        Contiguous; T a multiple of 128.
    lengths : int32 array [B]
        Valid tokens of each sequence, from 0 on.
    group : int
        Query heads per KV head.
    stream : int, optional
        Handle of a CUDA stream; CuPy's current one by default.

    Raises
    ------
    LaunchError
        If an array is not as described.
    """
    shape = tuple(keys.shape)
    if len(shape) != 4 or shape[3] != HEAD_DIM or shape[2] % TILE:
        raise LaunchError(
            f"keys have shape {shape}: give [B, Hkv, T, {HEAD_DIM}] with T a multiple of {TILE}"
        )
    spec = DecodeSpec(head_dim=HEAD_DIM, group=group, query_dtype="float16", row_dtype="float16")
    place = Place.of(spec, keys, None, stream)
    batch, kv_heads, tokens, head_dim = shape
    splits = max(1, BLOCKS_PER_SM * place.target.sm_count // (batch * kv_heads))
    names = {
        "B": batch,
        "Hkv": kv_heads,
        "H": kv_heads * group,
        "T": tokens,
        "D": head_dim,
        "half_dim": head_dim // 2,
        "key_tiles": tokens // TILE,
        "splits": min(splits, -(-tokens // (WARP * WARPS))),
    }
    sizes = Sizes(names=names, rows=(), plane_bytes=())
    arrays = allocate_struct("PaperArguments", spec, sizes, place.zeros, without=_INPUTS)
    cache = PaperCache(place=place, sizes=sizes, arrays={**arrays, "lengths": lengths})
    packed = _packed(cache, keys=keys, values=values)
    grid = (names["key_tiles"], batch * kv_heads)
    place.launch("paper.cu", "paper_encode", packed, grid=grid, block=(WARP, 1))
    return cache


def decode(
    cache: PaperCache,
    query: Array,
    expected: Array,
    *,
    scaling: float,
    rule: PaperRule | None = None,
) -> Array:
    """One step of attention.

    Parameters
    ----------
    cache : PaperCache
    query : float16 array [B, H, 128]
    expected : float32 array [B, H, 128]
        The output as far as it is known beforehand, such as the step before's.  (The paper probes
        32 tokens.)
    scaling : float
        Softmax scale.
    rule : PaperRule, optional
        The paper's, mended, if not given; `PUBLISHED` for its own gaps.

    Returns
    -------
    float32 array [B, H, 128]
        ``cache.arrays["output"]``, overwritten by the next step.
    """
    rule = rule or PaperRule()
    packed = _packed(cache, query=query, expected=expected, scaling=scaling, rule=rule)
    names = cache.sizes.names
    heads = names["B"] * names["Hkv"]
    group, block = names["H"] // names["Hkv"], WARP * WARPS
    for kernel, blocks, threads in (
        ("paper_plan", 1, HEAD_DIM),
        ("paper_scores", names["splits"], block),
        ("paper_values", names["splits"], block),
        ("paper_merge", group, HEAD_DIM),
    ):
        cache.place.launch("paper.cu", kernel, packed, grid=(blocks, heads), block=(threads, 1))
    output: Array = cache.arrays["output"]
    return output


def bits_per_element(reads: NDArray[np.integer], lengths: NDArray[np.integer]) -> float:
    """Bits read of each stored number of keys and values, on average; 16 when all is read.

    Parameters
    ----------
    reads : int array [B, Hkv, 2, 3]
        Of a step: key channels and value rows of which each plane was read.
    lengths : int array [B]
    """
    tokens = lengths.astype(np.float64)[:, None]
    widths = np.array(PLANE_WIDTHS, np.float64)
    keys = (reads[:, :, 0] @ widths) * tokens
    values = (reads[:, :, 1] @ widths) * HEAD_DIM
    return float((keys + values).sum() / (2 * HEAD_DIM * reads.shape[1] * tokens.sum()))


def _packed(
    cache: PaperCache,
    *,
    query: Array | None = None,
    expected: Array | None = None,
    scaling: float = 0.0,
    rule: PaperRule = READ_ALL,
    keys: Array | None = None,
    values: Array | None = None,
) -> NDArray[np.void]:
    names = cache.sizes.names
    given = {
        **cache.arrays,
        "query": query,
        "expected": expected,
        "keys": keys,
        "values": values,
        "kv_heads": names["Hkv"],
        "capacity": names["T"],
        "splits": names["splits"],
        "scaling": scaling,
        "key_gap_of_two": rule.key_gaps[0],
        "key_gap_of_one": rule.key_gaps[1],
        "value_gap_of_two": rule.value_gaps[0],
        "value_gap_of_one": rule.value_gaps[1],
    }
    place = cache.place
    return pack("PaperArguments", place.spec, cache.sizes, given, device=place.device)
