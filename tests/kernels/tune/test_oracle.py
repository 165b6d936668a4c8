"""The judgement of answers: the reference passes it, and every kind of wrong answer does not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from alignedkv.kernels import reference
from alignedkv.kernels.spec import DecodeSpec
from alignedkv.kernels.storage import from_float64, to_float32
from alignedkv.kernels.tune.oracle import (
    CheckCase,
    check_case,
    why_outside_bound,
    why_wrong,
)
from alignedkv.policy import BoundKind

SPEC = DecodeSpec(head_dim=64, group=2)


@pytest.fixture(scope="module")
def case() -> CheckCase:
    return check_case(SPEC, 2.0**-7)


@pytest.mark.parametrize(
    "spec",
    [
        SPEC,
        DecodeSpec(head_dim=64, group=1, bound=BoundKind.DETERMINISTIC, query_dtype="float32"),
        DecodeSpec(head_dim=64, group=1, bound=BoundKind.STATISTICAL, sample_values=True),
        DecodeSpec(head_dim=80, group=1, row_dtype="float16", page_tokens=64),
    ],
)
def test_the_reference_is_right(spec: DecodeSpec) -> None:
    case = check_case(spec, 2.0**-6)
    assert why_wrong(spec, case, case.expected) == ""


def test_a_step_in_other_parts_is_right_too(case: CheckCase) -> None:
    found = reference.decode(SPEC, case.cache, case.query, case.state, case.arguments, splits=7)
    assert why_wrong(SPEC, case, found) == ""


def test_a_finer_step_with_its_smaller_bound_is_right(case: CheckCase) -> None:
    finer = replace(case.state, theta=case.state.theta * np.float32(0.9))
    found = reference.decode(SPEC, case.cache, case.query, finer, case.arguments)
    assert (found.bound < case.expected.bound).any()
    assert why_wrong(SPEC, case, found) == ""


def test_an_output_beyond_its_bound_is_wrong(case: CheckCase) -> None:
    output = to_float32(case.expected.output, "bfloat16").astype(np.float64)
    output[1, 3, 5] += 3.0 * case.expected.bound[1, 3] + 0.02 * abs(output[1, 3, 5])
    found = replace(case.expected, output=from_float64(output, "bfloat16"))
    assert "sequence 1, head 3, channel 5" in why_wrong(SPEC, case, found)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none_are_wrong(case: CheckCase, value: float) -> None:
    output = to_float32(case.expected.output, "bfloat16").astype(np.float64)
    output[0, 0, 0] = value
    found = replace(case.expected, output=from_float64(output, "bfloat16"))
    assert "NaN or infinite" in why_wrong(SPEC, case, found)


def test_a_bound_that_is_nan_is_wrong(case: CheckCase) -> None:
    bound = case.expected.bound.copy()
    bound[1, 0] = np.nan
    assert "NaN" in why_wrong(SPEC, case, replace(case.expected, bound=bound))


def test_a_bound_under_the_references_is_wrong_even_if_it_holds(case: CheckCase) -> None:
    found = replace(case.expected, bound=case.expected.bound * np.float32(0.99))
    assert why_outside_bound(SPEC, found.output, found.bound, case.exact) == ""
    assert "under the reference's" in why_wrong(SPEC, case, found)
    slightly = replace(case.expected, bound=case.expected.bound * np.float32(1 - 2.0**-12))
    assert why_wrong(SPEC, case, slightly) == ""


def test_sequences_start_where_they_start(case: CheckCase) -> None:
    """The padded sequence's exact answer is of its own tokens: others would be far outside."""
    swapped = replace(case, exact=case.exact[::-1])
    assert why_wrong(SPEC, swapped, case.expected) != ""
