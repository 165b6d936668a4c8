"""Everything that changes a decode step's answer; `config.py` has what changes only its time."""

from __future__ import annotations

from dataclasses import dataclass

from alignedkv.errors import SpecError
from alignedkv.planes import DEFAULT_LAYOUT, PlaneLayout, padded_channels
from alignedkv.policy import BoundKind, PrecisionPolicy

HEAD_DIMS = (64, 80, 96, 128, 192, 256)
LAYOUTS = ("4|4|4|4", "4|4|8", "4|2|2|8")
DTYPES = ("float16", "bfloat16", "float32")
MAX_GROUP = 16
#: Query heads that are decoded together at most: what a warp has registers for.
MAX_SUBGROUP = 8
MIN_STORED_PLANES = 2
PAGE_TOKENS = (16, 32, 64, 128, 256)
MAX_TOKENS = 1 << 20
#: Rows of a plane, of all sequences and KV heads: their numbers have 32 bits (rows.cuh).
MAX_ROWS = 1 << 32


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeSpec:
    """Compile-time half of a decode step; `StepArguments` is the run-time half.

    Attributes
    ----------
    head_dim : int
        D.
    group : int
        G = query heads per KV head, 1 to 16.  More than 8 are decoded in parts (`subgroup`).
    query_dtype : str
        Of the query and the output.
    row_dtype : str
        Of the keys and values given to encode, and of rows kept exact.
    layout : PlaneLayout
        Of keys and values.
    stored_planes : int
        Planes in memory, 2 to all.
    bound : BoundKind
    dither_rows : int
        P.
    sample_values : bool
        Value rows below theta_s are sampled instead of skipped (sampling.md, Theorem S1).
    softcap, sinks, exact_rows : bool
        Whether scores are capped, a learned sink logit joins the softmax, first and last rows are
        kept exact.  Off, they cost nothing.
    page_tokens : int or None
        Tokens of a page of a block table; None for contiguous storage.

    Raises
    ------
    SpecError
        If a value is outside what kernels are emitted for.
    """

    head_dim: int
    group: int
    query_dtype: str = "bfloat16"
    row_dtype: str = "bfloat16"
    layout: PlaneLayout = DEFAULT_LAYOUT
    stored_planes: int = 4
    bound: BoundKind = BoundKind.ESTIMATE
    dither_rows: int = 64
    sample_values: bool = False
    softcap: bool = False
    sinks: bool = False
    exact_rows: bool = False
    page_tokens: int | None = None

    def __post_init__(self) -> None:
        _one_of("head_dim", self.head_dim, HEAD_DIMS)
        _one_of("query_dtype", self.query_dtype, DTYPES)
        _one_of("row_dtype", self.row_dtype, DTYPES)
        _one_of("layout", str(self.layout), LAYOUTS)
        _one_of("page_tokens", self.page_tokens, (None, *PAGE_TOKENS))
        if not 1 <= self.group <= MAX_GROUP:
            raise SpecError(f"group {self.group}: give 1 to {MAX_GROUP} query heads per KV head")
        if not MIN_STORED_PLANES <= self.stored_planes <= len(self.layout):
            raise SpecError(
                f"stored_planes {self.stored_planes}: {self.layout} takes "
                f"{MIN_STORED_PLANES} to {len(self.layout)}"
            )
        if self.dither_rows not in (32, 64, 128, 256):
            raise SpecError(f"dither_rows {self.dither_rows}: give 32, 64, 128 or 256")
        if self.sample_values and self.bound is BoundKind.DETERMINISTIC:
            raise SpecError("sample_values has no deterministic bound: take another bound kind")
        if self.softcap and self.bound is BoundKind.STATISTICAL:
            raise SpecError(
                "a statistical bound with a logit softcap: a capped score error is no longer "
                "centred, so Theorem 7 does not apply; take 'deterministic' or 'estimate'"
            )

    @property
    def channels(self) -> int:
        """Channels of a stored row: head_dim padded to a multiple of 32."""
        return padded_channels(self.head_dim)

    @property
    def subgroup(self) -> int:
        """Query heads that are planned and decoded together: the group, or equal parts of it.

        The largest divisor of the group up to `MAX_SUBGROUP`.  Each part has a plan of its own and
        reads for itself what it wants, so that a row may be read, and counts, more than once.
        """
        return max(n for n in range(1, MAX_SUBGROUP + 1) if self.group % n == 0)

    @property
    def subgroups(self) -> int:
        """Parts of a group that are decoded apart."""
        return self.group // self.subgroup

    @classmethod
    def from_policy(
        cls, policy: PrecisionPolicy, *, head_dim: int, group: int, **facts: object
    ) -> DecodeSpec:
        """The spec that serves ``policy`` for heads of a model.

        Raises
        ------
        SpecError
            If keys and values are to have different layouts, which only the analysis compares.
        """
        if policy.key_layout != policy.value_layout:
            raise SpecError(
                f"key layout {policy.key_layout} and value layout {policy.value_layout}: kernels "
                "take one layout for both"
            )
        return cls(
            head_dim=head_dim,
            group=group,
            layout=policy.key_layout,
            stored_planes=policy.planes_stored(policy.key_layout),
            bound=policy.bound,
            dither_rows=policy.dither_rows,
            sample_values=policy.sampled,
            exact_rows=policy.exact_first + policy.exact_last > 0,
            **facts,  # type: ignore[arg-type]
        )


def _one_of(name: str, given: object, allowed: tuple[object, ...]) -> None:
    if given not in allowed:
        raise SpecError(f"{name} {given!r}: give one of {', '.join(map(str, allowed))}")
