"""alignedkv's decode step as a benchmark runs it: encoded caches, settled hints, calls to time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from alignedkv.kernels import launch
from alignedkv.kernels.arrays import CacheArrays, DecodeResult, StepArguments
from alignedkv.kernels.config import DecodeConfig
from alignedkv.kernels.device import device_target
from alignedkv.kernels.spec import DecodeSpec
from alignedkv.kernels.storage import allocate, bytes_read, exact_rows_read
from alignedkv.kernels.workspace import allocate_workspace
from alignedkv.policy import SETTLING_STEPS, PrecisionPolicy
from benchlib.problem import COLD_BYTES, DecodeInputs, DecodeShape, OutputError, output_error
from benchlib.timing import Timing, time_graph

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

__all__ = ["OurResult", "OurStep", "torch_put", "torch_zeros"]

_APPEND_ROOM = 2048
"""Tokens of room behind the filled cache for the calls that append."""
_LEAST_READ = 0.2
"""Share of the 16-bit bytes that a step reads at least, to size the rotation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OurResult:
    """What our step did.

    Parameters
    ----------
    attend : Timing
        Query preparation, attention, bound, merge and the repair pass; nothing appended: what the
        peers do.
    step : Timing
        The same with the new token encoded and appended.
    read_fraction : float
        Bytes read, row scales included, over those of the 16-bit cache.
    bound_max, bound_median : float
        Bound relative to the largest output component, over all heads.
    error : OutputError
        Against float64 attention.
    error_over_bound : float
        The largest ratio, over all heads, of an error to its bound and the output's own rounding.
        Of an estimate it may exceed 1, which a row's largest error and bound need not show.
    misses : int
        Heads whose bound exceeds the tolerance after the repair.
    """

    attend: Timing
    step: Timing
    read_fraction: float
    bound_max: float
    bound_median: float
    error: OutputError
    error_over_bound: float
    misses: int


def torch_zeros(shape: tuple[int, ...], dtype: str) -> Tensor:
    """`zeros` of `storage.allocate` on the current GPU; torch knows no uint32 worth the name."""
    import torch

    return torch.zeros(shape, dtype=getattr(torch, dtype.replace("uint32", "int32")), device="cuda")


def torch_put(array: Any) -> Tensor:
    """`put` of `storage.allocate` on the current GPU."""
    import torch

    return torch.from_numpy(array).cuda()


