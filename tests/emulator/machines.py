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

from alignedkv.kernels.codegen import generate
from alignedkv.kernels.config import DecodeConfig
from alignedkv.kernels.device import Place
from alignedkv.kernels.spec import DecodeSpec
from alignedkv.kernels.target import SM90

HEADER = Path(__file__).parent / "warps.h"
FLAGS = ("-O1", "-std=c++20", "-ffp-contract=off", "-fPIC", "-shared", "-w")
#: What stands for the instructions that the kernels spell in assembly.
INSTRUCTIONS = {
    r'asm\("cvt.f32.f16 [^;]*;[^;]*;': "_Float16 h; memcpy(&h, &bits, 2); value = h;",
    r'asm\("cvt.rn.f16.f32 [^;]*;[^;]*;': "_Float16 h = value; memcpy(&bits, &h, 2);",
    r'asm\("cvt.rn.bf16.f32 [^;]*;[^;]*;': "throw;",
}
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

    def of(
        spec: DecodeSpec, array: Any, config: DecodeConfig | None, stream: int | None
    ) -> EmulatedPlace:
        return EmulatedPlace(
            spec=spec,
            config=config or DecodeConfig(encode_warps=4),
            target=replace(SM90, sm_count=1),
            device=0,
            stream=SimpleNamespace(is_capturing=lambda: False, synchronize=lambda: None),
        )

    monkeypatch.setattr(Place, "of", of)


@functools.cache
def host_library(spec: DecodeSpec, config: DecodeConfig, file: str) -> ctypes.CDLL:
    """A CUDA file compiled for the host, with a function ``run_<kernel>`` for each kernel."""
    text = re.sub(r"#line.*", "", generate(spec, config, file))
    for pattern, meaning in INSTRUCTIONS.items():
        text = re.sub(pattern, meaning, text)
    kernels = re.findall(r'extern "C" __global__ void[^{;]*?(\w+)\(const __grid\w+ (\w+)', text)
    lines = [f'#include "{HEADER}"', text.replace('extern "C" __global__', "static __global__")]
    lines += [
        f'extern "C" void run_{kernel}(const {struct}* arguments, unsigned gx, unsigned gy,'
        " unsigned bx, unsigned by) {\n"
        f"  launch([=] {{ {kernel}(*arguments); }}, {{gx, gy, 1}}, {{bx, by, 1}});\n}}"
        for kernel, struct in kernels
    ]
    body = "\n".join(lines)
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
