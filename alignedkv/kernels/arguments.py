"""Kernel arguments, laid out as ``cuda/arguments.cuh`` declares them.

That file is the one list of arguments.  Here its structs are read, given the layout that the C++
compiler gives them, and filled: a member's value is found by its name, and an array is checked
against the dtype and the shape of its declaration before its address goes to the device.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from alignedkv.errors import CodegenError, LaunchError
from alignedkv.kernels.arrays import Array, CacheArrays
from alignedkv.kernels.codegen import CUDA_DIR, constant_name
from alignedkv.kernels.device_array import ALIGNMENT, DeviceArray, check_dtype, check_place
from alignedkv.kernels.footprint import partial_floats, query_bytes
from alignedkv.kernels.spec import DecodeSpec
from alignedkv.planes import row_bytes

#: C++ number types of the declarations and NumPy's names for them.
_NUMBERS: Final = {
    "u8": "uint8",
    "u16": "uint16",
    "u32": "uint32",
    "u64": "uint64",
    "i16": "int16",
    "i32": "int32",
    "i64": "int64",
    "float": "float32",
    "double": "float64",
}
Zeros = Callable[[tuple[int, ...], str], Array]
_POINTER: Final = np.dtype(np.uint64)

_STRUCT = re.compile(r"^struct (\w+) \{$(.*?)^\};$", re.MULTILINE | re.DOTALL)
_MEMBER = re.compile(
    r"^  (?P<type>\w+)(?P<pointer>\*?) (?P<name>\w+)(?:\[(?P<count>\w+)\])?;"
    r"(?: *// *(?:\[(?P<shape>[^\]]*)\](?P<strided> strided)?(?P<nullable> or null)?)?.*)?$"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One member of a struct.

    Attributes
    ----------
    name : str
    type : str
        A number type, ``RowBits``, ``QueryBits``, or the name of a struct.
    pointer : bool
    count : str or None
        Elements of an array member, a number or the name of a constant.
    shape : tuple of str or None
        Terms of the shape that a pointer's array must have.
    nullable : bool
        Whether the array may be absent.
    strided : bool
        Whether only its last dimension must be contiguous.
    """

    name: str
    type: str
    pointer: bool
    count: str | None
    shape: tuple[str, ...] | None
    nullable: bool
    strided: bool


@dataclass(frozen=True, slots=True, kw_only=True)
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
        """Sizes of a cache; ``more`` adds those of a launch, such as S."""
        batch, kv_heads, head_dim = cache.key_mean.shape
        rows = tuple(int(n) for n in cache.scales.shape)
        pages = 0 if cache.block_table is None else int(cache.block_table.shape[1])
        widths = spec.layout.widths[: spec.stored_planes]
        names = {
            "B": int(batch),
            "Hkv": int(kv_heads),
            "H": int(kv_heads) * spec.group,
            "G": spec.group,
            "T": rows[2] if spec.page_tokens is None else pages * spec.page_tokens,
            "D": head_dim,
            "C": spec.channels,
            "N": spec.stored_planes,
            "P": spec.dither_rows,
            "max_pages": pages,
            "exact_slots": cache.exact_first + cache.exact_last,
            "query_bytes": query_bytes(spec),
            "partial_floats": partial_floats(spec),
            **more,
        }
        plane_bytes = tuple(row_bytes(spec.channels, width) for width in widths)
        return cls(names=names, rows=rows, plane_bytes=plane_bytes)

    def shape(self, terms: tuple[str, ...], plane: int = 0) -> tuple[int, ...]:
        """Numbers of a declared shape; ``plane`` says which plane's rows ``plane_bytes`` means."""
        out: list[int] = []
        for term in terms:
            if term == "*rows":
                out += self.rows
                continue
            names = {**self.names, "plane_bytes": self.plane_bytes[plane]}
            factors = (factor.strip() for factor in term.split("*"))
            out.append(math.prod(int(f) if f.isdecimal() else names[f] for f in factors))
        return tuple(out)