class OurStep:
    """A cache filled with the inputs, its copies, and the step on each of them.

    Parameters
    ----------
    inputs : DecodeInputs
        float16 or bfloat16, on the GPU.
    policy : PrecisionPolicy
    config : DecodeConfig, optional
        What wisdom knows, or the default, if not given.
    copies : int, optional
        Caches to rotate over; by default as many as make one rotation read `COLD_BYTES`.
    """

    def __init__(
        self,
        inputs: DecodeInputs,
        policy: PrecisionPolicy,
        *,
        config: DecodeConfig | None = None,
        copies: int | None = None,
    ) -> None:
        self.inputs, self.policy = inputs, policy
        shape = inputs.shape
        dtype = str(inputs.k.dtype).removeprefix("torch.")
        self.spec = DecodeSpec.from_policy(
            policy,
            head_dim=shape.head_dim,
            group=shape.group,
            query_dtype=dtype,
            row_dtype=dtype,
        )
        self.arguments = StepArguments.from_policy(
            policy,
            scaling=1 / math.sqrt(shape.head_dim),
            head_dim=shape.head_dim,
            tokens=shape.tokens,
        )
        first = self._fill()
        self.config = config or launch.configuration(self.spec, first)
        count = _copies(shape) if copies is None else copies
        self.caches = [first, *(_copy(first) for _ in range(count - 1))]
        target = device_target(inputs.k.device.index or 0)
        self.workspace = allocate_workspace(
            self.spec, self.config, target, first, zeros=torch_zeros
        )
        self._settle()

    def attend(self, cache: CacheArrays) -> DecodeResult:
        """One step that appends nothing."""
        return self._launch(cache, None, None)

    def append_and_attend(self, cache: CacheArrays) -> DecodeResult:
        """One step as a model makes it; the new token repeats the newest one."""
        return self._launch(cache, self.inputs.k[:, :, -1:], self.inputs.v[:, :, -1:])

    def measure(self, reference: Tensor, *, replays: int = 25, energy_s: float = 0.0) -> OurResult:
        """Check one step against the float64 reference ``[B, H, D]``, then time.

        Raises
        ------
        ValueError
            If an output is not finite or lies outside its own bound: it is broken, not fast.
        """
        import torch

        found = self.attend(self.caches[0])
        error = output_error(found.output, reference)
        # The output's own rounding to 16 bits is reported beside the bound, not inside it.
        rounding = torch.finfo(found.output.dtype).eps / 2 * found.size.double()
        distance = (found.output.double() - reference).abs().amax(-1)
        error_over_bound = float((distance / (found.bound.double() + rounding)).max())
        if not error_over_bound <= 1 and self._bound_is_proved:
            raise ValueError("an output lies outside its own bound: the kernel is broken")
        relative = found.bound.double() / found.size.double()
        reads = found.reads.cpu().numpy().astype("uint32")
        read = self.bytes_read(reads) / self.inputs.shape.kv_bytes(16)
        misses = int(found.missed.sum())
        attend = time_graph(self._calls(self.attend), replays=replays, energy_s=energy_s)
        step = time_graph(self._calls(self.append_and_attend), replays=replays)
        return OurResult(
            attend=attend,
            step=step,
            read_fraction=read,
            bound_max=float(relative.max()),
            bound_median=float(relative.median()),
            error=error,
            error_over_bound=error_over_bound,
            misses=misses,
        )

    def bytes_read(self, reads: NDArray[np.unsignedinteger]) -> int:
        """Bytes of a step whose `DecodeResult.reads` these are."""
        exact = None
        if self.spec.exact_rows:
            attended = np.array(self.inputs.shape.tokens)
            kept = attended.clip(max=self.policy.exact_first + self.policy.exact_last)
            exact = exact_rows_read(self.spec, reads[..., 0, 0].astype(np.int64), attended, kept)
        return int(bytes_read(self.spec, reads, exact=exact).sum())

    @property
    def _bound_is_proved(self) -> bool:
        return self.policy.bound == "deterministic"

    def _calls(self, run: Callable[[CacheArrays], DecodeResult]) -> list[Callable[[], Tensor]]:
        return [lambda cache=cache: run(cache).output for cache in self.caches]  # type: ignore[misc]

    def _launch(
        self, cache: CacheArrays, keys: Tensor | None, values: Tensor | None
    ) -> DecodeResult:
        import torch

        return launch.step(
            self.spec,
            self.config,
            cache,
            keys,
            values,
            self.inputs.q,
            self.state,
            self.arguments,
            self.workspace,
            stream=torch.cuda.current_stream().cuda_stream,
        )

    def _fill(self) -> CacheArrays:
        """A cache that holds the inputs, its transforms fitted to them."""
        import torch

        shape = self.inputs.shape
        cache = allocate(
            self.spec,
            batch=shape.batch,
            kv_heads=shape.kv_heads,
            capacity=shape.tokens + _APPEND_ROOM,
            zeros=torch_zeros,
            put=torch_put,
            exact_first=self.policy.exact_first,
            exact_last=self.policy.exact_last,
        )
        size = self.inputs.q.float().abs().unflatten(1, (shape.kv_heads, shape.group)).mean(2)
        stream = torch.cuda.current_stream().cuda_stream
        rows = (self.inputs.k, self.inputs.v)
        launch.fit_transforms(self.spec, cache, *rows, size.contiguous(), stream=stream)
        launch.encode(self.spec, cache, *rows, stream=stream)
        return cache

    def _settle(self) -> None:
        """Hints as a decode loop has them: from a probe, then from a few steps."""
        import torch

        found = launch.probe(
            self.spec,
            self.caches[0],
            self.inputs.q,
            self.arguments,
            start_theta=self.policy.start_theta(self.inputs.shape.tokens),
            config=self.config,
            workspace=self.workspace,
            stream=torch.cuda.current_stream().cuda_stream,
        )
        self.state = found
        for _ in range(SETTLING_STEPS):
            self.attend(self.caches[0])


def _copies(shape: DecodeShape) -> int:
    return max(2, math.ceil(COLD_BYTES / (_LEAST_READ * shape.kv_bytes(16))))


def _copy(cache: CacheArrays) -> CacheArrays:
    """A cache with rows of its own; what is the same for all copies and small is shared."""
    return replace(
        cache,
        key_planes=tuple(plane.clone() for plane in cache.key_planes),
        value_planes=tuple(plane.clone() for plane in cache.value_planes),
        scales=cache.scales.clone(),
        lengths=cache.lengths.clone(),
    )
