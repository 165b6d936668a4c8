"""Made-up sweeps whose best configuration is known; none was ever measured."""

from __future__ import annotations

import math
import random

from alignedkv.kernels.config import CHOICES, STEP_TUNABLES, DecodeConfig
from alignedkv.kernels.legality import configurations, default_config
from alignedkv.kernels.spec import DecodeSpec
from alignedkv.kernels.target import SM90
from alignedkv.kernels.tune.trials import Problem, Status, Sweep, Trial

SPEC = DecodeSpec(head_dim=128, group=4, sample_values=True)
SPACE = list(configurations(SPEC, SM90, STEP_TUNABLES))
PROBLEM = Problem(spec=SPEC, batch=1, kv_heads=8, tokens=32768, tolerance=2.0**-7, data="made up")


def cost_us(config: DecodeConfig) -> float:
    """A landscape with one valley, in which tunables depend on one another."""
    residency = config.warps * config.blocks_per_sm / 16
    cost = (
        25.0
        + 8.0 * math.log2(residency) ** 2
        + 1.5 * abs(config.key_stages - 2)
        + 2.0 * (config.waves - 1)
        + (0.0 if config.strided_tiles == (config.key_stages > 1) else 1.0)
        + (0.0 if config.strided_tiles else 1.5)
        + 0.1 * CHOICES["warps"].index(config.warps)
    )
    return round(cost, 3)


def timed(config: DecodeConfig, *, noise: float = 0.0, seed: int = 0) -> Trial:
    """A right trial whose times scatter by ``noise`` about the landscape."""
    draw = random.Random(f"{config} {seed}")
    times = tuple(cost_us(config) * (1.0 + noise * draw.gauss(0.0, 1.0)) for _ in range(12))
    return Trial(config=config, status=Status.OK, times_us=times)


def made_up_sweep(**changes: object) -> Sweep:
    """All of the space tried."""
    facts = {
        "problem": PROBLEM,
        "card": "no GPU",
        "arch": "sm_90",
        "source": "0" * 64,
        "versions": {"alignedkv": "0"},
        "command": "a test",
        "default": default_config(SPEC, SM90),
        "trials": tuple(timed(config, noise=0.002) for config in SPACE),
    }
    return Sweep(**(facts | changes))  # type: ignore[arg-type]
