"""Everything that changes only the time of a decode step; `spec.py` has what changes its answer.

A tunable is a field declared once, with its choices in the metadata.  From the fields come, by
loop, the constants of the generated source, the cache key, the search space, ``--set name=value``
and the columns of tuning tables.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from alignedkv.errors import CodegenError
from alignedkv.kernels.target import DeviceTarget

WARP = 32
#: Tokens of a warp's tile.
TILE = 32
#: Blocks that may share a KV head's tokens.
MAX_SPLITS = 512
#: Tiles of a warp from which it pays to ask what each KV head is worth: 1 us a step (NOTES.md).
_TILES_TO_SHARE = 3


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
    waves : int
        Blocks of the grid per block that fits on the GPU at once.
    encode_warps : int
        Warps, and so rows in flight, of a block of encode.cu and dequantise.cu.
    """

    warps: int = _tunable(16, 4, 6, 8, 12, 16)
    blocks_per_sm: int = _tunable(1, 1, 2, 3, 4)
    key_stages: int = _tunable(1, 1, 2, 3)
    strided_tiles: bool = _tunable(True, False, True)
    waves: int = _tunable(1, 1, 2, 3, 4, in_kernel=False)
    encode_warps: int = _tunable(8, 4, 8, 16, of_step=False)

    @classmethod
    def from_settings(cls, settings: dict[str, str]) -> DecodeConfig:
        """Defaults changed by texts, as ``--set name=value`` gives them and tables print them.

        Raises
        ------
        CodegenError
            If a name is no tunable or a value not among its choices.
        """
        values: dict[str, Any] = {}
        for name, text in settings.items():
            if name not in CHOICES:
                raise CodegenError(f"tunable {name!r}: give one of {', '.join(CHOICES)}")
            by_text = {
                spelling: choice
                for choice in CHOICES[name]
                for spelling in (str(choice).lower(), str(int(choice)))  # truth values: 0, 1
            }
            if text.lower() not in by_text:
                allowed = ", ".join(map(str, CHOICES[name]))
                raise CodegenError(f"{name}={text}: give one of {allowed}")
            values[name] = by_text[text.lower()]
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


def blocks_of_step(config: DecodeConfig, target: DeviceTarget, *, heads: int, capacity: int) -> int:
    """Blocks that share the tokens of all KV heads.

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
    fitting = config.waves * config.blocks_per_sm * target.sm_count
    tiles = -(-capacity // (TILE * config.warps))
    return max(heads, min(fitting, heads * min(tiles, MAX_SPLITS)))


def blocks_go_by_work(config: DecodeConfig, blocks: int, *, heads: int, capacity: int) -> bool:
    """Whether the blocks of a step go where its work was in the step before, or evenly."""
    tiles = heads * -(-capacity // TILE)
    return heads < blocks and tiles >= _TILES_TO_SHARE * config.warps * blocks
