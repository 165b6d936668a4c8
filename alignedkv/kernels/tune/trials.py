"""What is tuned, what came out of one configuration, and a recorded sweep of many."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from alignedkv.errors import TuningError
from alignedkv.kernels.config import CHOICES, DecodeConfig
from alignedkv.kernels.spec import DecodeSpec
from alignedkv.planes import PlaneLayout
from alignedkv.policy import BoundKind

#: Version of the sweep file; files of another version are refused, not guessed at.
SWEEP_VERSION = 1
#: Digits behind the point of a time in us that a file keeps: finer than any clock of a GPU.
TIME_DIGITS = 3


class Status(StrEnum):
    """How a trial ended; only OK ones can win."""

    OK = "ok"
    #: Output outside its own bound of the exact one, bound too small, or NaN: data, no winner.
    WRONG_ANSWER = "wrong answer"
    COMPILE_FAILED = "compile failed"
    LAUNCH_FAILED = "launch failed"
    #: Nothing came back in time; whoever measured was stopped.
    TIMED_OUT = "timed out"


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What is tuned: one spec at one size on one kind of data.

    Attributes
    ----------
    spec : DecodeSpec
    batch, kv_heads, tokens : int
    tolerance : float
    data : str
        Kind of scores, one of `synthetic.KINDS` or "captured": the bytes that a step reads depend
        on them.
    seed : int
        Of the data.
    """

    spec: DecodeSpec
    batch: int
    kv_heads: int
    tokens: int
    tolerance: float
    data: str
    seed: int = 0

    @property
    def heads(self) -> int:
        """KV heads of the batch."""
        return self.batch * self.kv_heads


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What came out of one configuration.

    Attributes
    ----------
    config : DecodeConfig
    status : Status
    times_us : tuple of float
        Time per step of every repeat; empty unless the status is OK.
    reason : str
        What went wrong, for a status other than OK.
    facts : mapping
        JSON values measured beside the time: bound, error, read_fraction, registers, clocks ...

    Raises
    ------
    TuningError
        If a time of an OK trial is not positive and finite, or there is none.
    """

    config: DecodeConfig
    status: Status
    times_us: tuple[float, ...] = ()
    reason: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.status is Status.OK and not (
            self.times_us and all(math.isfinite(t) and t > 0 for t in self.times_us)
        ):
            raise TuningError(f"times {self.times_us} of {self.config}: give positive finite ones")

    @property
    def median_us(self) -> float:
        """Median time, infinite unless the status is OK: such a trial never wins."""
        return statistics.median(self.times_us) if self.times_us else math.inf

    @property
    def spread_us(self) -> float:
        """Distance between the 10th and the 90th percentile of the times, 0 without a repeat."""
        if len(self.times_us) < 2:
            return 0.0
        deciles = statistics.quantiles(self.times_us, n=10, method="inclusive")
        return deciles[-1] - deciles[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """Recorded trials of one problem on one GPU.

    Attributes
    ----------
    problem : Problem
    card, arch : str
    source : str
        Digest of the kernels' source (`codegen.source_digest`).
    versions : mapping
        Of driver, compiler and libraries.
    command : str
        What made the file.
    default : DecodeConfig
        What runs untuned.
    trials : tuple of Trial
    """

    problem: Problem
    card: str
    arch: str
    source: str
    versions: Mapping[str, str]
    command: str
    default: DecodeConfig
    trials: tuple[Trial, ...]

    def ranked(self) -> list[Trial]:
        """Trials that may win, fastest first."""
        return sorted((t for t in self.trials if t.status is Status.OK), key=lambda t: t.median_us)

    def trial_of(self, config: DecodeConfig) -> Trial | None:
        """The trial of a configuration, None if it was not tried."""
        return next((trial for trial in self.trials if trial.config == config), None)

    @property
    def gain(self) -> float | None:
        """Time of the default over that of the fastest; None where either has none."""
        best, default = fastest(self.trials), self.trial_of(self.default)
        if best is None or default is None or default.status is not Status.OK:
            return None
        return default.median_us / best.median_us

    def save(self, path: Path) -> None:
        """Write the sweep as JSON, a trial a line; the file appears whole or not at all.

        Raises
        ------
        TuningError
            If the place cannot be written.
        """
        head = {
            "version": SWEEP_VERSION,
            "problem": problem_facts(self.problem),
            "card": self.card,
            "arch": self.arch,
            "source": self.source,
            "versions": dict(self.versions),
            "command": self.command,
            "default": asdict(self.default),
        }
        lines = ",\n".join(json.dumps(trial_facts(trial)) for trial in self.trials)
        text = json.dumps(head, indent=1)[:-2] + f',\n "trials": [\n{lines}\n]\n}}\n'
        write_whole(path, text)

    @classmethod
    def load(cls, path: Path) -> Sweep:
        """Read what `save` wrote.

        Raises
        ------
        TuningError
            If the file is missing, damaged or of another version.
        """
        try:
            content = json.loads(path.read_text())
            if content["version"] != SWEEP_VERSION:
                raise TuningError(
                    f"{path} has version {content['version']}, this reads {SWEEP_VERSION}: "
                    "record it again"
                )
            names = ("card", "arch", "source", "versions", "command")
            return cls(
                problem=problem_from(content["problem"]),
                default=config_from(content["default"]),
                trials=tuple(trial_from(facts) for facts in content["trials"]),
                **{name: content[name] for name in names},
            )
        except OSError as error:
            raise TuningError(f"{path}: {error.strerror}; give a sweep file") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise TuningError(f"{path} is no sweep file ({error!r}): record it again") from error


def fastest(trials: Iterable[Trial]) -> Trial | None:
    """The fastest trial with a right answer, None if there is none."""
    right = (trial for trial in trials if trial.status is Status.OK)
    return min(right, key=lambda trial: trial.median_us, default=None)


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a reader sees all of it or what was there before.

    Raises
    ------
    TuningError
        If the place cannot be written.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text)
        partial.replace(path)
    except OSError as error:
        raise TuningError(f"{path} cannot be written: {error.strerror}; give another") from error


def spec_facts(spec: DecodeSpec) -> dict[str, Any]:
    """A spec as JSON values; `spec_from` undoes it."""
    return asdict(spec) | {"layout": str(spec.layout), "bound": str(spec.bound)}


def spec_from(facts: Mapping[str, Any]) -> DecodeSpec:
    """Undo `spec_facts`."""
    parsed = {"layout": PlaneLayout.parse(facts["layout"]), "bound": BoundKind(facts["bound"])}
    return DecodeSpec(**(dict(facts) | parsed))


def config_from(facts: Mapping[str, Any]) -> DecodeConfig:
    """A config from JSON values; a tunable that was unknown then has its default.

    Raises
    ------
    TuningError
        If it has a tunable that is unknown now.
    """
    if unknown := sorted(set(facts) - set(CHOICES)):
        raise TuningError(f"tunables {unknown}: today's kernels have {sorted(CHOICES)}")
    return DecodeConfig(**facts)


def trial_facts(trial: Trial) -> dict[str, Any]:
    """A trial as JSON values; `trial_from` undoes it up to the last digits of the times."""
    times = [round(t, TIME_DIGITS) or t for t in trial.times_us]
    return {
        "config": asdict(trial.config),
        "status": str(trial.status),
        "times_us": times,
        "reason": trial.reason,
        "facts": dict(trial.facts),
    }


def trial_from(facts: Mapping[str, Any]) -> Trial:
    """Undo `trial_facts`."""
    return Trial(
        config=config_from(facts["config"]),
        status=Status(facts["status"]),
        times_us=tuple(facts["times_us"]),
        reason=facts["reason"],
        facts=facts["facts"],
    )


def problem_facts(problem: Problem) -> dict[str, Any]:
    """A problem as JSON values; `problem_from` undoes it."""
    return asdict(problem) | {"spec": spec_facts(problem.spec)}


def problem_from(facts: Mapping[str, Any]) -> Problem:
    """Undo `problem_facts`."""
    return Problem(**(dict(facts) | {"spec": spec_from(facts["spec"])}))
