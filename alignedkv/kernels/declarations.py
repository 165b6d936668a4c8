"""The structs of ``cuda/arguments.cuh``, the one list of kernel arguments, as Python reads them."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, fields
from typing import Final

import numpy as np

from alignedkv.errors import CodegenError
from alignedkv.kernels.codegen import CUDA_DIR, constant_name
from alignedkv.kernels.spec import DecodeSpec

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
