"""Is an answer right?  Float64 attention, the reference's step, and the judgement between them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from alignedkv.formats import BF16, FP16, FP32
from alignedkv.kernels import reference
from alignedkv.kernels.arrays import Array, CacheArrays, DecodeResult, HeadState, StepArguments
from alignedkv.kernels.spec import DecodeSpec
from alignedkv.kernels.storage import allocate_numpy, from_float64, to_float32
from alignedkv.kernels.tune.data import Inputs, synthesise
from alignedkv.policy import BoundKind, PrecisionPolicy

#: Sizes of the case that every candidate is checked on: two sequences, one of them padded, whose
#: tokens fill neither a tile nor a split.
CHECK_TOKENS: Final = 1501
CHECK_START: Final = 333
CHECK_BATCH: Final = 2
CHECK_KV_HEADS: Final = 2
#: A bound in float32 may be so much smaller than the same in float64: 2^14 additions of relative
#: rounding 2^-24.
BOUND_ROUNDING: Final = 2.0**-10
_FORMATS: Final = {"float16": FP16, "bfloat16": BF16, "float32": FP32}


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckCase:
    """A small step whose right answer is known.

    Attributes
    ----------
    cache : CacheArrays
        NumPy arrays.
    query : array [B, H, D] in query_dtype
    state : HeadState
    arguments : StepArguments
    expected : DecodeResult
        Of the reference.
    exact : float64 array [B, H, D]
        Attention over the rows as they were given.
    """

    cache: CacheArrays
    query: NDArray[np.generic]
    state: HeadState
    arguments: StepArguments
    expected: DecodeResult
    exact: NDArray[np.float64]


def policy_of(spec: DecodeSpec, tolerance: float) -> PrecisionPolicy:
    """The policy that a spec serves, at a tolerance."""
    return PrecisionPolicy(
        tolerance=tolerance,
        bound=spec.bound,
        key_layout=spec.layout,
        value_layout=spec.layout,
        stored_planes=spec.stored_planes,
        dither_rows=spec.dither_rows,
        sample_values=spec.sample_values,
    )


def check_case(spec: DecodeSpec, tolerance: float) -> CheckCase:
    """Make the case for a spec; takes about a second of NumPy."""
    inputs = synthesise(
        "mixed",
        tokens=CHECK_TOKENS,
        batch=CHECK_BATCH,
        kv_heads=CHECK_KV_HEADS,
        group=spec.group,
        head_dim=spec.head_dim,
    )
    keys, values = (from_float64(x, spec.row_dtype) for x in (inputs.keys, inputs.values))
    query = from_float64(inputs.query, spec.query_dtype)
    cache = allocate_numpy(spec, batch=CHECK_BATCH, kv_heads=CHECK_KV_HEADS, capacity=CHECK_TOKENS)
    cache.starts[1] = CHECK_START
    reference.fit_transforms(spec, cache, keys, values, inputs.query_size)
    reference.encode(spec, cache, keys, values)
    policy = policy_of(spec, tolerance)
    arguments = StepArguments.from_policy(
        policy, scaling=inputs.scaling, head_dim=spec.head_dim, tokens=CHECK_TOKENS
    )
    state = reference.probe(
        spec, cache, query, arguments, start_theta=policy.start_theta(CHECK_TOKENS)
    )
    # Whether a head is repaired can hang on the last bit of its bound, and then everything it read
    # differs: one pass compares better.
    once = replace(arguments, repairs=0)
    rounded = replace(
        inputs,
        keys=to_float32(keys, spec.row_dtype),
        values=to_float32(values, spec.row_dtype),
        query=to_float32(query, spec.query_dtype),
    )
    return CheckCase(
        cache=cache,
        query=query,
        state=state,
        arguments=once,
        expected=reference.decode(spec, cache, query, state, once),
        exact=exact_attention(rounded, starts=[int(start) for start in cache.starts]),
    )


def exact_attention(inputs: Inputs, *, starts: list[int] | None = None) -> Array:
    """Float64 attention [B, H, D], one KV head at a time; arrays of NumPy or CuPy.

    Parameters
    ----------
    inputs : Inputs
    starts : list of int, optional
        First token that each sequence sees.
    """
    batch, kv_heads, _, head_dim = inputs.keys.shape
    group = inputs.query.shape[1] // kv_heads
    grouped = inputs.query.reshape(batch, kv_heads, group, head_dim).astype(np.float64)
    output = grouped.copy()
    for b, h in np.ndindex(batch, kv_heads):
        seen = slice(0 if starts is None else starts[b], None)
        scores = inputs.scaling * (grouped[b, h] @ inputs.keys[b, h, seen].astype(np.float64).T)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        values = inputs.values[b, h, seen].astype(np.float64)
        output[b, h] = (weights @ values) / weights.sum(axis=1, keepdims=True)
    return output.reshape(inputs.query.shape)


def why_outside_bound(
    spec: DecodeSpec, output: Array, bound: Array, exact: NDArray[np.float64]
) -> str:
    """Why an output is no right answer; empty if it lies within its own bound of the exact one.

    Parameters
    ----------
    output : array [B, H, D] in query_dtype
    bound : float32 array [B, H]
    exact : float64 array [B, H, D]

    Notes
    -----
    The bound is on the output before it is rounded to its dtype, which moves it by u |output| more.
    """
    values = to_float32(output, spec.query_dtype).astype(np.float64)
    if not np.isfinite(values).all():
        return f"{int((~np.isfinite(values)).sum())} numbers of the output are NaN or infinite"
    if np.isnan(bound).any():
        return "a bound is NaN"
    form = _FORMATS[spec.query_dtype]
    rounding = form.unit_roundoff * np.abs(values) + form.smallest_subnormal
    excess = np.abs(values - exact) - rounding - bound[..., None].astype(np.float64)
    if (excess > 0).any():
        b, h, j = (int(i) for i in np.unravel_index(int(excess.argmax()), excess.shape))
        return (
            f"output {values[b, h, j]:g} of sequence {b}, head {h}, channel {j} is "
            f"{abs(values[b, h, j] - exact[b, h, j]):.3g} from the exact one, its bound is "
            f"{bound[b, h]:.3g}"
        )
    return ""


def why_wrong(spec: DecodeSpec, case: CheckCase, found: DecodeResult) -> str:
    """Why a step's answer to the check case is wrong; empty if it is right.

    Parameters
    ----------
    found : DecodeResult
        NumPy arrays.

    Notes
    -----
    Reads may differ from the reference's where a row lies at a threshold up to rounding.  A row
    read deeper takes at most its addend away from the bound, which at the threshold is theta:
    together sqrt(n) z theta where addends add up in squares (theory.md, Theorem 7, Estimate 9), and
    n theta sqrt(3 C) in Theorem 5, sqrt(3 C) being the largest error over the standard error.  A
    value row that was read instead of skipped takes chi theta away, whatever the kind.
    """
    if reason := why_outside_bound(spec, found.output, found.bound, case.exact):
        return reason
    group = spec.group
    expected = case.expected
    differing = np.abs(found.reads.astype(np.int64) - expected.reads.astype(np.int64))
    rows = np.repeat(differing.sum(axis=(-2, -1)), group, axis=1)
    theta = case.state.theta.astype(np.float64)
    if spec.bound is BoundKind.DETERMINISTIC:
        allowance = rows * theta * math.sqrt(3.0 * spec.channels)
    else:
        allowance = np.sqrt(rows) * theta * case.arguments.deviations
    skipped = np.repeat(differing[..., 1, 0], group, axis=1)
    allowance = allowance + skipped * case.arguments.skip_share * theta
    least = expected.bound.astype(np.float64) * (1.0 - BOUND_ROUNDING) - allowance
    if (found.bound < least).any():
        b, h = (int(i) for i in np.argwhere(found.bound < least)[0])
        return (
            f"bound {found.bound[b, h]:.4g} of sequence {b}, head {h} is under the reference's "
            f"{expected.bound[b, h]:.4g}"
        )
    return ""
