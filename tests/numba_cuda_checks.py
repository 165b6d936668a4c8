"""What a step by the Numba CUDA kernels must be, in the simulator and on a GPU."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from alignedkv.formats import BF16, FP16, FP32
from alignedkv.kernels import arithmetic, numba_cuda, reference
from alignedkv.kernels.arrays import DecodeResult, HeadState
from alignedkv.kernels.storage import to_float32
from alignedkv.policy import LEAST_REST, BoundKind
from feedback_checks import check_feedback
from problems import Problem, near_of

_UNIT = {"float16": FP16, "bfloat16": BF16, "float32": FP32}


def probed(problem: Problem) -> HeadState:
    """The reference's state, from which all steps of a comparison start."""
    p = problem
    return reference.probe(
        p.spec, p.cache, p.query, p.arguments, start_theta=p.start_theta, sinks=p.sinks
    )


def check_error(problem: Problem, found: DecodeResult) -> None:
    """Hold a step to exact attention, within its own bound."""
    p, spec = problem, problem.spec
    output = to_float32(found.output, spec.query_dtype).astype(np.float64)
    exact = p.exact().output
    u, tiny = _UNIT[spec.query_dtype].unit_roundoff, _UNIT[spec.query_dtype].smallest_subnormal
    # Rounded to float32 and then to the output's type.
    rounding = (u / (1 - u) + 2.0**-24) * np.maximum(np.abs(output), np.abs(exact)).max(-1) + tiny
    assert (np.abs(output - exact).max(axis=-1) <= found.bound + rounding).all()


def check_step(problem: Problem, state: HeadState, found: DecodeResult) -> None:
    """Compare a step (NumPy arrays) with exact attention and with the reference's step.

    Where ours misses and the reference's just does not, only one of them is repaired: leave repairs
    out, or none of the bounds near the tolerance.
    """
    p, spec = problem, problem.spec
    wanted = reference.decode(spec, p.cache, p.query, state, p.arguments, sinks=p.sinks)
    for name in ("output", "bound", "size", "missed", "reads"):
        assert getattr(found, name).shape == getattr(wanted, name).shape
        assert getattr(found, name).dtype == getattr(wanted, name).dtype

    check_error(p, found)

    np.testing.assert_array_equal(found.reads, wanted.reads)
    assert (found.bound >= wanted.bound).all()
    # The float32 of scores is below a sixteenth of what four planes leave open, and below a quarter
    # of its z deviations; that of values is c_acc 8.5 g, and 7.5 g is at most the largest distance
    # of a value from the mean, rounded up.
    share = 4 if spec.bound is BoundKind.STATISTICAL else 16
    model = arithmetic.numba_cuda(tile=numba_cuda.THREADS)
    largest = 2 * np.abs(p.values).max() * (1 + 2.0**-7) / 7.5
    sums = model.accumulation * arithmetic.REACH * largest

    def largest_bound(of: DecodeResult) -> NDArray[np.float64]:
        return (1 + 1 / share) * of.bound + sums

    most = largest_bound(wanted)
    assert (found.bound <= most).all()
    assert (found.missed >= wanted.missed).all()
    clear = most <= p.arguments.tolerance * (wanted.size - most)
    assert not found.missed[clear].any()

    np.testing.assert_allclose(found.state.log_z, wanted.state.log_z, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.state.spread, wanted.state.spread, rtol=1e-4)
    np.testing.assert_allclose(found.size, wanted.size, rtol=1e-4)
    # Feedback is of the first pass, whose misses a repair hides.
    first, missed = wanted, found.missed
    if p.arguments.repairs:
        once = replace(p.arguments, repairs=0)
        first = reference.decode(spec, p.cache, p.query, state, once, sinks=p.sinks)
        missed = first.missed
    check_feedback(
        state,
        found.state,
        bound=first.bound,
        most=largest_bound(first),
        tau=p.arguments.tolerance * first.size,
        missed=missed,
    )
    _check_rest(p, found, wanted)
    assert found.state.step[0] == wanted.state.step[0]


def _check_rest(problem: Problem, found: DecodeResult, wanted: DecodeResult) -> None:
    """Compare the remembered rest, whose errors are those of log Z by 1 / (e^beyond - 1)."""
    rest, theirs = found.state.rest, wanted.state.rest
    known = np.isfinite(theirs)
    np.testing.assert_array_equal(known, np.isfinite(rest))
    beyond = (wanted.state.log_z - near_of(problem).log_sum)[known]
    allowed = 1e-5 * (1.0 + np.abs(theirs[known])) / np.expm1(np.clip(beyond, LEAST_REST, 1.0))
    assert (np.abs(rest[known] - theirs[known]) <= allowed).all()
