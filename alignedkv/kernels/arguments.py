"""Kernel arguments: values put where ``cuda/arguments.cuh`` declares them, once they are checked.

A member's value is found by its name.  An array must have the dtype and the shape of its
declaration, lie in order and on the right GPU, before its address goes to the device.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from alignedkv.errors import LaunchError
from alignedkv.kernels.arrays import Array, CacheArrays
from alignedkv.kernels.declarations import Member, layout, member_dtype, structs
from alignedkv.kernels.device_array import (
    ALIGNMENT,
    DeviceArray,
    contiguous_strides,
    names_of_dtype,
)
from alignedkv.kernels.footprint import partial_floats, query_bytes
from alignedkv.kernels.spec import DecodeSpec
from alignedkv.planes import row_bytes

Zeros = Callable[[tuple[int, ...], str], Array]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sizes:
    """What the names in shapes mean.

    Attributes
    ----------
    names : dict of str to int
    rows : tuple of int
        The dimensions that hold tokens.
    plane_bytes : tuple of int
        Bytes of a row of each stored plane.
    """

    names: Mapping[str, int]
    rows: tuple[int, ...]
    plane_bytes: tuple[int, ...]

    @classmethod
    def of(cls, spec: DecodeSpec, cache: CacheArrays, **more: int) -> Sizes:
        """Sizes of a cache, one object for equal ones; ``more`` adds those of a launch, as S."""
        table = cache.block_table
        return _sizes(
            spec,
            tuple(cache.key_mean.shape),
            tuple(cache.scales.shape),
            0 if table is None else int(table.shape[1]),
            cache.exact_first + cache.exact_last,
            tuple(more.items()),
        )

    def shape(self, terms: tuple[str, ...], plane: int = 0) -> tuple[int, ...]:
        """Numbers of a declared shape; ``plane`` says which plane's rows ``plane_bytes`` means."""
        names = dict(self.names)
        if "plane_bytes" in terms:
            names["plane_bytes"] = self.plane_bytes[plane]
        out: list[int] = []
        for term in terms:
            if term == "*rows":
                out += self.rows
                continue
            factors = (factor.strip() for factor in term.split("*"))
            out.append(math.prod(int(f) if f.isdecimal() else names[f] for f in factors))
        return tuple(out)


@functools.lru_cache(maxsize=256)
def _sizes(
    spec: DecodeSpec,
    heads: tuple[int, int, int],
    rows: tuple[int, ...],
    max_pages: int,
    exact_slots: int,
    more: tuple[tuple[str, int], ...],
) -> Sizes:
    batch, kv_heads, head_dim = heads
    names = {
        "B": batch,
        "Hkv": kv_heads,
        "H": kv_heads * spec.group,
        "G": spec.group,
        "subgroups": spec.subgroups,
        "T": rows[2] if spec.page_tokens is None else max_pages * spec.page_tokens,
        "D": head_dim,
        "C": spec.channels,
        "N": spec.stored_planes,
        "P": spec.dither_rows,
        "max_pages": max_pages,
        "exact_slots": exact_slots,
        "query_bytes": query_bytes(spec),
        "partial_floats": partial_floats(spec),
        **dict(more),
    }
    widths = spec.layout.widths[: spec.stored_planes]
    plane_bytes = tuple(row_bytes(spec.channels, width) for width in widths)
    return Sizes(names=names, rows=rows, plane_bytes=plane_bytes)


class _Expected(NamedTuple):
    """What an array must be."""

    name: str
    dtypes: tuple[str, ...]
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    nullable: bool
    strided: bool


@functools.lru_cache(maxsize=1024)
def _expected(struct: str, spec: DecodeSpec, sizes: Sizes) -> dict[str, tuple[_Expected, ...]]:
    """What the arrays of a struct must be, by the member's name: one for each of its elements."""
    return {
        member.name: tuple(
            _expected_array(member, spec, sizes, plane)
            for plane in range(spec.stored_planes if member.count else 1)
        )
        for member in structs()[struct]
        if member.pointer
    }


def _expected_array(member: Member, spec: DecodeSpec, sizes: Sizes, plane: int) -> _Expected:
    shape = sizes.shape(member.shape or (), plane)
    return _Expected(
        name=member.name,
        dtypes=names_of_dtype(member_dtype(member, spec)),
        shape=shape,
        strides=contiguous_strides(shape),
        nullable=member.nullable,
        strided=member.strided,
    )


def allocate_struct(
    struct: str, spec: DecodeSpec, sizes: Sizes, zeros: Zeros, *, without: Container[str] = ()
) -> dict[str, Array]:
    """Zeroed arrays of the declared dtypes and shapes, one per pointer of a struct.

    Parameters
    ----------
    zeros : callable
        ``zeros(shape, dtype)`` -> zeroed array.
    without : names
        Of pointers that are not wanted.
    """
    return {
        member.name: zeros(sizes.shape(member.shape or ()), member_dtype(member, spec))
        for member in structs()[struct]
        if member.pointer and member.name not in without
    }


