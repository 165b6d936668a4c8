"""What is tuned, what came out of one configuration, and a recorded sweep of all of them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
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


class Status(StrEnum):
    """How a trial ended; only OK ones can win."""

    OK = "ok"
    #: The output missed its own bound of the reference, or a bound was too small: data, no winner.
    WRONG_ANSWER = "wrong answer"
    COMPILE_FAILED = "compile failed"
    LAUNCH_FAILED = "launch failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What is tuned: one spec at one size on one kind of data.

    Attributes
    ----------
    spec : DecodeSpec
    batch, kv_heads, tokens : int
    tolerance : float
    data : str
        Kind of scores: the bytes that a step reads depend on them.
    """

    spec: DecodeSpec
    batch: int
    kv_heads: int
    tokens: int
    tolerance: float
    data: str


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
    facts : dict
        What was measured beside the time: read_fraction, bound_max, error_max, registers, clocks.
    """

    config: DecodeConfig
    status: Status
    times_us: tuple[float, ...] = ()
    reason: str = ""
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.status is Status.OK and not (
            self.times_us and all(math.isfinite(t) and t > 0 for t in self.times_us)
        ):
            raise TuningError(f"times {self.times_us} of {self.config}: give positive finite ones")

    @property
    def median_us(self) -> float:
        """Median time, infinite unless the status is OK: such a trial never wins."""
        ordered = sorted(self.times_us)
        if not ordered:
            return math.inf
        middle = len(ordered) // 2
        return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2

    @property
    def spread_us(self) -> float:
        """Distance between the 10th and the 90th percentile of the times."""
        ordered = sorted(self.times_us)
        return (
            ordered[int(0.9 * (len(ordered) - 1))] - ordered[int(0.1 * (len(ordered) - 1))]
            if ordered
            else 0.0
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """Recorded trials of one problem on one GPU.

    Attributes
    ----------
    problem : Problem
    card, arch : str
    source : str
        Digest of the kernels' source (`compile.source_digest`).
    versions : dict
        Of driver, compiler and libraries.
    command : str
        What made the file.
    trials : tuple of Trial
    """

    problem: Problem
    card: str
    arch: str
    source: str
    versions: dict[str, str]
    command: str
    trials: tuple[Trial, ...]

    def ranked(self) -> list[Trial]:
        """Trials that may win, fastest first."""
        return sorted((t for t in self.trials if t.status is Status.OK), key=lambda t: t.median_us)

    def save(self, path: Path) -> None:
        """Write the sweep as JSON; the file appears whole or not at all."""
        content = {
            "version": SWEEP_VERSION,
            "problem": _problem_facts(self.problem),
            "card": self.card,
            "arch": self.arch,
            "source": self.source,
            "versions": self.versions,
            "command": self.command,
            "trials": [asdict(trial) for trial in self.trials],
        }
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(content, indent=1) + "\n")
        partial.replace(path)

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
            return cls(
                problem=_problem(content["problem"]),
                trials=tuple(trial_from(facts) for facts in content["trials"]),
                **{
                    name: content[name]
                    for name in ("card", "arch", "source", "versions", "command")
                },
            )
        except OSError as error:
            raise TuningError(f"{path}: {error.strerror}; give a sweep file") from error
        except (ValueError, KeyError, TypeError) as error:
            raise TuningError(f"{path} is no sweep file ({error!r}): record it again") from error


def spec_facts(spec: DecodeSpec) -> dict[str, Any]:
    """A spec as JSON values; `spec_from` undoes it."""
    return asdict(spec) | {"layout": str(spec.layout), "bound": str(spec.bound)}


def spec_from(facts: dict[str, Any]) -> DecodeSpec:
    """Undo `spec_facts`."""
    parsed = {"layout": PlaneLayout.parse(facts["layout"]), "bound": BoundKind(facts["bound"])}
    return DecodeSpec(**(facts | parsed))


def config_from(facts: dict[str, Any]) -> DecodeConfig:
    """A config from JSON values.

    Raises
    ------
    TuningError
        If it has other tunables than today's kernels.
    """
    if set(facts) != set(CHOICES):
        raise TuningError(f"tunables {sorted(facts)}: today's kernels have {sorted(CHOICES)}")
    return DecodeConfig(**facts)


def trial_from(facts: dict[str, Any]) -> Trial:
    """A trial from JSON values, as ``dataclasses.asdict`` gives them."""
    return Trial(
        config=config_from(facts["config"]),
        status=Status(facts["status"]),
        times_us=tuple(facts["times_us"]),
        reason=facts["reason"],
        facts=facts["facts"],
    )


def to_t4(sweep: Sweep) -> dict[str, Any]:
    """The sweep in the T4 results format of the auto-tuning community, as JSON values."""
    invalid = {
        Status.WRONG_ANSWER: "correctness",
        Status.COMPILE_FAILED: "compile",
        Status.LAUNCH_FAILED: "runtime",
        Status.OK: "correct",
    }
    return {
        "schema_version": "1.0.0",
        "metadata": {"hardware": {"gpu": sweep.card}, "problem": _problem_facts(sweep.problem)},
        "results": [
            {
                "configuration": asdict(trial.config),
                "invalidity": invalid[trial.status],
                "times": {"runtimes": [t * 1e-3 for t in trial.times_us]},
                "measurements": [{"name": "time", "value": trial.median_us * 1e-3, "unit": "ms"}]
                if trial.status is Status.OK
                else [],
                "objectives": ["time"],
            }
            for trial in sweep.trials
        ],
    }


def from_t4(
    content: dict[str, Any], *, problem: Problem, arch: str, source: str, command: str
) -> Sweep:
    """Trials of a T4 file; what T4 does not say is given.

    Raises
    ------
    TuningError
        If the file lacks what a trial needs.
    """
    status = {
        "correctness": Status.WRONG_ANSWER,
        "compile": Status.COMPILE_FAILED,
        "correct": Status.OK,
    }
    try:
        trials = tuple(
            Trial(
                config=config_from(result["configuration"]),
                status=status.get(result["invalidity"], Status.LAUNCH_FAILED),
                times_us=tuple(t * 1e3 for t in result["times"]["runtimes"]),
            )
            for result in content["results"]
        )
        card = content["metadata"]["hardware"]["gpu"]
    except (KeyError, TypeError) as error:
        raise TuningError(f"no T4 results: {error!r} is missing or of another shape") from error
    return Sweep(
        problem=problem,
        card=card,
        arch=arch,
        source=source,
        versions={},
        command=command,
        trials=trials,
    )


def fastest(trials: Sequence[Trial]) -> Trial | None:
    """The fastest trial with a right answer, None if there is none."""
    right = [trial for trial in trials if trial.status is Status.OK]
    return min(right, key=lambda trial: trial.median_us, default=None)


def _problem_facts(problem: Problem) -> dict[str, Any]:
    return asdict(problem) | {"spec": spec_facts(problem.spec)}


def _problem(facts: dict[str, Any]) -> Problem:
    return Problem(**(facts | {"spec": spec_from(facts["spec"])}))
