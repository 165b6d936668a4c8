"""Two machines on which the same tests run: a GPU, and host threads that stand for one."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import re
import shutil
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from alignedkv.kernels.arrays import CacheArrays
from alignedkv.kernels.codegen import generate
from alignedkv.kernels.config import DecodeConfig
from alignedkv.kernels.device import Place
from alignedkv.kernels.spec import DecodeSpec
from alignedkv.kernels.target import SM90

HEADER = Path(__file__).parent / "warps.h"
FLAGS = ("-O1", "-std=c++20", "-ffp-contract=off", "-fPIC", "-shared", "-w")
#: What stands for an assembly statement of the kernels, by its text; ``{n}`` is operand n.
INSTRUCTIONS = {
    "": "",
    "mov.u32 %0, %%tid.x;": "{0} = threadIdx.x",
    "cvt.f32.f16 %0, %1;": "{0} = half_to_float({1})",
    "cvt.rn.f16.f32 %0, %1;": "{0} = float_to_half({1})",
    "cvt.rn.bf16.f32 %0, %1;": "{0} = float_to_bfloat16({1})",
    "ex2.approx.ftz.f32 %0, %1;": "{0} = std::exp2({1})",
    "lg2.approx.ftz.f32 %0, %1;": "{0} = std::log2({1})",
    "rcp.approx.ftz.f32 %0, %1;": "{0} = 1 / ({1})",
    "cp.async.cg.shared.global [%0 + %2], [%1 + %3], 16;": "copy({0} + {2}, {1}, {3}, 16, 16)",
    "cp.async.ca.shared.global [%0 + %2], [%1 + %3], %4;": "copy({0} + {2}, {1}, {3}, {4}, {4})",
    "{.reg .pred p; .reg .u32 n; setp.ne.u32 p, %4, 0; selp.u32 n, 16, 0, p;"
    "cp.async.cg.shared.global [%0 + %2], [%1 + %3], 16, n;}": (
        "copy({0} + {2}, {1}, {3}, {4} ? 16 : 0, 16)"
    ),
    "{.reg .pred p; .reg .u32 n; setp.ne.u32 p, %4, 0; selp.u32 n, %5, 0, p;"
    "cp.async.ca.shared.global [%0 + %2], [%1 + %3], %5, n;}": (
        "copy({0} + {2}, {1}, {3}, {4} ? {5} : 0, {5})"
    ),
    "cp.async.commit_group;": "",
    "cp.async.wait_group %0;": "",
    "griddepcontrol.wait;": "",
    "griddepcontrol.launch_dependents;": "",
    "{.reg .pred p; setp.ne.u32 p, %2, 0;@p red.shared.add.u32 [%0], %1;}": (
        "if ({2}) *reinterpret_cast<unsigned*>(dynamic + {0}) += {1}"
    ),
    "bar.sync 1, %0;": "wait_for({0})",
    "atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;": "{0} = std::exchange(*{1}, *{1} + 1)",
    "ld.global.v4.f32 {%0,%1,%2,%3}, [%4];": (
        "{0} = {4}->x, {1} = {4}->y, {2} = {4}->z, {3} = {4}->w"
    ),
    "ld.global.f32 %0, [%1];": "std::memcpy(&{0}, {1}, 4)",
    "ld.global.u32 %0, [%1];": "std::memcpy(&{0}, {1}, 4)",
    "st.global.f32 [%0], %1;": "std::memcpy({0}, &{1}, 4)",
    "st.global.u32 [%0], %1;": "std::memcpy({0}, &{1}, 4)",
    "lop3.b32 %0, %1, %2, %3, 0xe4;": "{0} = ({1} & {3}) | ({2} & ~{3})",
    "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];": (
        "load_transposed({{&{0}, &{1}, &{2}, &{3}}}, {4})"
    ),
    "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 "
    "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};": (
        "multiply_tiles<unsigned char>(d, {{{4}, {5}, {6}, {7}}}, {{{8}, {9}}})"
    ),
    "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 "
    "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};": (
        "d[0] = d[1] = d[2] = d[3] = 0;"
        "multiply_tiles<unsigned char>(d, {{{4}, {5}, {6}, {7}}}, {{{8}, {9}}})"
    ),
    "mma.sync.aligned.m16n8k16.row.col.s32.u8.s8.s32 "
    "{%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};": (
        "multiply_tiles<unsigned char>(d, {{{4}, {5}, 0, 0}}, {{{6}, 0}})"
    ),
    "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
    "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};": (
        "multiply_tiles<signed char>(d, {{{4}, {5}, {6}, {7}}}, {{{8}, {9}}})"
    ),
}
#: Which caches a load or store goes through changes nothing here.
_CACHES = re.compile(r"\b((?:ld|st)\.global)(?:\.(?:ca|cg|cs|nc|L1::no_allocate))+")
_KERNEL = re.compile(
    r'extern "C" __global__ void[^{;]*?(\w+)\(\s*const (?:__grid_constant__ )?(\w+) '
)
_ASSEMBLY = re.compile(r"asm(?: volatile)?\((?P<body>(?:[^;\"]|\"(?:[^\"\\]|\\.)*\")*)\);")
#: Host memory at the alignment that device memory has.
ALIGNMENT = 256


class HostArray:
    """A NumPy array that shows itself as a torch tensor on a GPU does."""

    def __init__(self, content: NDArray[Any], dtype: str) -> None:
        self.content = content
        self.shape = content.shape
        self.dtype = f"torch.{dtype}"
        self.device = SimpleNamespace(type="cuda", index=0)

    def data_ptr(self) -> int:
        return self.content.ctypes.data

    def stride(self) -> tuple[int, ...]:
        return tuple(step // self.content.itemsize for step in self.content.strides)

    def max(self) -> Any:
        return self.content.max()

    def transposed(self, *axes: int) -> HostArray:
        return HostArray(self.content.transpose(axes), self.dtype.removeprefix("torch."))


class EmulatedPlace(Place):
    """A place whose kernels are host code."""

    __slots__ = ()

    def zeros(self, shape: tuple[int, ...], dtype: str) -> HostArray:
        return Emulated().zeros(shape, dtype)

    def copy(self, array: HostArray) -> HostArray:
        return Emulated().put(array.content, array.dtype.removeprefix("torch."))

    def fill(self, array: HostArray, number: float) -> None:
        array.content[...] = number

    def scale(self, array: HostArray, source: HostArray, factor: float) -> None:
        array.content[...] = source.content * np.float32(factor)

    def launch(
        self,
        file: str,
        kernel: str,
        arguments: NDArray[np.void],
        *,
        grid: tuple[int, int],
        block: tuple[int, int],
        shared_bytes: int = 0,
        overlapping: bool = False,
    ) -> None:
        run = getattr(host_library(self.spec, self.config, file), f"run_{kernel}")
        run(ctypes.c_void_p(arguments.ctypes.data), *map(ctypes.c_uint, (*grid, *block)))


class Emulated:
    """Memory of the host threads."""

    def zeros(self, shape: tuple[int, ...], dtype: str) -> HostArray:
        held = np.dtype("uint16" if dtype == "bfloat16" else dtype)
        size = int(np.prod(shape)) * held.itemsize
        raw = np.zeros(size + ALIGNMENT, np.uint8)
        first = -raw.ctypes.data % ALIGNMENT
        return HostArray(raw[first : first + size].view(held).reshape(shape), dtype)

    def put(self, content: NDArray[Any], dtype: str | None = None) -> HostArray:
        array = self.zeros(content.shape, dtype or content.dtype.name)
        array.content[...] = content
        return array

    def get(self, array: HostArray) -> NDArray[Any]:
        return array.content

    def transposed(self, array: HostArray, *axes: int) -> HostArray:
        return array.transposed(*axes)


class Gpu:
    """Memory of a GPU, through CuPy."""

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Any:
        import cupy

        return cupy.zeros(shape, "uint16" if dtype == "bfloat16" else dtype)

    def put(self, content: NDArray[Any], dtype: str | None = None) -> Any:
        import cupy

        return cupy.array(content)

    def get(self, array: Any) -> NDArray[Any]:
        import cupy

        return cupy.asnumpy(array)

    def transposed(self, array: Any, *axes: int) -> Any:
        return array.transpose(axes)


Machine = Emulated | Gpu


def emulate_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every launch of this test run on host threads."""

    def configuration(spec: DecodeSpec, cache: CacheArrays) -> DecodeConfig:
        return DecodeConfig(warps=4, encode_warps=4)

    def of(
        spec: DecodeSpec, array: Any, config: DecodeConfig | None, stream: int | None
    ) -> EmulatedPlace:
        return EmulatedPlace(
            spec=spec,
            config=config or DecodeConfig(encode_warps=4),
            target=replace(SM90, sm_count=8),
            device=0,
            stream=SimpleNamespace(is_capturing=lambda: False, synchronize=lambda: None),
        )

    monkeypatch.setattr("alignedkv.kernels.launch.steps.configuration", configuration)
    monkeypatch.setattr(Place, "of", of)


