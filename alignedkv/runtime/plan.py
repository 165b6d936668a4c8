"""A decode step's specification and arguments as one string.

torch operators take numbers, strings and tensors. A string keeps their signatures small, is a
constant to torch.compile, and carries floats exactly; parsing it again is a cached look-up.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from functools import lru_cache

from torch import Tensor

from alignedkv.kernels.arrays import StepArguments
from alignedkv.kernels.spec import DecodeSpec
from alignedkv.planes import PlaneLayout
from alignedkv.policy import BoundKind
from alignedkv.runtime.request import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionFacts:
    """What an attention module says of its softmax.

    Attributes
    ----------
    scaling : float
    softcap : float
        0 for none.
    sinks : float32 tensor [H] or None
    """

    scaling: float
    softcap: float = 0.0
    sinks: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """All that an operator needs besides tensors.

    Attributes
    ----------
    spec : DecodeSpec
    arguments : StepArguments
    exact_first, exact_last : int
        As in `CacheArrays`.
    start_theta : float
        theta / tau from which feedback starts after a probe.
    """

    spec: DecodeSpec
    arguments: StepArguments
    exact_first: int = 0
    exact_last: int = 0
    start_theta: float = 0.0

    def text(self) -> str:
        """The plan as JSON; `parse_plan` undoes it exactly."""
        fields = asdict(self)
        fields["spec"]["layout"] = str(self.spec.layout)
        return json.dumps(fields)


@lru_cache(maxsize=1024)
def parse_plan(text: str) -> StepPlan:
    """The plan that ``StepPlan.text`` wrote."""
    fields = json.loads(text)
    spec = fields.pop("spec")
    spec["layout"] = PlaneLayout.parse(spec["layout"])
    spec["bound"] = BoundKind(spec["bound"])
    arguments = StepArguments(**fields.pop("arguments"))
    return StepPlan(spec=DecodeSpec(**spec), arguments=arguments, **fields)


def make_plan(
    request: Request, spec: DecodeSpec, facts: AttentionFacts, *, capacity: int, position: int
) -> StepPlan:
    """What `request` means for a layer.

    Parameters
    ----------
    request : Request
    spec : DecodeSpec
        Of the layer's storage; softcap and sinks come from ``facts``.
    facts : AttentionFacts
    capacity : int
        Tokens that the layer has room for.
    position : int
        Of the layer in its model: each samples with a seed of its own.
    """
    policy = request.policy
    arguments = StepArguments.from_policy(
        policy,
        scaling=facts.scaling,
        head_dim=spec.head_dim,
        tokens=capacity,
        softcap=facts.softcap,
        seed=request.seed + position,
        repairs=request.repairs,
    )
    return StepPlan(
        spec=replace(spec, softcap=facts.softcap != 0, sinks=facts.sinks is not None),
        arguments=arguments,
        exact_first=policy.exact_first,
        exact_last=policy.exact_last,
        start_theta=policy.start_theta(capacity),
    )
