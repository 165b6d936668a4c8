"""What the user asks of a patched model."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from alignedkv.errors import SpecError
from alignedkv.policy import PrecisionPolicy, model_policy, output_policy

#: Passes over a head whose bound missed: one that knows the softmax's sum from the pass before and
#: is as fine as that pass lacked, and one with all planes for what still misses.
REPAIRS = 2

PRESETS = {"output": output_policy, "model": model_policy}
#: On every model that evaluate.py was run on, its mean KL is below that of bf16 attention
#: (benchmarks/results/evaluate-*.json).
DEFAULT_PRESET = "model"


class OnMiss(StrEnum):
    """What happens to a head whose bound exceeds the tolerance."""

    #: It is read again, finer, within the same step; a miss is counted only if that fails too.
    REPAIR = "repair"
    #: The output stands and the miss is counted: see `report`.
    FLAG = "flag"
    #: `BoundMissedError` at the end of the forward pass; costs a device synchronisation a step.
    RAISE = "raise"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Policy, and what to do where it is not met.

    Attributes
    ----------
    policy : PrecisionPolicy
    on_miss : OnMiss
    seed : int
        Of the dither, the random signs and the sampling.
    """

    policy: PrecisionPolicy = field(default_factory=PRESETS[DEFAULT_PRESET])
    on_miss: OnMiss = OnMiss.REPAIR
    seed: int = 0

    @property
    def repairs(self) -> int:
        """`StepArguments.repairs` that serves `on_miss`."""
        return REPAIRS if self.on_miss is OnMiss.REPAIR else 0


def make_request(
    policy: PrecisionPolicy | str | None, *, on_miss: OnMiss | str = OnMiss.REPAIR, seed: int = 0
) -> Request:
    """Turn the user's words into a `Request`.

    Parameters
    ----------
    policy : PrecisionPolicy or str or None
        ``"output"`` (2^-7), ``"model"`` (2^-5) or a policy of one's own; None means
        `DEFAULT_PRESET`.
    on_miss : OnMiss or str
    seed : int

    Raises
    ------
    SpecError
        For a name that is none of these.
    """
    if policy is None:
        policy = DEFAULT_PRESET
    if isinstance(policy, str):
        if policy not in PRESETS:
            raise SpecError(
                f"policy {policy!r}: give {' or '.join(map(repr, PRESETS))}, or a PrecisionPolicy "
                "such as PrecisionPolicy(tolerance=2**-6, bound='deterministic')"
            )
        policy = PRESETS[policy]()
    try:
        on_miss = OnMiss(on_miss)
    except ValueError:
        raise SpecError(f"on_miss {on_miss!r}: give one of {', '.join(OnMiss)}") from None
    return Request(policy=policy, on_miss=on_miss, seed=seed)
