"""Sweeps in T4, the JSON results format of the auto-tuning community, there and back.

Notes
-----
Schema: ``T4/1.0.0/results-schema.json`` of odgaard/TuningSchema, as Kernel Tuner 1.5 ships it: a
result has a configuration, times (in ms here, as Kernel Tuner's), an invalidity out of a fixed
list, a correctness and measurements.  What T4 has no word for (the problem, the card, the reason of
a failure) stands in ``metadata`` and in measurements, both of which the schema leaves open.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from alignedkv.errors import TuningError
from alignedkv.kernels.tune.trials import (
    TIME_DIGITS,
    Status,
    Sweep,
    Trial,
    config_from,
    problem_facts,
    problem_from,
)

T4_VERSION = "1.0.0"
#: What T4 calls each status, and back.
INVALIDITY = {
    Status.OK: "correct",
    Status.WRONG_ANSWER: "correctness",
    Status.COMPILE_FAILED: "compile",
    Status.LAUNCH_FAILED: "runtime",
    Status.TIMED_OUT: "timeout",
}
_STATUS = {name: status for status, name in INVALIDITY.items()}
_US_PER_MS = 1e3


def to_t4(sweep: Sweep) -> dict[str, Any]:
    """The sweep as JSON values that the T4 schema accepts."""
    return {
        "schema_version": T4_VERSION,
        "metadata": {
            "timeunit": "milliseconds",
            "hardware": {"gpu": sweep.card, "arch": sweep.arch},
            "environment": {"requirements": [f"{n}=={v}" for n, v in sweep.versions.items()]},
            "alignedkv": {
                "problem": problem_facts(sweep.problem),
                "source": sweep.source,
                "command": sweep.command,
                "default": asdict(sweep.default),
            },
        },
        "results": [_result(trial) for trial in sweep.trials],
    }


def from_t4(content: Mapping[str, Any]) -> Sweep:
    """Undo `to_t4`.

    Raises
    ------
    TuningError
        If the content is no T4 file, or not one that tells what was tuned.
    """
    try:
        metadata = content["metadata"]
        ours = metadata["alignedkv"]
        pins = (pin.partition("==") for pin in metadata["environment"]["requirements"])
        return Sweep(
            problem=problem_from(ours["problem"]),
            card=metadata["hardware"]["gpu"],
            arch=metadata["hardware"]["arch"],
            source=ours["source"],
            versions={name: version for name, _, version in pins},
            command=ours["command"],
            default=config_from(ours["default"]),
            trials=tuple(_trial(result) for result in content["results"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise TuningError(
            f"no T4 results of alignedkv ({error!r} is missing or wrong): export it again"
        ) from error


def _result(trial: Trial) -> dict[str, Any]:
    measured = {name: value for name, value in trial.facts.items() if _is_measurement(value)}
    measurements = [{"name": name, "value": value, "unit": ""} for name, value in measured.items()]
    if trial.status is Status.OK:
        time = {"name": "time", "value": trial.median_us / _US_PER_MS, "unit": "ms"}
        measurements.insert(0, time)
    else:
        measurements.append({"name": "reason", "value": trial.reason, "unit": ""})
    return {
        "configuration": asdict(trial.config),
        "objectives": ["time"],
        "times": {"runtimes": [t / _US_PER_MS for t in trial.times_us]},
        "invalidity": INVALIDITY[trial.status],
        "correctness": float(trial.status is Status.OK),
        "measurements": measurements,
    }


def _trial(result: Mapping[str, Any]) -> Trial:
    facts = {m["name"]: m["value"] for m in result["measurements"] if m["name"] != "time"}
    status = _STATUS[result["invalidity"]]
    times = (round(t * _US_PER_MS, TIME_DIGITS + 3) for t in result["times"]["runtimes"])
    return Trial(
        config=config_from(result["configuration"]),
        status=status,
        times_us=tuple(times),
        reason="" if status is Status.OK else facts.pop("reason", ""),
        facts=facts,
    )


def _is_measurement(value: object) -> bool:
    """Whether T4 takes a value: numbers, texts and arrays, no truth values and no null."""
    if isinstance(value, bool) or (isinstance(value, float) and not math.isfinite(value)):
        return False
    return isinstance(value, int | float | str | list)
