"""Source text -> cubin by NVRTC, without a driver; a disk cache that processes share.

NVRTC and CuPy come as wheels, so kernels compile, and their registers and spills are read, on any
machine.  Only `load` needs a GPU.

A cache entry is a directory named by its key that holds the generated source, the cubin and
``resources.json``, written in this order, each by an atomic rename.  The last one makes the entry
valid: it repeats the key and has the digest of the cubin.  Two processes that compile the same
entry at once therefore need no lock: the later one overwrites like with like, and a reader that
catches a mixture sees a wrong digest and compiles for itself.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from alignedkv.errors import CompileError
from alignedkv.kernels.cache_folder import cache_directory, write_files
from alignedkv.kernels.codegen import generate
from alignedkv.kernels.config import KERNEL_TUNABLES, DecodeConfig
from alignedkv.kernels.spec import DecodeSpec

_log = logging.getLogger(__name__)

#: Division and square root stay IEEE: kernels that want approximations ask by name.  Unused
#: constants are no warning (177), since every file gets the same ones.  All is device code, the
#: bodies of unrolled loops (lambdas) too, which have no place for a ``__device__``.
OPTIONS = (
    "--std=c++17",
    "--device-as-default-execution-space",
    "--generate-line-info",
    "--diag-suppress=177",
    "--ptxas-options=-v",
)
_INSTALL = "pip install 'alignedkv[cuda13]' (or [cuda12] for drivers older than series 580)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What one kernel takes, as ptxas tells it.

    Attributes
    ----------
    registers : int
        Per thread.
    spill_store_bytes, spill_load_bytes, stack_bytes : int
        Per thread; all 0 in a healthy kernel.
    shared_bytes : int
        Static shared memory per block.
    """

    registers: int
    spill_store_bytes: int
    spill_load_bytes: int
    stack_bytes: int
    shared_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Binary:
    """A compiled file.

    Attributes
    ----------
    source, cubin : Path
        The generated text and the binary, beside each other.
    resources : dict
        By kernel name.
    """

    source: Path
    cubin: Path
    resources: dict[str, Resources]


def build(spec: DecodeSpec, config: DecodeConfig, file: str, arch: str) -> Binary:
    """Compile ``cuda/<file>``, or take it from the cache.

    Parameters
    ----------
    spec : DecodeSpec
    config : DecodeConfig
        Legal for the target (`legality.check_legal`).
    file : str
        Such as "decode.cu".
    arch : str
        Such as "sm_90" (`DeviceTarget.arch`).

    Raises
    ------
    CompileError
        If the compiler is missing, cannot serve ``arch`` or rejects the source.

    Notes
    -----
    A damaged or foreign entry is compiled again and logged.  Where the cache folder cannot be
    written (read-only, full), the binary goes to a temporary folder of this process, and that is
    logged too.
    """
    text = generate(spec, config, file)
    key = cache_key(spec, config, file, arch, text)
    stem = Path(file).stem
    entry = cache_directory() / f"{stem}-{arch}-{key[:40]}"
    known = _read(entry, stem, key)
    if known is not None:
        return known
    try:
        cubin, log = compile_text(text, file, arch)
    except CompileError as error:
        source = write_files(entry, {file: text.encode()}) / file
        raise CompileError(f"{error}\nsource: {source}") from error
    resources = parse_resources(log)
    facts = {
        "key": key,
        "sha256": hashlib.sha256(cubin).hexdigest(),
        "resources": {name: asdict(each) for name, each in resources.items()},
    }
    folder = write_files(
        entry,
        {
            file: text.encode(),
            f"{stem}.cubin": cubin,
            "resources.json": json.dumps(facts, indent=1).encode(),
        },
    )
    return Binary(source=folder / file, cubin=folder / f"{stem}.cubin", resources=resources)


