#!/usr/bin/env python
"""Time the analysis of one KV head, and the same algorithm in plain NumPy.

    python tools/bench_analysis.py --tokens 8192 32768 131072 --json analysis.json

One query position: encode, score, search theta, certify.  Compilation is not counted.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alignedkv.analysis.activations import AttentionCase
from alignedkv.analysis.alignment import align
from alignedkv.analysis.encoding import EncodedCase, StoredRows, encode_case
from alignedkv.analysis.plan import Shares
from alignedkv.analysis.plan_search import SKIPPED_SHARES, THETA_GRID, search_plan
from alignedkv.analysis.scores import PositionScores, score_position
from alignedkv.planes import DigitPlanes, dither_class, dither_table, encode_rows, padded_channels
from alignedkv.policy import BoundKind, PrecisionPolicy
from alignedkv.transform import fit_key_transform

SHARES = SKIPPED_SHARES[BoundKind.ESTIMATE]


def random_head(tokens: int, head_dim: int, group: int, seed: int) -> AttentionCase:
    """A head with a softmax of medium width: score deviations of 2.2."""
    rng = np.random.default_rng(seed)
    return AttentionCase(
        name="random",
        layer=0,
        kv_head=0,
        query=(2.2 * rng.standard_normal((group, 1, head_dim))).astype(np.float16),
        key=rng.standard_normal((tokens, head_dim), np.float32).astype(np.float16),
        value=rng.standard_normal((tokens, head_dim), np.float32).astype(np.float16),
        positions=np.array([tokens - 1]),
        dtype="float16",
        scaling=head_dim**-0.5,
    )


def analyse(case: AttentionCase, policy: PrecisionPolicy) -> tuple[float, float]:
    """Bits per element of K and of V, as the package finds them."""
    scores = score_position(encode_case(case, policy), 0)
    return search_plan(scores, policy).plan.mean_bits


def analyse_in_numpy(case: AttentionCase, policy: PrecisionPolicy) -> tuple[float, float]:
    """The same, written down in NumPy: whole arrays, a bound from all rows for every theta."""
    scores, values = _score_in_numpy(case, policy)
    tau = policy.tolerance * scores.size
    alignment = align(scores, policy, theta=tau)
    p = scores.probability
    sigma = np.stack([scores.score_deviation(n + 1) for n in range(scores.keys.stored)])
    distance = [np.abs(scores.value_rows - o) for o in scores.output]
    z = policy.deviations(case.head_dim, case.tokens)

    def meets(step: int, shares: Shares) -> tuple[bool, float]:
        plan = alignment.plan(THETA_GRID[step], shares)
        error = scores.value_error(plan.value_planes)
        skipped = plan.value_planes == 0
        holds = True
        for h in range(case.group):
            used = sigma[plan.key_planes - 1, h, np.arange(scores.tokens)]
            random = (p[h] ** 2 * np.expm1(used**2)) @ distance[h] ** 2
            random += (p[h] ** 2) @ np.where(skipped, 0, error**2 / 3)
            second = (p[h] * used**2) @ distance[h]
            bound = (z * np.sqrt(random) + second).max() + p[h] @ np.where(skipped, error, 0)
            holds = holds and bound <= tau[h]
        return holds, sum(plan.mean_bits)

    cheapest, found = np.inf, (0, SHARES[0])
    for shares in SHARES:
        low, high = 0, len(THETA_GRID)
        while low < high:
            step = (low + high) // 2
            holds, cost = meets(step, shares)
            if holds and cost < cheapest:
                cheapest, found = cost, (step, shares)
            low, high = (step + 1, high) if holds or cost >= cheapest else (low, step)
    plan = alignment.plan(THETA_GRID[found[0]], found[1])
    _certify_in_numpy(scores, values, plan.key_planes, plan.value_planes, sigma, z)
    return plan.mean_bits


def _score_in_numpy(
    case: AttentionCase, policy: PrecisionPolicy
) -> tuple[PositionScores, DigitPlanes]:
    tokens, channels = case.tokens, padded_channels(case.head_dim)
    classes = dither_class(np.arange(tokens), policy.dither_rows)
    query = case.query[:, 0].astype(np.float64)
    transform = fit_key_transform(case.key, np.abs(query).mean(axis=0))
    value_mean = case.value.mean(axis=0, dtype=np.float64).astype(np.float32)
    rows = transform.keys(case.key), case.value.astype(np.float32) - value_mean
    layouts = policy.key_layout, policy.value_layout
    stored, planes = [], []
    for seed, (source, layout) in enumerate(zip(rows, layouts, strict=True)):
        table = dither_table(policy.dither_rows, channels, seed=seed, layout=layout)
        planes.append(encode_rows(source, table[classes], layout))
        stored.append(
            StoredRows(
                words=planes[-1].words,
                scale_bits=planes[-1].scale_bits,
                table=table,
                classes=classes,
                layout=layout,
                stored=policy.planes_stored(layout),
            )
        )
    encoded = EncodedCase(
        case=case,
        policy=policy,
        transform=transform,
        value_mean=value_mean,
        keys=stored[0],
        values=stored[1],
        value_rows=case.value.astype(np.float32),
    )
    rotated = transform.exact_queries(query)
    offset = transform.offsets(query, tokens)
    scores = PositionScores(
        encoded=encoded,
        index=0,
        first=0,
        end=tokens,
        exact=case.scaling * (query @ case.key.astype(np.float64).T),
        planes=np.stack(
            [
                case.scaling * (rotated @ planes[0].prefix(n + 1).T + offset)
                for n in range(stored[0].stored)
            ]
        ),
        one_norm=case.scaling * np.abs(rotated).sum(axis=1),
        two_norm=case.scaling * np.linalg.norm(rotated, axis=1),
        is_exact=np.zeros(tokens, bool),
    )
    return scores, planes[1]


def _certify_in_numpy(
    scores: PositionScores,
    values: DigitPlanes,
    key_planes: NDArray[np.int8],
    value_planes: NDArray[np.int8],
    sigma: NDArray[np.float64],
    z: float,
) -> list[float]:
    head_dim = scores.encoded.case.head_dim
    read = np.zeros(values.words.shape)
    for n in range(1, scores.values.stored + 1):
        rows = value_planes == n
        read[rows] = values.prefix(n)[rows]
    error, skipped = scores.value_error(value_planes), value_planes == 0
    index = np.arange(scores.tokens)
    bounds = []
    for h in range(len(scores.exact)):
        score = scores.planes[key_planes - 1, h, index]
        p = np.exp(score - score.max())
        p /= p.sum()
        used = sigma[key_planes - 1, h, index]
        distance = np.abs(read[:, :head_dim] - p @ read[:, :head_dim])
        random = (p**2 * np.expm1(used**2)) @ distance**2 + p**2 @ (error**2 / 3)
        second = (p * used**2) @ distance
        bounds.append(float((z * np.sqrt(random) + second).max() + p @ np.where(skipped, error, 0)))
    return bounds


def timed(work: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Median time of a call, and of the processors in it: less on a machine with other work."""
    wall, processor = [], []
    for _ in range(repeats):
        started = time.perf_counter(), time.process_time()
        work()
        wall.append(time.perf_counter() - started[0])
        processor.append(time.process_time() - started[1])
    return {
        "seconds": statistics.median(wall),
        "processor_seconds": statistics.median(processor),
    }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--group", type=int, default=4, help="query heads of the KV head")
    parser.add_argument("--tolerance", type=float, default=2.0**-7)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-numpy", action="store_true", help="leave the transcription out")
    parser.add_argument("--json", type=Path, help="write the result here")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Print one line per size, and write them as JSON."""
    options = parse(argv)
    policy = PrecisionPolicy(tolerance=options.tolerance, sample_values=False)
    analyse(random_head(64, options.head_dim, options.group, seed=0), policy)  # compiles
    rows = []
    for tokens in sorted(options.tokens):
        case = random_head(tokens, options.head_dim, options.group, seed=1)
        row: dict[str, Any] = {"T": tokens, "bits": analyse(case, policy)}
        row |= timed(lambda case=case: analyse(case, policy), options.repeats)
        row["peak_mebibytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        rows.append(row)
    # After all of ours, whose peak memory it would hide.
    for row in rows if not options.no_numpy else []:
        case = random_head(row["T"], options.head_dim, options.group, seed=1)
        row["numpy_bits"] = analyse_in_numpy(case, policy)
        numpy_time = timed(lambda case=case: analyse_in_numpy(case, policy), 1)
        row |= {f"numpy_{name}": value for name, value in numpy_time.items()}
        row["speedup"] = row["numpy_seconds"] / row["seconds"]
    for row in rows:
        print(json.dumps(row))
    if options.json is not None:
        facts = {
            "head_dim": options.head_dim,
            "group": options.group,
            "tolerance": options.tolerance,
            "machine": platform.processor() or platform.machine(),
            "rows": rows,
        }
        options.json.write_text(json.dumps(facts, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
