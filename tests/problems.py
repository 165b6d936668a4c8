"""A decode step to be solved: stored inputs, a cache that holds them, hints, the exact answer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

import oracles
from alignedkv.kernels import reference
from alignedkv.kernels.arrays import CacheArrays, HeadState, StepArguments
from alignedkv.kernels.reference_hints import Near, look_near, next_rest
from alignedkv.kernels.reference_rows import attended_tokens, key_transform, read_rows
from alignedkv.kernels.spec import DecodeSpec
from alignedkv.kernels.storage import allocate_numpy, from_float64, to_float32
from alignedkv.policy import START_MARGIN, PrecisionPolicy
from strategies import Activations, Shape, activations


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Inputs as they are stored, and everything that a decode step is called with.

    ``keys`` and ``values`` are float64 copies of the typed inputs, for the oracle.
    """

    spec: DecodeSpec
    policy: PrecisionPolicy
    arguments: StepArguments
    cache: CacheArrays
    keys: NDArray[np.float64]
    values: NDArray[np.float64]
    query: NDArray[np.generic]
    sinks: NDArray[np.float32] | None = None

    @property
    def start_theta(self) -> float:
        return self.policy.start_theta(self.keys.shape[2])

    def exact(self) -> oracles.Exact:
        """Attention of all heads [B, H, D] on the stored inputs."""
        query = to_float32(self.query, self.spec.query_dtype).astype(np.float64)
        batch, heads, _ = query.shape
        group = self.spec.group
        output, log_z = np.zeros(query.shape), np.zeros((batch, heads))
        for b in range(batch):
            for h in range(heads // group):
                mine = slice(h * group, (h + 1) * group)
                found = oracles.attention(
                    query[b, mine],
                    self.keys[b, h],
                    self.values[b, h],
                    scaling=self.arguments.scaling,
                    start=int(self.cache.starts[b]),
                    length=int(self.cache.lengths[b]),
                    window=self.arguments.window,
                    softcap=self.arguments.softcap,
                    sinks=None if self.sinks is None else self.sinks[mine],
                )
                output[b, mine], log_z[b, mine] = found.output, found.log_z
        return oracles.Exact(output=output, log_z=log_z)


def near_of(problem: Problem) -> Near:
    """What the near rows and the query say of log Z, for all heads: [B, H]."""
    p = problem
    query = to_float32(p.query, p.spec.query_dtype).astype(np.float64)
    found = np.zeros((2, *query.shape[:2]))
    for b, h in np.ndindex(*p.cache.key_mean.shape[:2]):
        mine = slice(h * p.spec.group, (h + 1) * p.spec.group)
        rows = read_rows(p.spec, p.cache, b, h, attended_tokens(p.cache, p.arguments, b))
        transform = key_transform(p.cache, b, h)
        near = look_near(p.spec, p.arguments, transform, rows, query[b, mine])
        found[:, b, mine] = near.log_sum, near.offset
    return Near(log_sum=found[0], offset=found[1])


def rest_of(problem: Problem, log_z: NDArray[np.float64]) -> NDArray[np.float64]:
    """The rest that a step which finds ``log_z`` leaves where nothing was known [B, H]."""
    with np.errstate(all="ignore"):
        return next_rest(np.full(log_z.shape, -np.inf), near_of(problem), log_z)


def hinted(problem: Problem, *, theta: Any, log_z: Any = 0.0, spread: Any = 1.0) -> HeadState:
    """Hints with which a step plans for these, whatever its bound: numbers, or arrays [B, H].

    A log Z below that of the near rows alone cannot be had where they are looked at.
    """
    shape = problem.query.shape[:2]
    log_z, spread, theta = (np.broadcast_to(np.float64(x), shape) for x in (log_z, spread, theta))
    return HeadState(
        log_z=log_z.astype(np.float32),
        rest=rest_of(problem, log_z).astype(np.float32),
        spread=spread.astype(np.float32),
        theta=theta.astype(np.float32),
        margin=np.full(shape, START_MARGIN, np.float32),
        step=np.zeros(1, np.uint32),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How to make a `Problem`: sizes, kind of data, and what differs from the defaults."""

    data: str = "normal"
    shape: Shape = field(default_factory=Shape)
    policy: dict[str, Any] = field(default_factory=dict)
    spec: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    starts: tuple[int, ...] | None = None
    lengths: tuple[int, ...] | None = None
    seed: int = 0


def make(recipe: Recipe, *, encode: Any = reference.encode) -> Problem:
    """Build a problem; its rows are encoded by ``encode``."""
    given = activations(recipe.data, recipe.shape, seed=recipe.seed)
    return stored(recipe, given, encode=encode)


def stored(recipe: Recipe, given: Activations, *, encode: Any = reference.encode) -> Problem:
    """Round activations to the spec's types and put them into a cache."""
    shape = recipe.shape
    policy = PrecisionPolicy(**recipe.policy)
    facts = {"query_dtype": "float32", "row_dtype": "bfloat16", **recipe.spec}
    spec = DecodeSpec.from_policy(policy, head_dim=shape.head_dim, group=shape.group, **facts)
    keys, values = (from_float64(x, spec.row_dtype) for x in (given.keys, given.values))
    query = from_float64(given.query, spec.query_dtype)
    cache = allocate_numpy(
        spec,
        batch=shape.batch,
        kv_heads=shape.kv_heads,
        capacity=shape.tokens + 5,
        exact_first=policy.exact_first,
        exact_last=policy.exact_last,
        seed=recipe.seed,
    )
    if recipe.starts is not None:
        cache.starts[:] = recipe.starts
    reference.fit_transforms(spec, cache, keys, values)
    encode(spec, cache, keys, values)
    if recipe.lengths is not None:
        cache.lengths[:] = recipe.lengths
    arguments = StepArguments.from_policy(
        policy,
        scaling=recipe.arguments.get("scaling", shape.head_dim**-0.5),
        head_dim=shape.head_dim,
        tokens=shape.tokens,
        **{k: v for k, v in recipe.arguments.items() if k != "scaling"},
    )
    heads = shape.kv_heads * shape.group
    sinks = np.linspace(-2, 4, heads, dtype=np.float32) if spec.sinks else None
    return Problem(
        spec=spec,
        policy=policy,
        arguments=arguments,
        cache=cache,
        keys=to_float32(keys, spec.row_dtype).astype(np.float64),
        values=to_float32(values, spec.row_dtype).astype(np.float64),
        query=query,
        sinks=sinks,
    )


SMALL = Shape(batch=2, kv_heads=2, group=3, tokens=133, head_dim=64)


def recipe(**changes: Any) -> Recipe:
    """A small recipe; shape changes are given as Shape's fields in ``shape``."""
    sizes = {
        "batch": SMALL.batch, "kv_heads": SMALL.kv_heads, "group": SMALL.group,
        "tokens": SMALL.tokens, "head_dim": SMALL.head_dim,
    }  # fmt: skip
    return Recipe(shape=Shape(**{**sizes, **changes.pop("shape", {})}), **changes)


ESTIMATE, DETERMINISTIC, STATISTICAL = (
    {"bound": kind} for kind in ("estimate", "deterministic", "statistical")
)
TIGHT = {"tolerance": 2.0**-9}

#: Every value of the specification at least once, and those that meet in a model together.
RECIPES: dict[str, Recipe] = {
    "estimate": recipe(policy=ESTIMATE),
    "estimate-skipping": recipe(policy={**ESTIMATE, "sample_values": False}),
    "deterministic": recipe(policy=DETERMINISTIC),
    "statistical": recipe(policy=STATISTICAL),
    "estimate-sampled": recipe(
        data="peaky",
        policy={**ESTIMATE, "sample_values": True, "tolerance": 2.0**-5},
        shape={"tokens": 301},
    ),
    "statistical-sampled": recipe(policy={**STATISTICAL, "sample_values": True}),
    "tight": recipe(policy=TIGHT),
    "loose": recipe(policy={"tolerance": 0.1}, shape={"tokens": 700}),
    "one-token": recipe(shape={"tokens": 1}, policy=DETERMINISTIC),
    "64-tokens": recipe(shape={"tokens": 64}),
    "d80-g1": recipe(shape={"head_dim": 80, "group": 1}, policy=DETERMINISTIC),
    "d96-g5": recipe(shape={"head_dim": 96, "group": 5}),
    "d128-g16": recipe(shape={"head_dim": 128, "group": 16, "kv_heads": 1}),
    "g10-in-parts": recipe(
        spec={"sinks": True},
        policy={**STATISTICAL, "exact_first": 2, "dither_rows": 128},
        shape={"group": 10},
    ),
    "d192": recipe(shape={"head_dim": 192, "batch": 1}, policy=STATISTICAL),
    "d256-p256": recipe(shape={"head_dim": 256}, policy={"dither_rows": 256}),
    "4|4|8": recipe(policy={**DETERMINISTIC, "key_layout": "4|4|8", "value_layout": "4|4|8"}),
    "4|2|2|8": recipe(policy={**TIGHT, "key_layout": "4|2|2|8", "value_layout": "4|2|2|8"}),
    "4|2|2|8-settled": recipe(
        policy={**STATISTICAL, "key_layout": "4|2|2|8", "value_layout": "4|2|2|8"}
    ),
    "two-planes": recipe(policy={"stored_planes": 2}),
    "three-planes": recipe(policy={**DETERMINISTIC, "stored_planes": 3}),
    "float16": recipe(spec={"query_dtype": "float16", "row_dtype": "float16"}),
    "bfloat16": recipe(spec={"query_dtype": "bfloat16", "row_dtype": "bfloat16"}),
    "float32": recipe(spec={"row_dtype": "float32"}, policy=TIGHT),
    "window": recipe(arguments={"window": 37}),
    "window-and-padding": recipe(arguments={"window": 100}, starts=(0, 60)),
    "ragged": recipe(starts=(0, 60), lengths=(99, 133), policy=DETERMINISTIC),
    "empty": recipe(starts=(0, 133), policy=STATISTICAL),
    "softcap": recipe(spec={"softcap": True}, arguments={"softcap": 5.0}, policy=DETERMINISTIC),
    "softcap-estimate": recipe(spec={"softcap": True}, arguments={"softcap": 5.0}),
    "sinks": recipe(spec={"sinks": True}),
    "sinks-settled": recipe(spec={"sinks": True}, policy=STATISTICAL),
    "sinks-certain": recipe(spec={"sinks": True}, policy=DETERMINISTIC),
    "sinks-alone": recipe(spec={"sinks": True}, starts=(133, 0)),
    "exact-rows": recipe(policy={"exact_first": 4, "exact_last": 16}, starts=(0, 7)),
    "exact-rows-certain": recipe(policy={**DETERMINISTIC, "exact_first": 4, "exact_last": 3}),
    "window-settled": recipe(
        spec={"page_tokens": 16},
        policy={**STATISTICAL, "dither_rows": 256, "sample_values": True, "tolerance": 2.0**-3},
        arguments={"window": 290},
        shape={"tokens": 600},
        starts=(0, 480),
    ),
    "exact-rows-settled": recipe(policy={**STATISTICAL, "exact_last": 16}),
    "all-rows-exact": recipe(policy={"exact_first": 200}),
    "pages-of-16": recipe(spec={"page_tokens": 16}),
    "pages-of-64": recipe(spec={"page_tokens": 64}, policy=DETERMINISTIC, starts=(3, 70)),
    "everything": recipe(
        policy={"exact_first": 2, "exact_last": 8, "sample_values": True, "key_layout": "4|2|2|8",
                "value_layout": "4|2|2|8"},
        spec={"sinks": True, "softcap": True, "page_tokens": 32, "query_dtype": "bfloat16"},
        arguments={"softcap": 8.0, "window": 90, "seed": 7},
        starts=(0, 50),
    ),
    "no-repairs": recipe(arguments={"repairs": 0}, policy={"tolerance": 2.0**-13}),
    "two-repairs": recipe(arguments={"repairs": 2}, policy={"tolerance": 2.0**-10}),
}  # fmt: skip
