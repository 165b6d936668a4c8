"""The operators: schemas that tell the truth about mutation, fakes of the right shape, plans."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import library

from alignedkv.kernels.spec import DecodeSpec
from alignedkv.policy import PrecisionPolicy
from alignedkv.runtime import ops
from alignedkv.runtime.backend import backend_for
from alignedkv.runtime.layers import DynamicPlaneLayer
from alignedkv.runtime.monitor import Monitor
from alignedkv.runtime.plan import AttentionFacts, make_plan, parse_plan
from alignedkv.runtime.request import make_request

CHECKS = ("test_schema", "test_faketensor")
FACTS = AttentionFacts(scaling=0.125)


def filled_layer(**policy: Any) -> DynamicPlaneLayer:
    request = make_request(PrecisionPolicy(**policy))
    layer = DynamicPlaneLayer(request, group=2, monitor=Monitor([0]), position=0)
    torch.manual_seed(0)
    layer.update(torch.randn(1, 2, 20, 64), torch.randn(1, 2, 20, 64))
    return layer


@pytest.mark.parametrize("policy", [{}, {"exact_first": 2, "exact_last": 4}, {"stored_planes": 2}])
def test_operators_are_what_they_say(policy: dict[str, Any]) -> None:
    layer = filled_layer(**policy)
    tensors, plan = layer.tensors, layer._plan(FACTS).text()
    lists = tensors.rows, tensors.constants
    row = torch.randn(1, 2, 1, 64), torch.randn(1, 2, 1, 64)
    query = torch.randn(1, 4, 64)
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (ops.fit, (plan, *lists, *row, torch.rand(1, 2, 64))),
        (ops.probe, (plan, *lists, tensors.state, query, None)),
        (ops.encode, (plan, *lists, *row)),
        (
            ops.step,
            (plan, *lists, tensors.state, tensors.results, tensors.scratch, *row, query, None),
        ),
        (ops.read, (plan, *lists, 20, torch.float32)),
    ]
    for operator, arguments in calls:
        library.opcheck(operator, arguments, test_utils=CHECKS)


def test_lists_and_arrays_are_the_same() -> None:
    layer = filled_layer(exact_first=2)
    plan, tensors = layer._plan(FACTS), layer.tensors
    cache = ops.unpack(plan, tensors.rows, tensors.constants)
    assert ops.pack_rows(cache) == tensors.rows
    assert ops.pack_constants(cache) == tensors.constants
    assert (cache.exact_first, cache.exact_last) == (2, 0)
    assert cache.lengths is tensors.lengths
    assert cache.starts is tensors.starts


@given(
    tolerance=st.floats(1e-6, 0.9),
    bound=st.sampled_from(["deterministic", "statistical", "estimate"]),
    layout=st.sampled_from(["4|4|4|4", "4|4|8", "4|2|2|8"]),
    scaling=st.floats(1e-3, 10),
    softcap=st.floats(1, 100) | st.just(0.0),
)
def test_a_plan_survives_its_text(
    tolerance: float, bound: str, layout: str, scaling: float, softcap: float
) -> None:
    softcap = 0.0 if bound == "statistical" else softcap
    policy = PrecisionPolicy(
        tolerance=tolerance, bound=bound, key_layout=layout, value_layout=layout
    )
    spec = filled_spec(policy)
    facts = AttentionFacts(scaling=scaling, softcap=softcap)
    plan = make_plan(make_request(policy), spec, facts, capacity=512, position=3)
    assert parse_plan(plan.text()) == plan
    assert parse_plan(plan.text()) is parse_plan(plan.text())
    assert plan.arguments.scaling == scaling
    assert plan.spec.softcap == (softcap > 0)


def filled_spec(policy: PrecisionPolicy) -> DecodeSpec:
    return DecodeSpec.from_policy(policy, head_dim=64, group=2)


def test_a_device_has_one_backend() -> None:
    assert backend_for(torch.device("cpu")) is backend_for(torch.device("cpu", 0))
