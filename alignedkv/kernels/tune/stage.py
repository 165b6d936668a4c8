"""A problem's arrays on a GPU: caches to rotate over, the exact answer, steps that have settled."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from alignedkv.errors import TuningError
from alignedkv.kernels import launch
from alignedkv.kernels.arrays import Array, CacheArrays, DecodeResult, HeadState, StepArguments
from alignedkv.kernels.config import DecodeConfig
from alignedkv.kernels.legality import default_config
from alignedkv.kernels.storage import allocate, bytes_read, held_dtype
from alignedkv.kernels.target import DeviceTarget
from alignedkv.kernels.tune.data import Inputs
from alignedkv.kernels.tune.oracle import CheckCase, check_case, exact_attention, policy_of
from alignedkv.kernels.tune.trials import Problem
from alignedkv.kernels.workspace import Workspace, allocate_workspace
from alignedkv.policy import SETTLING_STEPS

#: A rotation's steps read so many times the L2 cache together: nobody finds his rows there.
COLD_FACTOR: Final = 4.0

#: ``make_inputs(tokens, xp)`` -> inputs of so many tokens, arrays of the module ``xp``.
MakeInputs = Callable[[int, Any], Inputs]


@dataclass(frozen=True, slots=True, kw_only=True)
class Regime:
    """Steps at one tolerance.

    Attributes
    ----------
    arguments : StepArguments
    state : HeadState
        Where theta has settled; every candidate starts from it, so that all read the same rows.
    case : CheckCase
    case_cache : CacheArrays
        The check case's, on the GPU.
    bytes_read : int
        By a step, settled.
    """

    arguments: StepArguments
    state: HeadState
    case: CheckCase
    case_cache: CacheArrays
    bytes_read: int


class Stage:
    """What candidates of one problem run on.

    Parameters
    ----------
    problem : Problem
    make_inputs : function
    target : DeviceTarget
    xp : module
        ``cupy``, the wanted device being current.
    stream : cupy.cuda.Stream
        Current too.
    room : int
        Tokens that fit behind those of the problem: a step appends one.

    Raises
    ------
    TuningError
        If the spec has sinks, a softcap or exact rows, for which there are no inputs.
    """

    def __init__(
        self,
        problem: Problem,
        make_inputs: MakeInputs,
        target: DeviceTarget,
        *,
        xp: Any,
        stream: Any,
        room: int,
    ) -> None:
        spec = problem.spec
        if spec.sinks or spec.softcap or spec.exact_rows:
            raise TuningError(
                "sinks, softcaps and exact rows are not tuned: tune the spec without them; what is "
                "found holds for it alone"
            )
        self.problem, self._target, self._xp, self._stream = problem, target, xp, stream
        self._default = default_config(spec, target)
        # The last token is the one that every step appends.
        inputs = make_inputs(problem.tokens + 1, xp)
        keys, values = (self._cast(x, spec.row_dtype) for x in (inputs.keys, inputs.values))
        self.query = self._cast(inputs.query, spec.query_dtype)
        self._scaling = inputs.scaling
        rounded = replace(
            inputs,
            keys=self._float32(keys, spec.row_dtype),
            values=self._float32(values, spec.row_dtype),
            query=self._float32(self.query, spec.query_dtype),
        )
        #: float64 attention over all T + 1 tokens, NumPy [B, H, D].
        self.exact: NDArray[np.float64] = xp.asnumpy(exact_attention(rounded))
        self._rows = keys[:, :, -1:].copy(), values[:, :, -1:].copy()
        self._caches = [self._encoded(keys, values, inputs.query_size, room)]
        self._regimes: dict[float, Regime] = {}
        del inputs, rounded, keys, values
        xp.get_default_memory_pool().free_all_blocks()
        regime = self.regime(problem.tolerance)
        first = self._caches[0]
        self._caches += [_copied(first) for _ in range(self._copies(regime.bytes_read) - 1)]
        self._states = [regime.state.mapped(_copy) for _ in self._caches]

    @property
    def copies(self) -> int:
        """Caches of the same content that steps take in turn."""
        return len(self._caches)

    def step(
        self, number: int, config: DecodeConfig, regime: Regime, workspace: Workspace
    ) -> DecodeResult:
        """A step on one of the caches; changes its length and state."""
        cache, state = self._caches[number], self._states[number]
        return self._step(cache, config, state, regime.arguments, workspace)

    def check(self, config: DecodeConfig, regime: Regime) -> DecodeResult:
        """The check case's step by a candidate, as NumPy arrays."""
        found = launch.decode(
            self.problem.spec,
            regime.case_cache,
            self._xp.asarray(regime.case.query),
            regime.case.state.mapped(self._xp.asarray),
            regime.case.arguments,
            config=config,
            stream=self._stream.ptr,
        )
        return self.download(found)

    def reset(self, regime: Regime) -> None:
        """Every cache and state as before the first step."""
        self.reset_lengths()
        for state in self._states:
            state.assign(regime.state)

    def reset_lengths(self) -> None:
        """Forget the tokens that steps have appended."""
        for cache in self._caches:
            cache.lengths[...] = self.problem.tokens

    def workspace(self, config: DecodeConfig) -> Workspace:
        """Memory for a candidate's steps."""
        return allocate_workspace(
            self.problem.spec, config, self._target, self._caches[0], zeros=self._zeros
        )

    def download(self, result: DecodeResult) -> DecodeResult:
        """The answer as NumPy arrays; the state stays where it is."""
        names = [name for name in DecodeResult.__slots__ if name != "state"]
        return replace(result, **{n: self._xp.asnumpy(getattr(result, n)) for n in names})

    def regime(self, tolerance: float) -> Regime:
        """Arguments and settled state at a tolerance, found once with the default configuration."""
        if tolerance in self._regimes:
            return self._regimes[tolerance]
        spec, tokens = self.problem.spec, self.problem.tokens
        policy = policy_of(spec, tolerance)
        arguments = StepArguments.from_policy(
            policy,
            scaling=self._scaling,
            head_dim=spec.head_dim,
            tokens=tokens,
            seed=self.problem.seed,
        )
        cache = self._caches[0]
        state = launch.probe(
            spec,
            cache,
            self.query,
            arguments,
            start_theta=policy.start_theta(tokens),
            config=self._default,
            stream=self._stream.ptr,
        )
        workspace = self.workspace(self._default)
        for _ in range(SETTLING_STEPS):
            cache.lengths[...] = tokens  # each appends the same token behind the same others
            result = self._step(cache, self._default, state, arguments, workspace)
        read = bytes_read(spec, self._xp.asnumpy(result.reads))
        self.reset_lengths()
        case = check_case(spec, tolerance)
        self._regimes[tolerance] = Regime(
            arguments=arguments,
            state=state,
            case=case,
            case_cache=_mapped_cache(case.cache, self._xp.asarray),
            bytes_read=int(read.sum()),
        )
        return self._regimes[tolerance]

    def _step(
        self,
        cache: CacheArrays,
        config: DecodeConfig,
        state: HeadState,
        arguments: StepArguments,
        workspace: Workspace,
    ) -> DecodeResult:
        return launch.step(
            self.problem.spec,
            config,
            cache,
            *self._rows,
            self.query,
            state,
            arguments,
            workspace,
            stream=self._stream.ptr,
        )

    def _encoded(self, keys: Array, values: Array, query_size: Array, room: int) -> CacheArrays:
        """A cache of all tokens but the last."""
        problem, spec = self.problem, self.problem.spec
        cache = allocate(
            spec,
            batch=problem.batch,
            kv_heads=problem.kv_heads,
            capacity=problem.tokens + room,
            zeros=self._zeros,
            put=self._xp.asarray,
            seed=problem.seed,
        )
        rows = keys[:, :, :-1], values[:, :, :-1]
        on: dict[str, Any] = {"config": self._default, "stream": self._stream.ptr}
        launch.fit_transforms(spec, cache, *rows, query_size, **on)
        launch.encode(spec, cache, *rows, **on)
        return cache

    def _copies(self, read: int) -> int:
        """Caches that make a rotation cold, as far as half of the free memory holds them."""
        cache = self._caches[0]
        size = sum(int(plane.nbytes) for plane in (*cache.key_planes, *cache.value_planes))
        free = self._xp.cuda.runtime.memGetInfo()[0]
        wanted = math.ceil(COLD_FACTOR * self._target.l2_bytes / max(read, 1))
        return max(1, min(wanted, 1 + int(0.5 * free / size)))

    def _zeros(self, shape: tuple[int, ...], dtype: str) -> Array:
        return self._xp.zeros(shape, held_dtype(dtype))

    def _cast(self, numbers: Array, dtype: str) -> Array:
        """Finite float32 numbers rounded to a named dtype, bfloat16 as bit patterns."""
        if dtype != "bfloat16":
            return numbers.astype(dtype)
        # As formats.float32_to_bf16_bits, on the GPU.
        word = numbers.astype(np.float32).view(np.uint32)
        return ((word + (((word >> 16) & 1) + 0x7FFF)) >> 16).astype(np.uint16)

    def _float32(self, numbers: Array, dtype: str) -> Array:
        if dtype != "bfloat16":
            return numbers.astype(np.float32)
        return (numbers.astype(np.uint32) << 16).view(np.float32)


def _copied(cache: CacheArrays) -> CacheArrays:
    """What a step writes and reads much of is copied, the rest shared."""
    return replace(
        cache,
        key_planes=tuple(map(_copy, cache.key_planes)),
        value_planes=tuple(map(_copy, cache.value_planes)),
        scales=_copy(cache.scales),
        lengths=_copy(cache.lengths),
    )


def _copy(array: Array) -> Array:
    return array.copy()


def _mapped_cache(cache: CacheArrays, convert: Callable[[Array], Array]) -> CacheArrays:
    """Every array of a cache converted."""
    found: dict[str, Any] = {}
    for name in CacheArrays.__slots__:
        value = getattr(cache, name)
        if isinstance(value, tuple):
            found[name] = tuple(map(convert, value))
        elif hasattr(value, "dtype"):
            found[name] = convert(value)
    return replace(cache, **found)