def pack(
    struct: str, spec: DecodeSpec, sizes: Sizes, values: Mapping[str, Any], *, device: int
) -> NDArray[np.void]:
    """Fill a struct.

    Parameters
    ----------
    struct : str
        Its name in ``cuda/arguments.cuh``.
    spec : DecodeSpec
    sizes : Sizes
    values : mapping
        A value per member: a number, an array, a tuple of either for an array member, a mapping or
        a packed struct for a member that is a struct.
    device : int
        GPU on which all arrays must be.

    Returns
    -------
    structured array []
        To be passed to a kernel by value.

    Raises
    ------
    LaunchError
        If an array has another dtype, shape, layout, alignment or device than declared.
    """
    packed = np.zeros((), layout(struct, spec))
    expected = _expected(struct, spec, sizes)
    for member in structs()[struct]:
        value = values[member.name]
        if member.pointer:
            wanted, arrays = expected[member.name], value if member.count else (value,)
            if len(arrays) != len(wanted):
                raise LaunchError(f"{member.name} has {len(arrays)} arrays: give {len(wanted)}")
            addresses = [_address(*pair, device) for pair in zip(wanted, arrays, strict=True)]
            packed[member.name] = addresses if member.count else addresses[0]
        elif isinstance(value, Mapping):
            packed[member.name] = pack(member.type, spec, sizes, value, device=device)
        else:
            packed[member.name] = value
    return packed


def _address(expected: _Expected, array: Array, device: int) -> int:
    """Address of an array once it has been checked; 0 for one that may be absent and is."""
    name = expected.name
    if array is None:
        if expected.nullable:
            return 0
        raise LaunchError(f"{name} is missing: give an array")
    seen = DeviceArray.of(name, array)
    if seen.dtype not in expected.dtypes:
        raise LaunchError(f"{name} is {seen.dtype}: give {' or '.join(expected.dtypes)}")
    if seen.shape != expected.shape:
        raise LaunchError(f"{name} has shape {seen.shape}: give {expected.shape}")
    if seen.strides != expected.strides:
        fits = seen.has_contiguous_rows() if expected.strided else seen.is_contiguous()
        if not fits:
            wanted = "an array whose last dimension is" if expected.strided else "an array that is"
            raise LaunchError(f"{name} has strides {seen.strides}: give {wanted} contiguous")
    if seen.device != device:
        raise LaunchError(f"{name} is on GPU {seen.device}: move it to GPU {device}")
    if seen.address % ALIGNMENT and not expected.strided:
        raise LaunchError(
            f"{name} begins at address {seen.address:#x}: give one that is a multiple of "
            f"{ALIGNMENT}, such as a copy has"
        )
    return seen.address


def cache_values(spec: DecodeSpec, cache: CacheArrays) -> dict[str, Any]:
    """Values of ``struct Cache``.

    Raises
    ------
    LaunchError
        If a part that the spec needs is missing, or one that it does not know is given.
    """
    for name, wanted in (
        ("block_table", spec.page_tokens is not None),
        ("exact_keys", spec.exact_rows),
        ("exact_values", spec.exact_rows),
    ):
        if (getattr(cache, name) is not None) != wanted:
            given = "given" if not wanted else "missing"
            raise LaunchError(
                f"{name} is {given}, but the spec has page_tokens={spec.page_tokens} and "
                f"exact_rows={spec.exact_rows}: allocate the cache from the same spec"
            )
    names = Sizes.of(spec, cache).names
    return {
        **as_mapping(cache),
        "kv_heads": names["Hkv"],
        "capacity": names["T"],
        "max_pages": names["max_pages"],
    }


def new_rows(keys: Array, values: Array) -> dict[str, Any]:
    """Values of ``struct NewRows`` for keys and values [B, Hkv, S, D]."""
    seen = {name: DeviceArray.of(name, rows) for name, rows in (("keys", keys), ("values", values))}
    for name, rows in seen.items():
        if len(rows.shape) != 4:
            raise LaunchError(f"{name} has shape {rows.shape}: give [B, Hkv, S, D]")
    return {
        "keys": keys,
        "values": values,
        "key_strides": seen["keys"].strides[:3],
        "value_strides": seen["values"].strides[:3],
        "tokens": seen["keys"].shape[2],
    }


def as_mapping(part: object) -> dict[str, Any]:
    """A dataclass as the mapping that `pack` takes; values are not copied."""
    return {f.name: getattr(part, f.name) for f in fields(part)}  # type: ignore[arg-type]
