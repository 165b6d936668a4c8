"""Which configurations a GPU can run: restrictions with their reasons, and what runs untuned."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

from alignedkv.errors import CodegenError
from alignedkv.kernels.config import CHOICES, WARP, DecodeConfig, products
from alignedkv.kernels.footprint import padded_heads, shared_bytes
from alignedkv.kernels.spec import DecodeSpec
from alignedkv.kernels.target import DeviceTarget
from alignedkv.policy import BoundKind

MAX_THREADS_PER_BLOCK = 1024
#: Of a thread.
MAX_REGISTERS = 255
#: A decode kernel with fewer registers a thread than this spills (test_resources.py).
MIN_REGISTERS = 64


def configurations(
    spec: DecodeSpec, target: DeviceTarget, names: Sequence[str] = tuple(CHOICES)
) -> Iterator[DecodeConfig]:
    """The legal ones of `products`, in the order of the fields' choices."""
    for config in products(names):
        if not restrictions(spec, config, target):
            yield config


@functools.cache
def default_config(spec: DecodeSpec, target: DeviceTarget) -> DecodeConfig:
    """The configuration that runs untuned: the defaults, with fewer blocks or warps if need be.

    Raises
    ------
    CodegenError
        If nothing fits the target.
    """
    first = DecodeConfig()
    legal = [config for config in _by_warps(first) if not restrictions(spec, config, target)]
    if not legal:
        check_legal(spec, first, target)
    roomy = (config for config in legal if not spills(spec, config, target))
    return next(roomy, legal[-1])


def _by_warps(config: DecodeConfig) -> list[DecodeConfig]:
    """``config`` with any warps in one block an SM, or two: most warps first, then one block."""
    crowds = itertools.product((1, 2), CHOICES["warps"])
    ordered = sorted(crowds, key=lambda crowd: (-crowd[0] * crowd[1], crowd[0]))
    return [
        replace(config, blocks_per_sm=blocks, warps=warps)
        for blocks, warps in ordered
        if blocks * warps <= config.blocks_per_sm * config.warps
    ]


def spills(spec: DecodeSpec, config: DecodeConfig, target: DeviceTarget) -> bool:
    """Whether a thread of decode.cu may need more registers than ``config`` leaves it."""
    return registers(config, target) < _registers_without_spills(spec, target)


def registers(config: DecodeConfig, target: DeviceTarget) -> int:
    """Registers that a thread of decode.cu may have."""
    resident = WARP * config.warps * config.blocks_per_sm
    return min(target.registers_per_sm // resident, MAX_REGISTERS)


def _registers_without_spills(spec: DecodeSpec, target: DeviceTarget) -> int:
    """What decode.cu takes at most, read from the compiler (test_resources.py)."""
    if padded_heads(spec) > 4:
        return MAX_REGISTERS
    if spec.channels > 128:
        return 168 if spec.bound is BoundKind.ESTIMATE else MAX_REGISTERS
    is_tight = spec.bound is BoundKind.DETERMINISTIC or spec.softcap
    return 136 if is_tight or target.arch == "sm_100" else 128


def restrictions(spec: DecodeSpec, config: DecodeConfig, target: DeviceTarget) -> list[str]:
    """Why ``config`` cannot serve ``spec`` on ``target``; empty if it can.

    Known before anything is compiled; the sizes that it counts on are asserted by the kernels
    (footprint.py).
    """
    reasons = [
        f"{name} {getattr(config, name)!r}: allowed are {', '.join(map(str, choices))}"
        for name, choices in CHOICES.items()
        if getattr(config, name) not in choices
    ]
    if reasons:
        return reasons
    threads = WARP * config.warps
    if threads > MAX_THREADS_PER_BLOCK:
        reasons.append(f"a block has {threads} threads: at most {MAX_THREADS_PER_BLOCK} fit")
    resident = threads * config.blocks_per_sm
    if resident > target.threads_per_sm:
        reasons.append(f"an SM has {resident} threads: at most {target.threads_per_sm} fit")
    elif target.registers_per_sm // resident < MIN_REGISTERS:
        reasons.append(
            f"a thread has {target.registers_per_sm // resident} registers: "
            f"the kernel needs {MIN_REGISTERS}"
        )
    shared = shared_bytes(spec, config)
    if shared > target.shared_bytes_per_block:
        reasons.append(
            f"a block takes {shared} bytes of shared memory: "
            f"at most {target.shared_bytes_per_block} fit"
        )
    per_sm = config.blocks_per_sm * (shared + target.reserved_shared_bytes)
    if per_sm > target.shared_bytes_per_sm:
        reasons.append(
            f"the blocks of an SM take {per_sm} bytes of shared memory: "
            f"at most {target.shared_bytes_per_sm} fit"
        )
    return reasons


def check_legal(spec: DecodeSpec, config: DecodeConfig, target: DeviceTarget) -> None:
    """Refuse an illegal configuration.

    Raises
    ------
    CodegenError
        With every reason.
    """
    reasons = restrictions(spec, config, target)
    if reasons:
        raise CodegenError(
            f"{config} cannot serve {spec} on {target.name}: {'; '.join(reasons)}. "
            "configurations(spec, target) lists those that can"
        )
