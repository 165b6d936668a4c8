"""Everything that changes only the time of a decode step; `spec.py` has what changes its answer.

A tunable is a field declared once, with its choices in the metadata.  From the fields come, by
loop, the constants of the generated source, the cache key, the search space, ``--set name=value``
and the columns of tuning tables.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from alignedkv.errors import CodegenError
from alignedkv.kernels.footprint import MAX_SPLITS, TILE, padded_heads, shared_bytes
from alignedkv.kernels.spec import DecodeSpec
from alignedkv.kernels.target import DeviceTarget
from alignedkv.policy import BoundKind

WARP = 32
MAX_THREADS_PER_BLOCK = 1024
#: Of a thread.
MAX_REGISTERS = 255
#: A decode kernel with fewer registers a thread than this spills (test_resources.py).
MIN_REGISTERS = 64


def _tunable(default: Any, *choices: Any, of_step: bool = True, in_kernel: bool = True) -> Any:
    metadata = {"choices": choices, "of_step": of_step, "in_kernel": in_kernel}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeConfig:
    """Tunables of the kernels; the defaults run untuned.

    Attributes
    ----------
    warps : int
        Warps of a block of decode.cu; each works on tiles of its own.
    blocks_per_sm : int
        Blocks that shall fit on an SM together: bounds the registers of a thread.
    key_stages : int
        Tiles of first key planes that a warp has room for, the one in use included.
    strided_tiles : bool
        Splits take tiles in turn, which balances heads with few important tokens; else each takes
        one run of neighbouring tiles.
    share_by_work : bool
        Heads get blocks in proportion to their work in the step before; else all the same.
    waves : int
        Blocks of the grid per block that fits on the GPU at once.
    encode_warps : int
        Warps, and so rows in flight, of a block of encode.cu and dequantise.cu.
    """

    warps: int = _tunable(8, 4, 6, 8, 12, 16)
    blocks_per_sm: int = _tunable(2, 1, 2, 3, 4)
    key_stages: int = _tunable(1, 1, 2, 3)
    strided_tiles: bool = _tunable(True, False, True)
    share_by_work: bool = _tunable(False, False, True)
    waves: int = _tunable(1, 1, 2, 3, 4, in_kernel=False)
    encode_warps: int = _tunable(8, 4, 8, 16, of_step=False)

    @classmethod
    def from_settings(cls, settings: dict[str, str]) -> DecodeConfig:
        """Defaults changed by texts, as ``--set name=value`` gives them.

        Raises
        ------
        CodegenError
            If a name is no tunable or a value not among its choices.
        """
        values: dict[str, Any] = {}
        for name, text in settings.items():
            if name not in CHOICES:
                raise CodegenError(f"tunable {name!r}: give one of {', '.join(CHOICES)}")
            by_text = {str(choice): choice for choice in CHOICES[name]}
            if text not in by_text:
                raise CodegenError(f"{name}={text}: give one of {', '.join(by_text)}")
            values[name] = by_text[text]
        return replace(cls(), **values)


#: The choices of every tunable, by its name.
CHOICES: dict[str, tuple[Any, ...]] = {
    tunable.name: tunable.metadata["choices"] for tunable in fields(DecodeConfig)
}
#: The tunables that change the time of a decode step; the others change that of encoding alone.
STEP_TUNABLES: tuple[str, ...] = tuple(
    tunable.name for tunable in fields(DecodeConfig) if tunable.metadata["of_step"]
)
#: The tunables that the kernels are compiled with; the others only choose a launch.
KERNEL_TUNABLES: tuple[str, ...] = tuple(
    tunable.name for tunable in fields(DecodeConfig) if tunable.metadata["in_kernel"]
)


def products(names: Sequence[str] = tuple(CHOICES)) -> Iterator[DecodeConfig]:
    """All combinations of the choices of ``names``, legal or not, the others at their defaults."""
    for values in itertools.product(*(CHOICES[name] for name in names)):
        yield DecodeConfig(**dict(zip(names, values, strict=True)))


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
    legal = [
        config
        for blocks, warps in itertools.product((2, 1), (first.warps, 6, 4))
        if not restrictions(
            spec, config := replace(first, blocks_per_sm=blocks, warps=warps), target
        )
    ]
    if not legal:
        check_legal(spec, first, target)
    roomy = (c for c in legal if registers(c, target) >= _registers_without_spills(spec, target))
    return next(roomy, legal[-1])


def registers(config: DecodeConfig, target: DeviceTarget) -> int:
    """Registers that a thread of decode.cu may have."""
    resident = WARP * config.warps * config.blocks_per_sm
    return min(target.registers_per_sm // resident, MAX_REGISTERS)


def _registers_without_spills(spec: DecodeSpec, target: DeviceTarget) -> int:
    """What decode.cu takes at most, read from the compiler (test_resources.py)."""
    if padded_heads(spec) > 4:
        return MAX_REGISTERS
    small_pages = spec.page_tokens is not None and spec.page_tokens < TILE
    if spec.bound is not BoundKind.ESTIMATE or small_pages or spec.exact_rows:
        return 160 if spec.channels <= 128 else MAX_REGISTERS
    if spec.channels > 128:
        return 176
    return 136 if target.arch == "sm_100" else 128


def splits_per_head(
    config: DecodeConfig, target: DeviceTarget, *, heads: int, capacity: int
) -> int:
    """Blocks that share the tokens of one KV head.

    Parameters
    ----------
    heads : int
        KV heads of the batch, B Hkv, times subgroups of their queries.
    capacity : int
        Most tokens of a sequence.

    Notes
    -----
    As many as fill the GPU ``waves`` times and no more: a started wave costs as much as a full one
    (measured: one exact wave beats two and one half).  But none without a tile for each warp.
    """
    fitting = config.waves * config.blocks_per_sm * target.sm_count // heads
    tiles = -(-capacity // (WARP * config.warps))
    return max(1, min(fitting, tiles, MAX_SPLITS))


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
