"""Winners, kept: one readable JSON file per GPU type, merged atomically, never trusted blindly.

`find` is what launches and the runtime ask; it touches no search library.  Our own sweeps are
shipped beside this file, by architecture; the user's live in the cache folder, by GPU, and go
first.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from alignedkv.errors import TuningError
from alignedkv.kernels.cache_folder import cache_directory
from alignedkv.kernels.codegen import source_digest
from alignedkv.kernels.config import DecodeConfig
from alignedkv.kernels.legality import default_config, restrictions
from alignedkv.kernels.spec import DecodeSpec
from alignedkv.kernels.target import DeviceTarget
from alignedkv.kernels.tune.locks import exclusive
from alignedkv.kernels.tune.trials import (
    Sweep,
    config_from,
    spec_facts,
    spec_from,
    write_whole,
)

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
        `bucket` of the tokens and of batch x KV heads.
    source : str
        Digest of the kernels' source that was timed.
    median_us : float
        Time of a step; over several kinds of data, the geometric mean.
    default_us : float or None
        Of the default configuration, likewise, if its answer was right.
    card : str
        GPU that it was timed on.
    data : str
        Kinds of scores tuned on.
    """

    spec: DecodeSpec
    config: DecodeConfig
    tokens_bucket: int
    heads_bucket: int
    source: str
    median_us: float
    default_us: float | None
    card: str
    data: str

    @property
    def key(self) -> tuple[Any, ...]:
        """What a later winner of the same decision replaces."""
        return (self.spec, self.tokens_bucket, self.heads_bucket)


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """What to run, and why.

    Attributes
    ----------
    config : DecodeConfig
    reason : str
        Where the configuration is from, in words; stale winners are counted there.
    """

    config: DecodeConfig
    reason: str


def bucket(count: int) -> int:
    """Bucket of a size: its log2, rounded."""
    return round(math.log2(max(count, 1)))


def ranking(sweeps: Sequence[Sweep]) -> list[tuple[DecodeConfig, float]]:
    """Configurations right in all sweeps, best first, with their mean time in us.

    Notes
    -----
    The mean is geometric, over sweeps of the same sizes on different data: a configuration that is
    10 % slower counts the same whether the data make steps long or short.
    """
    known = [{trial.config: trial.median_us for trial in sweep.ranked()} for sweep in sweeps]
    common = [config for config in known[0] if all(config in times for times in known)]
    means = [(c, statistics.geometric_mean(times[c] for times in known)) for c in common]
    return sorted(means, key=lambda pair: pair[1])


def winner_of(sweeps: Sequence[Sweep]) -> Winner:
    """The winner of sweeps of the same sizes on different data.

    Raises
    ------
    TuningError
        If no configuration was right in all of them.
    """
    ranked = ranking(sweeps)
    if not ranked:
        raise TuningError(
            "no configuration had a right answer on all data: there is nothing to keep"
        )
    config, mean_us = ranked[0]
    first = sweeps[0]
    default_us = dict(ranked).get(first.default)
    return Winner(
        spec=first.problem.spec,
        config=config,
        tokens_bucket=bucket(first.problem.tokens),
        heads_bucket=bucket(first.problem.heads),
        source=first.source,
        median_us=round(mean_us, 3),
        default_us=None if default_us is None else round(default_us, 3),
        card=first.card,
        data=", ".join(sweep.problem.data for sweep in sweeps),
    )


def wisdom_path(target: DeviceTarget) -> Path:
    """The user's file for a GPU."""
    slug = re.sub(r"[^a-z0-9]+", "-", target.name.lower()).strip("-")
    return cache_directory() / "wisdom" / f"{slug}.json"


