"""Rows in and rows out: encode, fit, dequantise."""

from __future__ import annotations

from alignedkv.errors import LaunchError
from alignedkv.kernels.arguments import Sizes, cache_values, new_rows, pack
from alignedkv.kernels.arrays import Array, CacheArrays
from alignedkv.kernels.config import WARP, DecodeConfig
from alignedkv.kernels.device import Place
from alignedkv.kernels.spec import DecodeSpec

#: Rows that a block of `fit` reads at once; ``kFitRows`` of encode.cu.
FIT_ROWS = 32
MAX_GRID_Y = 65535


def encode(
    spec: DecodeSpec,
    cache: CacheArrays,
    keys: Array,
    values: Array,
    *,
    config: DecodeConfig | None = None,
    stream: int | None = None,
) -> None:
    """Append rows to a cache, in place, and advance its lengths.

    Parameters
    ----------
    spec : DecodeSpec
    cache : CacheArrays
    keys, values : arrays [B, Hkv, S, D] in row_dtype
        Rows may be strided; the channels of a row lie side by side.
    config : DecodeConfig, optional
    stream : int, optional
        Handle of a CUDA stream.

    Raises
    ------
    LaunchError
        If an array is not what the spec and the cache take, or the cache has no room.

    Notes
    -----
    A row with NaN or infinity is no error here, where nobody looks at numbers: its scale becomes
    infinite, and every step that attends to it reports a miss.
    """
    place = Place.of(spec, cache.scales, config, stream)
    rows = new_rows(keys, values)
    sizes = Sizes.of(spec, cache, S=rows["tokens"])
    given = {"cache": cache_values(spec, cache), "rows": rows}
    packed = pack("EncodeArguments", spec, sizes, given, device=place.device)
    _check_room(place, cache, sizes)
    if sizes.names["S"]:
        grid, block = _row_launch(place, sizes)
        place.launch("encode.cu", "encode", packed, grid=grid, block=block)
        place.launch("encode.cu", "advance", packed, grid=(sizes.names["B"], 1), block=(1, 1))


def fit_transforms(
    spec: DecodeSpec,
    cache: CacheArrays,
    keys: Array,
    values: Array,
    query_size: Array | None = None,
    *,
    config: DecodeConfig | None = None,
    stream: int | None = None,
) -> None:
    """Set the key mean, the balance and the value mean from rows about to be encoded.

    Parameters
    ----------
    spec, cache, keys, values, config, stream
        As for `encode`.  The cache must be empty: what it holds was encoded with other means.
    query_size : float32 array [B, Hkv, D], optional
        Mean |q| of each channel; without it the balance stays as it is.

    Notes
    -----
    Rows before ``starts`` and numbers that are not finite do not count.
    """
    place = Place.of(spec, cache.scales, config, stream)
    rows = new_rows(keys, values)
    sizes = Sizes.of(spec, cache, S=rows["tokens"])
    given = {"cache": cache_values(spec, cache), "rows": rows, "query_size": query_size}
    packed = pack("FitArguments", spec, sizes, given, device=place.device)
    heads, channel_blocks = _heads(sizes), -(-spec.head_dim // WARP)
    grid, block = (channel_blocks, heads), (WARP, FIT_ROWS)
    place.launch("encode.cu", "fit", packed, grid=grid, block=block)
    if query_size is not None:
        block = (spec.head_dim, 1)
        place.launch("encode.cu", "fit_balance", packed, grid=(heads, 1), block=block)


def dequantise(
    spec: DecodeSpec,
    cache: CacheArrays,
    *,
    tokens: int,
    out: tuple[Array, Array] | None = None,
    config: DecodeConfig | None = None,
    stream: int | None = None,
) -> tuple[Array, Array]:
    """Keys and values of tokens 0 .. ``tokens`` - 1 as all stored planes (or exact rows) tell them.

    Parameters
    ----------
    spec, cache, config, stream
        As for `encode`.
    tokens : int
        S.
    out : pair of float32 arrays [B, Hkv, S, D], optional
        Where to write; CuPy arrays are made if not given.

    Returns
    -------
    keys, values : float32 arrays [B, Hkv, S, D]
        0 for tokens that no sequence attends to (padding, beyond the length).
    """
    place = Place.of(spec, cache.scales, config, stream)
    sizes = Sizes.of(spec, cache, S=tokens)
    if out is None:
        shape = (sizes.names["B"], sizes.names["Hkv"], tokens, spec.head_dim)
        out = (place.zeros(shape, "float32"), place.zeros(shape, "float32"))
    if tokens:
        given = {
            "cache": cache_values(spec, cache),
            "keys": out[0],
            "values": out[1],
            "tokens": tokens,
        }
        packed = pack("DequantiseArguments", spec, sizes, given, device=place.device)
        grid, block = _row_launch(place, sizes)
        place.launch("dequantise.cu", "dequantise", packed, grid=grid, block=block)
    return out


def _heads(sizes: Sizes) -> int:
    """KV heads of the batch, one row of a grid each."""
    heads = sizes.names["B"] * sizes.names["Hkv"]
    if heads > MAX_GRID_Y:
        raise LaunchError(f"{heads} KV heads in a batch: give at most {MAX_GRID_Y}")
    return heads


def _row_launch(place: Place, sizes: Sizes) -> tuple[tuple[int, int], tuple[int, int]]:
    """Grid and block of the kernels in which a warp works on one token of S."""
    warps = place.config.encode_warps
    return (-(-sizes.names["S"] // warps), _heads(sizes)), (WARP * warps, 1)


def _check_room(place: Place, cache: CacheArrays, sizes: Sizes) -> None:
    """Raise LaunchError where S more tokens do not fit; blind while a graph is captured."""
    if place.stream.is_capturing():
        return
    place.stream.synchronize()
    longest = int(cache.lengths.max()) + sizes.names["S"]
    if longest > sizes.names["T"]:
        raise LaunchError(
            f"{sizes.names['S']} more tokens make {longest}, but the cache has room for "
            f"{sizes.names['T']}: allocate a larger one"
        )
