"""What the three kernels of a step share: their arguments, and the columns of their workspace.

Shapes use B sequences, Hkv KV heads, C channels, N planes.  A *home* is one KV head of one
sequence, ``b Hkv + h``.  A *place* is a home's subgroup of G query heads (`DecodeSpec.subgroup`),
``home subgroups + part``, which is decoded apart; query heads of a place lie side by side.
"""

from __future__ import annotations

from typing import Any, NamedTuple

# Columns of a query head's facts, fixed for a pass: lambda q.mean; the hints, log Z as scores are
# counted (`plan`); lambda ||q'||_1 and lambda ||q'||_2; b_t + e^a_t (theory.md, Lemma 3 and (7.1))
# over the key's row scale; and `reference_hints.Near`, counted like scores.
BASE, LOG_Z, SPREAD, THETA, NORM1, NORM2, SHIFT, NEAR, OFFSET = range(9)
FACTS = 9

# Columns of a split's sums; those of one bound share numbers with those of another.
WEIGHT, REACH, SKIPPED, SAMPLED_SQUARE, SAMPLED_LARGEST = range(5)
# ... of an estimate
SECOND, KEY_SQUARE, VALUE_SQUARE = range(5, 8)
# ... of a deterministic bound, and of a statistical one, which is the smaller of two
VALUE_ERROR, ERROR, ERROR_SIZE, SMALLEST = range(5, 9)
# ... of a statistical bound alone
LIKELY, SHIFTED, SHIFTED_SIZE, VALUE_BASE, SIZE, LARGEST_SHIFT = range(9, 15)

# Rows of a split's class sums [CLASS_SUMS, P] under a statistical bound, linear in the weights.
LINEAR_ONE, LINEAR_SIZE, SQUARE_ONE, SQUARE_SIZE, VALUE = range(5)
CLASS_SUMS = 5


class Stored(NamedTuple):
    """`CacheArrays`, flattened: rows [rows, ...] and homes [B Hkv, ...]."""

    key_planes: Any  # 4 x uint32 [rows, C width / 32]; the first again where not stored
    value_planes: Any  # 4 x uint8 [rows, C width / 8]
    scales: Any  # uint32 [rows]
    key_mean: Any  # float32 [B Hkv, D]
    balance: Any  # float32 [B Hkv, D]
    value_mean: Any  # float32 [B Hkv, D]
    signs: Any  # float32 [C]
    dither: Any  # int16 [2, P, C]
    lengths: Any  # int32 [B]
    starts: Any  # int32 [B]
    block_table: Any  # int32 [B, pages]; of no meaning without pages
    exact_keys: Any  # [B Hkv, slots, D] in row_dtype; of no meaning where none are kept
    exact_values: Any
    exact_first: int
    exact_last: int
    kv_heads: int
    capacity: int


class Asked(NamedTuple):
    """Queries and hints, flattened to [places, G, ...]."""

    query: Any  # query_dtype [places, G, D]
    log_z: Any  # float32 [places, G]
    rest: Any
    spread: Any
    theta: Any
    margin: Any
    step: Any  # uint32 [1]
    sinks: Any  # float32 [H]; of no meaning without sinks


class Step(NamedTuple):
    """A step's numbers: see `StepArguments`."""

    scaling: float
    tolerance: float
    deviations: float
    share: float  # chi, times SAMPLING_FACTOR where rows are sampled
    margin: float  # deviations that a planned weight is raised by; z under the settled rule
    softcap: float
    window: int
    seed: int  # modulo 2^32
    repairs: int


class Work(NamedTuple):
    """Between the kernels of a step: S splits."""

    queries: Any  # float32 [places, G, C]: lambda q'
    products: Any  # float64 [places, G, P]: lambda q'.U_s in units of g
    facts: Any  # float64 [places, G, FACTS]
    wanted: Any  # uint8 [repairs + 2, places, G]: 1 where a pass has to run
    tops: Any  # float64 [places, S, G]: largest score of a split
    sums: Any  # float64 [places, S, G, SUMS]
    classes: Any  # float64 [places, S, G, CLASS_SUMS, P]; of no meaning but for a statistical bound
    outputs: Any  # float64 [places, S, G, C]


class Answer(NamedTuple):
    """`DecodeResult`, flattened like `Asked`."""

    output: Any  # query_dtype [places, G, D]
    bound: Any  # float32 [places, G]
    size: Any
    missed: Any  # uint8 [places, G]
    reads: Any  # uint32 [B Hkv, 2, N]
    log_z: Any  # float32 [places, G]
    rest: Any
    spread: Any
    theta: Any
    margin: Any
    step: Any  # uint32 [1]