@functools.cache
def structs() -> dict[str, tuple[Member, ...]]:
    """The structs of ``cuda/arguments.cuh`` by name.

    Raises
    ------
    CodegenError
        If a line of a struct is no member, or a pointer has no shape.
    """
    text = (CUDA_DIR / "arguments.cuh").read_text()
    return {name: tuple(_members(name, body)) for name, body in _STRUCT.findall(text)}


def _members(struct: str, body: str) -> list[Member]:
    members = []
    for line in filter(str.strip, body.splitlines()):
        found = _MEMBER.match(line)
        if found is None:
            raise CodegenError(f"arguments.cuh, {struct}: {line.strip()!r} declares no member")
        shape = found["shape"]
        if found["pointer"] and shape is None:
            raise CodegenError(f"arguments.cuh, {struct}.{found['name']}: a pointer needs a shape")
        members.append(
            Member(
                name=found["name"],
                type=found["type"],
                pointer=bool(found["pointer"]),
                count=found["count"],
                shape=tuple(t.strip() for t in shape.split(",")) if found["pointer"] else None,
                nullable=bool(found["nullable"]),
                strided=bool(found["strided"]),
            )
        )
    return members


@functools.cache
def layout(struct: str, spec: DecodeSpec) -> np.dtype[np.void]:
    """NumPy dtype of a struct, with the C++ compiler's offsets and size."""
    members = []
    for member in structs()[struct]:
        kind = (
            _POINTER
            if member.pointer
            else layout(member.type, spec)
            if member.type in structs()
            else np.dtype(_NUMBERS[member.type])
        )
        count = () if member.count is None else (_count(member.count, spec),)
        members.append((member.name, kind, count))
    return np.dtype(members, align=True)


def _count(text: str, spec: DecodeSpec) -> int:
    """Elements of an array member: a number or a constant of the spec."""
    if text.isdecimal():
        return int(text)
    by_constant = {constant_name(f.name): getattr(spec, f.name) for f in fields(spec)}
    return int(by_constant[text])


def member_dtype(member: Member, spec: DecodeSpec) -> str:
    """dtype of the numbers that a pointer points to, by NumPy's name or "bfloat16"."""
    if member.type == "RowBits":
        return spec.row_dtype
    if member.type == "QueryBits":
        return spec.query_dtype
    return _NUMBERS[member.type]


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
    for member in structs()[struct]:
        value = values[member.name]
        if member.pointer:
            arrays = value if member.count else (value,)
            addresses = [
                _address(member, array, sizes, plane, spec, device)
                for plane, array in enumerate(arrays)
            ]
            packed[member.name] = addresses if member.count else addresses[0]
        elif member.type in structs() and isinstance(value, Mapping):
            packed[member.name] = pack(member.type, spec, sizes, value, device=device)
        else:
            packed[member.name] = value
    return packed


def _address(
    member: Member, array: Array, sizes: Sizes, plane: int, spec: DecodeSpec, device: int
) -> int:
    """Address of a member's array once it has been checked; 0 for one that may be absent and is."""
    if array is None:
        if member.nullable:
            return 0
        raise LaunchError(f"{member.name} is missing: give an array")
    seen = DeviceArray.of(member.name, array)
    check_dtype(member.name, seen, member_dtype(member, spec))
    shape = sizes.shape(member.shape or (), plane)
    if seen.shape != shape:
        raise LaunchError(f"{member.name} has shape {seen.shape}: give {shape}")
    if not (seen.has_contiguous_rows() if member.strided else seen.is_contiguous()):
        wanted = "an array whose last dimension is" if member.strided else "an array that is"
        raise LaunchError(f"{member.name} has strides {seen.strides}: give {wanted} contiguous")
    check_place(member.name, seen, device, 4 if member.strided else ALIGNMENT)
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