def find(
    spec: DecodeSpec,
    target: DeviceTarget,
    *,
    tokens: int,
    heads: int,
    source: str | None = None,
) -> Advice:
    """The configuration to run, and why.

    Parameters
    ----------
    spec : DecodeSpec
    target : DeviceTarget
    tokens, heads : int
        T (the capacity of the cache), and batch x KV heads.
    source : str, optional
        Digest of the kernels that will run; default: of those here.

    Notes
    -----
    The nearest bucket counts, distance being the sum of the differences of both logs.  A file that
    is damaged, stale or no longer legal is logged and passed over: it costs nothing but itself.
    Files are read again when they change, so that a winner found elsewhere is used at once.
    Dtypes are no part of the decision: they change how a row comes in and an output goes out, once
    a step, and not the loop over the tokens.  Nor do rows kept exact, which come behind that loop:
    where no winner has them as ``spec`` does, one that differs in this serves, unless ``spec``
    needs more registers a thread than it leaves.
    """
    wanted = bucket(tokens), bucket(heads)
    source = source_digest() if source is None else source
    files = (wisdom_path(target), SHIPPED / f"{target.arch}.json")
    return _find(spec, target, wanted, source, tuple((path, _changed(path)) for path in files))


def _same_loop(one: DecodeSpec, other: DecodeSpec) -> bool:
    outside = ("query_dtype", "row_dtype", "exact_rows")
    return replace(one, **{name: getattr(other, name) for name in outside}) == other


@functools.lru_cache(maxsize=256)
def _find(
    spec: DecodeSpec,
    target: DeviceTarget,
    wanted: tuple[int, int],
    source: str,
    files: Sequence[tuple[Path, int]],
) -> Advice:
    stale = 0
    for path, _ in files:
        fitting: list[tuple[bool, int, Winner]] = []
        for winner in _read_or_warn(path):
            if not _same_loop(winner.spec, spec):
                continue
            if reason := why_stale(winner, target, source):
                _log.info("%s: a winner is passed over: %s", path, reason)
                stale += 1
                continue
            borrowed = winner.spec.exact_rows != spec.exact_rows
            distance = abs(winner.tokens_bucket - wanted[0]) + abs(winner.heads_bucket - wanted[1])
            fitting.append((borrowed, distance, winner))
        if fitting:
            borrowed, distance, winner = min(fitting, key=lambda found: found[:2])
            reason = f"{path.name}, {distance} buckets away"
            if borrowed:
                reason += f", tuned {'with' if winner.spec.exact_rows else 'without'} exact rows"
            return Advice(config=winner.config, reason=reason)
    reason = f"untuned; {stale} stale winners passed over" if stale else "untuned"
    return Advice(config=default_config(spec, target), reason=reason)


def why_stale(winner: Winner, target: DeviceTarget, source: str) -> str:
    """Why a winner must not be used today; empty if it may."""
    if winner.source != source:
        return f"it was timed with kernels {winner.source[:12]}, today's are {source[:12]}"
    return "; ".join(restrictions(winner.spec, winner.config, target))


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
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise TuningError(f"wisdom file {path} is damaged ({error!r}): move it away") from error


def merge(path: Path, winners: Iterable[Winner]) -> None:
    """Add winners to a file, each replacing an older one of the same decision.

    Raises
    ------
    TuningError
        If the file is damaged (it is left as it is) or another process holds it too long.
    """
    with exclusive(path):
        known = {winner.key: winner for winner in read(path)}
        known |= {winner.key: winner for winner in winners}
        facts = [asdict(winner) | {"spec": spec_facts(winner.spec)} for winner in known.values()]
        content = {"version": WISDOM_VERSION, "winners": facts}
        write_whole(path, json.dumps(content, indent=1) + "\n")


def _winner(facts: Mapping[str, Any]) -> Winner:
    parsed = {"spec": spec_from(facts["spec"]), "config": config_from(facts["config"])}
    return Winner(**(dict(facts) | parsed))


def _changed(path: Path) -> int:
    """When a file was last changed, in ns; 0 if there is none."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _read_or_warn(path: Path) -> list[Winner]:
    try:
        return read(path)
    except TuningError as error:
        _log.warning("%s; using what else is known", error)
        return []
