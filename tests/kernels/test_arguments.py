"""The structs as NumPy lays them out against the structs as a C++ compiler does."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from alignedkv.errors import CodegenError, LaunchError
from alignedkv.kernels import declarations
from alignedkv.kernels.arguments import Sizes, cache_values, new_rows, pack
from alignedkv.kernels.arrays import CacheArrays, HeadState, StepArguments
from alignedkv.kernels.codegen import CUDA_DIR, prologue
from alignedkv.kernels.compile import compile_text
from alignedkv.kernels.config import DecodeConfig
from alignedkv.kernels.declarations import layout, member_dtype, structs
from alignedkv.kernels.device_array import DeviceArray
from alignedkv.kernels.spec import DecodeSpec
from alignedkv.kernels.storage import allocate

SPEC = DecodeSpec(head_dim=80, group=3, stored_planes=3)
PAGED = DecodeSpec(head_dim=64, group=2, page_tokens=16, exact_rows=True)


class Tensor:
    """What a torch tensor on a GPU shows of itself, without a GPU."""

    def __init__(self, shape: tuple[int, ...], dtype: str, *, device: int = 0) -> None:
        self.shape = shape
        self.dtype = f"torch.{dtype}"
        self.device = SimpleNamespace(type="cuda", index=device)
        self.strides = tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))
        self.address = 1 << 20

    def data_ptr(self) -> int:
        return self.address

    def stride(self) -> tuple[int, ...]:
        return self.strides


def cache(spec: DecodeSpec, **sizes: Any) -> CacheArrays:
    return allocate(
        spec,
        batch=2,
        kv_heads=3,
        capacity=40,
        zeros=Tensor,
        put=lambda array: Tensor(array.shape, array.dtype.name),
        **sizes,
    )


@pytest.mark.parametrize("spec", [SPEC, PAGED], ids=["contiguous", "paged"])
def test_the_compiler_agrees_on_every_layout(spec: DecodeSpec) -> None:
    """Sizes and alignments of all members, and so their offsets: a difference would not compile."""
    lines = [prologue(spec, DecodeConfig()), CUDA_DIR.joinpath("dtypes.cuh").read_text()]
    declared = CUDA_DIR.joinpath("arguments.cuh").read_text()
    lines.append(re.sub(r"#include .*", "", declared))
    for name in structs():
        dtype = layout(name, spec)
        lines.append(f"static_assert(sizeof({name}) == {dtype.itemsize});")
        for member in structs()[name]:
            kind = dtype.fields[member.name][0]
            of = f"decltype({name}::{member.name})"
            lines.append(f"static_assert(sizeof({of}) == {kind.itemsize});")
            lines.append(f"static_assert(alignof({of}) == {kind.base.alignment});")
    compile_text("\n".join(lines), "arguments.cuh", "sm_90")


@pytest.mark.parametrize("spec", [SPEC, PAGED], ids=["contiguous", "paged"])
def test_declared_dtypes_and_shapes_are_those_of_allocate(spec: DecodeSpec) -> None:
    given = cache(spec, **({"exact_first": 2, "exact_last": 3} if spec.exact_rows else {}))
    sizes = Sizes.of(spec, given)
    for member in structs()["Cache"]:
        value = getattr(given, member.name, None)
        if member.pointer and value is not None:
            for plane, array in enumerate(value if member.count else (value,)):
                assert array.shape == sizes.shape(member.shape, plane), member.name
                assert array.dtype == f"torch.{member_dtype(member, spec)}", member.name


def test_structs_follow_the_dataclasses() -> None:
    for struct, part in (("Cache", CacheArrays), ("State", HeadState), ("Step", StepArguments)):
        declared = [member.name for member in structs()[struct]]
        missing = [name for name in part.__slots__ if name not in declared]
        assert missing == [], f"{struct} lacks fields of {part.__name__}"


def test_packing_puts_values_where_they_belong() -> None:
    given = cache(SPEC)
    given.key_planes[1].address = 0x1230
    rows = Tensor((2, 3, 5, 80), "bfloat16")
    rows.strides = (9, 8, 7, 1)
    sizes = Sizes.of(SPEC, given, S=5)
    values = {"cache": cache_values(SPEC, given), "rows": new_rows(rows, rows)}
    packed = pack("EncodeArguments", SPEC, sizes, values, device=0)
    assert packed["cache"]["key_planes"].tolist() == [1 << 20, 0x1230, 1 << 20]
    assert packed["cache"]["block_table"] == 0
    assert packed["cache"]["capacity"] == 40
    assert packed["rows"]["key_strides"].tolist() == [9, 8, 7]
    assert packed["rows"]["tokens"] == 5
    values["cache"] = packed["cache"]
    assert pack("EncodeArguments", SPEC, sizes, values, device=0) == packed


def spoil(part: Any, **changes: Any) -> Any:
    for name, value in changes.items():
        setattr(part, name, value)
    return part


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "torch.float32"}, "lengths is float32: give int32"),
        ({"shape": (3,)}, r"lengths has shape \(3,\): give \(2,\)"),
        ({"strides": (2,)}, "lengths has strides .*contiguous"),
        ({"address": (1 << 20) + 4}, "lengths begins at address 0x100004"),
        (
            {"device": SimpleNamespace(type="cuda", index=1)},
            "lengths is on GPU 1: move",
        ),
        ({"device": SimpleNamespace(type="cpu", index=None)}, "lengths is on .*move it to the GPU"),
    ],
)
def test_a_wrong_array_is_named(change: dict[str, Any], message: str) -> None:
    given = cache(SPEC)
    spoil(given.lengths, **change)
    with pytest.raises(LaunchError, match=message):
        pack("Cache", SPEC, Sizes.of(SPEC, given), cache_values(SPEC, given), device=0)


def test_host_arrays_are_refused() -> None:
    with pytest.raises(LaunchError, match="keys is a ndarray: give a torch or CuPy array"):
        DeviceArray.of("keys", np.zeros(3))


def test_parts_must_suit_the_spec() -> None:
    contiguous = cache(SPEC)
    with pytest.raises(LaunchError, match="block_table is missing"):
        cache_values(DecodeSpec(head_dim=80, group=3, page_tokens=16), contiguous)
    paged = cache(PAGED, exact_first=1)
    with pytest.raises(LaunchError, match="block_table is given"):
        cache_values(DecodeSpec(head_dim=64, group=2, exact_rows=True), paged)
    with pytest.raises(LaunchError, match=r"keys has shape \(2, 3\): give \[B, Hkv, S, D\]"):
        new_rows(Tensor((2, 3), "bfloat16"), Tensor((2, 3, 4, 5), "bfloat16"))


def test_rows_with_gaps_between_channels_are_refused() -> None:
    given = cache(SPEC)
    rows = spoil(Tensor((2, 3, 5, 80), "bfloat16"), strides=(2400, 800, 160, 2))
    values = {"cache": cache_values(SPEC, given), "rows": new_rows(rows, rows)}
    with pytest.raises(LaunchError, match=r"keys has strides .*last dimension is contiguous"):
        pack("EncodeArguments", SPEC, Sizes.of(SPEC, given, S=5), values, device=0)


def test_lines_that_declare_nothing_are_refused() -> None:
    with pytest.raises(CodegenError, match=r"'int f\(\);' declares no member"):
        declarations._members("Cache", "  int f();\n")
    with pytest.raises(CodegenError, match=r"Cache\.x: a pointer needs a shape"):
        declarations._members("Cache", "  float* x;  // of no shape\n")