@functools.cache
def host_library(spec: DecodeSpec, config: DecodeConfig, file: str, more: str = "") -> ctypes.CDLL:
    """A CUDA file compiled for the host, with a function ``run_<kernel>`` for each kernel.

    ``more`` is C++ behind it: functions that use what is in the file.
    """
    text = re.sub(r"#line.*", "", generate(spec, config, file))
    text = _ASSEMBLY.sub(_host_statement, text)
    text = text.replace("extern __shared__ __align__(128) u8 memory[];", "u8* memory = dynamic;")
    kernels = _KERNEL.findall(text)
    lines = [f'#include "{HEADER}"', text.replace('extern "C" __global__', "static __global__")]
    lines += [
        f'extern "C" void run_{kernel}(const {struct}* arguments, unsigned gx, unsigned gy,'
        " unsigned bx, unsigned by) {\n"
        f"  launch([=] {{ {kernel}(*arguments); }}, {{gx, gy, 1}}, {{bx, by, 1}});\n}}"
        for kernel, struct in kernels
    ]
    body = "\n".join([*lines, more])
    folder = Path(tempfile.mkdtemp(prefix="alignedkv-emulator-"))
    name = hashlib.sha256(body.encode()).hexdigest()[:16]
    source, library = folder / f"{name}.cpp", folder / f"{name}.so"
    source.write_text(body)
    command = ["g++", *FLAGS, str(source), "-o", str(library)]
    compiled = subprocess.run(command, capture_output=True, text=True, check=False)
    if compiled.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{compiled.stderr[:5000]}")
    loaded = ctypes.CDLL(str(library))
    shutil.rmtree(folder)
    return loaded


def _host_statement(assembly: re.Match[str]) -> str:
    """What stands for an assembly statement."""
    texts = re.findall(r'"((?:[^"\\]|\\.)*)"', assembly["body"].split(":", 1)[0])
    operands, rest = [], assembly["body"].split(":", 1)[1] if ":" in assembly["body"] else ""
    for found in re.finditer(r'"[=+]?[a-z]"\(', rest):
        depth, end = 1, found.end()
        while depth:
            depth += {"(": 1, ")": -1}.get(rest[end], 0)
            end += 1
        operands.append(f"({rest[found.end() : end - 1]})")
    text = _CACHES.sub(r"\1", "".join(texts).replace("\\n", ""))
    if text not in INSTRUCTIONS:
        raise NotImplementedError(f"INSTRUCTIONS has nothing for {text!r}")
    meaning = INSTRUCTIONS[text]
    return meaning.format(*operands) + ";"
