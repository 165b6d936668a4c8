"""Winners, kept: one readable JSON file per GPU type, merged atomically, never trusted blindly.

`find` is what `launch` and `runtime` ask; it touches no search library.  Our own sweeps are shipped
beside this file, by architecture; the user's live in the cache folder, by GPU, and go first.
"""

from __future__ import annotations

import json
import logging
import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from alignedkv.errors import TuningError
from alignedkv.kernels.compile import cache_directory
from alignedkv.kernels.config import DecodeConfig, default_config, restrictions
from alignedkv.kernels.spec import DecodeSpec
from alignedkv.kernels.target import DeviceTarget
from alignedkv.kernels.tune.locks import exclusive
from alignedkv.kernels.tune.trials import config_from, spec_facts, spec_from

_log = logging.getLogger(__name__)

WISDOM_VERSION = 1
SHIPPED = Path(__file__).parent


@dataclass(frozen=True, slots=True, kw_only=True)
class Winner:
    """The best configuration of one spec in one bucket of sizes.

    Attributes
    ----------
    spec : DecodeSpec
    config : DecodeConfig
    tokens_bucket, heads_bucket : int
        log2 of the tokens and of batch x KV heads, rounded (`bucket`).
    source : str
        Digest of the kernels' source that was timed.
    median_us, default_us : float
        Of the winner and of the default configuration, in the same sweep.
    data : str
        Kinds of scores tuned on.
    """

    spec: DecodeSpec
    config: DecodeConfig
    tokens_bucket: int
    heads_bucket: int
    source: str
    median_us: float
    default_us: float
    data: str

    @property
    def key(self) -> tuple[Any, ...]:
        """What a later winner of the same decision replaces."""
        return (self.spec, self.tokens_bucket, self.heads_bucket)


def bucket(count: int) -> int:
    """Bucket of a size: its log2, rounded."""
    return round(math.log2(max(count, 1)))


def wisdom_path(target: DeviceTarget) -> Path:
    """The user's file for a GPU."""
    slug = re.sub(r"[^a-z0-9]+", "-", target.name.lower()).strip("-")
    return cache_directory() / "wisdom" / f"{slug}.json"


def find(
    spec: DecodeSpec, target: DeviceTarget, *, tokens: int, heads: int, source: str
) -> tuple[DecodeConfig, str]:
    """The configuration to run and why, in words.

    Parameters
    ----------
    spec : DecodeSpec
    target : DeviceTarget
    tokens, heads : int
        T, and batch x KV heads.
    source : str
        Digest of today's kernels; a winner of other kernels is stale.

    Notes
    -----
    The nearest bucket counts, distance being the sum of the differences of both logs.  A file that
    is damaged, stale or no longer legal is logged and passed over: it costs nothing but itself.
    """
    stale = 0
    for path in (wisdom_path(target), SHIPPED / f"{target.arch}.json"):
        fitting = []
        for winner in _read_or_warn(path):
            if winner.spec != spec:
                continue
            if winner.source != source or restrictions(spec, winner.config, target):
                stale += 1
                continue
            distance = abs(winner.tokens_bucket - bucket(tokens))
            distance += abs(winner.heads_bucket - bucket(heads))
            fitting.append((distance, winner))
        if fitting:
            distance, winner = min(fitting, key=lambda pair: pair[0])
            return winner.config, f"{path.name}, {distance} buckets away"
    reason = f"untuned; {stale} stale winners passed over" if stale else "untuned"
    return default_config(spec, target), reason


def read(path: Path) -> list[Winner]:
    """All winners of a file; none if there is no file.

    Raises
    ------
    TuningError
        If the file is damaged or of another version.
    """
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise TuningError(f"wisdom file {path} cannot be read ({error}): move it away") from error
    try:
        if content["version"] != WISDOM_VERSION:
            raise TuningError(
                f"wisdom file {path} has version {content['version']}, this reads "
                f"{WISDOM_VERSION}: move it away and tune again"
            )
        return [_winner(facts) for facts in content["winners"]]
    except (KeyError, TypeError, ValueError) as error:
        raise TuningError(f"wisdom file {path} is damaged ({error!r}): move it away") from error


def merge(path: Path, winners: list[Winner]) -> None:
    """Add winners to a file, each replacing an older one of the same decision.

    Raises
    ------
    TuningError
        If the file is damaged (it is left as it is) or another process holds it too long.
    """
    with exclusive(path):
        known = {winner.key: winner for winner in read(path)}
        known |= {winner.key: winner for winner in winners}
        content = {
            "version": WISDOM_VERSION,
            "winners": [
                asdict(winner) | {"spec": spec_facts(winner.spec)} for winner in known.values()
            ],
        }
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(content, indent=1) + "\n")
        partial.replace(path)


def _winner(facts: dict[str, Any]) -> Winner:
    parsed = {"spec": spec_from(facts["spec"]), "config": config_from(facts["config"])}
    return Winner(**(facts | parsed))


def _read_or_warn(path: Path) -> list[Winner]:
    try:
        return read(path)
    except TuningError as error:
        _log.warning("%s; using what else is known", error)
        return []