def cache_key(spec: DecodeSpec, config: DecodeConfig, file: str, arch: str, text: str) -> str:
    """sha256 of all that the binary depends on, as hexadecimal digits."""
    facts = {
        "spec": asdict(spec),
        "config": {name: getattr(config, name) for name in KERNEL_TUNABLES},
        "file": file,
        "arch": arch,
        "compiler": compiler_version(),
        "options": OPTIONS,
        "source": text,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def compiler_version() -> tuple[int, int]:
    """(major, minor) of NVRTC.

    Raises
    ------
    CompileError
        If CuPy or NVRTC is not installed.
    """
    return _nvrtc()[1]


def compile_text(text: str, name: str, arch: str) -> tuple[bytes, str]:
    """Compile CUDA C++ to a cubin.

    Parameters
    ----------
    text : str
    name : str
        The file's name in messages.
    arch : str
        Such as "sm_90".

    Returns
    -------
    cubin : bytes
    log : str
        With ptxas' lines about every kernel.

    Raises
    ------
    CompileError
        If the compiler is missing or rejects the source; ends with the compiler's log.
    """
    nvrtc, version = _nvrtc()
    program = nvrtc.createProgram(text, name, (), ())
    try:
        nvrtc.compileProgram(program, (f"--gpu-architecture={arch}", *OPTIONS))
        return nvrtc.getCUBIN(program), nvrtc.getProgramLog(program)
    except nvrtc.NVRTCError as error:
        log = nvrtc.getProgramLog(program).rstrip("\0\n ")
        raise CompileError(
            f"NVRTC {version[0]}.{version[1]} cannot compile {name} for {arch}: {error}\n{log}"
        ) from error
    finally:
        nvrtc.destroyProgram(program)


def parse_resources(log: str) -> dict[str, Resources]:
    """What ptxas' ``-v`` says of each kernel; functions that a kernel calls count as its own."""
    found: dict[str, dict[str, int]] = {}
    kernel = dict.fromkeys(Resources.__slots__, 0)
    for line in log.splitlines():
        if entry := re.search(r"Compiling entry function '(\w+)'", line):
            kernel = found.setdefault(entry[1], dict.fromkeys(Resources.__slots__, 0))
        if frame := re.search(r"(\d+) bytes stack frame, (\d+) .*stores, (\d+) .*loads", line):
            names = ("stack_bytes", "spill_store_bytes", "spill_load_bytes")
            for name, number in zip(names, frame.groups(), strict=True):
                kernel[name] += int(number)
        if used := re.search(r"Used (\d+) registers", line):
            kernel["registers"] = int(used[1])
            shared = re.search(r"(\d+) bytes smem", line)
            kernel["shared_bytes"] = int(shared[1]) if shared else 0
    return {name: Resources(**numbers) for name, numbers in found.items()}


@functools.cache
def load(spec: DecodeSpec, config: DecodeConfig, file: str, arch: str, device: int) -> Any:
    """The compiled file as a ``cupy.RawModule``, built and loaded once per process and GPU.

    Parameters
    ----------
    spec, config, file, arch
        As for `build`.
    device : int
        The current GPU.

    Raises
    ------
    CompileError
        As `build` does.
    """
    import cupy

    return cupy.RawModule(path=str(build(spec, config, file, arch).cubin))


@functools.cache
def _nvrtc() -> tuple[ModuleType, tuple[int, int]]:
    try:
        from cupy.cuda import nvrtc

        return nvrtc, nvrtc.getVersion()
    except (ImportError, OSError, RuntimeError) as error:
        raise CompileError(f"no CUDA compiler: {error}. Do: {_INSTALL}") from error


def _read(entry: Path, stem: str, key: str) -> Binary | None:
    """The cached binary; None if there is none or it cannot be trusted."""
    cubin = entry / f"{stem}.cubin"
    if not (entry / "resources.json").exists():
        return None
    try:
        facts = json.loads((entry / "resources.json").read_text())
        digest = hashlib.sha256(cubin.read_bytes()).hexdigest()
        if facts["key"] != key or facts["sha256"] != digest:
            raise ValueError("its key or the digest of its cubin does not match")
        resources = {name: Resources(**each) for name, each in facts["resources"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _log.warning("cache entry %s is damaged or foreign, compiling again: %s", entry, error)
        return None
    return Binary(source=entry / f"{stem}.cu", cubin=cubin, resources=resources)
