"""FlashInfer's decode kernels: paged, single-request and XQA.

Pages of a request lie one after another in memory, the best case for every paged kernel.  Plans are
made once, outside the clock, for the exact length.  Programmatic dependent launch is left at
FlashInfer's own choice, which is on from Hopper.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from benchlib.competitor import Element, Rotation, clones, no_cuda, round_cache, torch_dtype

if TYPE_CHECKING:
    from torch import Tensor

    from benchlib.problem import DecodeInputs, DecodeShape

__all__ = ["FlashInferPaged", "FlashInferSingle", "FlashInferXqa", "PageSize", "page_cache"]

PageSize = Literal[16, 64]

_WORKSPACE_BYTES = 256 * 2**20
"""Twice what FlashInfer recommends for split-KV partial results; XQA takes 8 MB of it for flags."""


def page_cache(cache: Tensor, page: int, layout: Literal["NHD", "HND"]) -> Tensor:
    """Cut K or V into pages; the last page of a request is filled up with zeros.

    Parameters
    ----------
    cache : torch.Tensor
        ``[B, Hkv, T, D]``.
    page : int
        Tokens in a page.
    layout : {"NHD", "HND"}
        Order inside a page: tokens, heads, channels or heads, tokens, channels.

    Returns
    -------
    torch.Tensor
        ``[B * P, page, Hkv, D]`` or ``[B * P, Hkv, page, D]``, contiguous, with ``P = ceil(T /
        page)``; page ``b * P + i`` holds tokens ``i * page`` and on of request ``b``.
    """
    batch, heads, tokens, channels = cache.shape
    pages = -(-tokens // page)
    padded = cache.new_zeros(batch, heads, pages * page, channels)
    padded[:, :, :tokens] = cache
    cut = padded.unflatten(2, (pages, page))
    order = (0, 2, 3, 1, 4) if layout == "NHD" else (0, 2, 1, 3, 4)
    paged: Tensor = cut.permute(order).flatten(0, 1).contiguous()
    return paged


def _missing() -> str | None:
    """Why FlashInfer cannot be used here; None if it can."""
    if (reason := no_cuda()) is not None:
        return reason
    try:
        importlib.import_module("flashinfer")
    except ImportError as error:
        return f"flashinfer cannot be imported ({error}); pip install flashinfer-python"
    return None


def _query(inputs: DecodeInputs, element: Element) -> Tensor:
    """Queries for a cache of `element`; an fp8 cache goes with float16 queries."""
    return inputs.q.to(torch_dtype("fp16" if element == "fp8" else element))


def _workspace(device: Any) -> Tensor:
    """Scratch memory; kernels want it zero at first use."""
    import torch

    return torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)


def _rotation(
    inputs: DecodeInputs,
    element: Element,
    copies: int,
    lay_out: Callable[[Tensor], Tensor],
    make_step: Callable[[float], Callable[[Tensor, Tensor], Tensor]],
) -> Rotation:
    """Round, lay out and copy K and V; `make_step` gets the scale of K and returns the kernel."""
    stored_k, k_scale = round_cache(inputs.k, element)
    stored_v, v_scale = round_cache(inputs.v, element)
    step = make_step(k_scale)

    def bind(k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        return lambda: step(k, v)

    pairs = zip(clones(lay_out(stored_k), copies), clones(lay_out(stored_v), copies), strict=True)
    return Rotation(calls=tuple(bind(k, v) for k, v in pairs), output_scale=v_scale)


@dataclass(frozen=True, slots=True, kw_only=True)
class FlashInferPaged:
    """``BatchDecodeWithPagedKVCacheWrapper`` with the FlashAttention 2 kernels.

    Parameters
    ----------
    element : {"fp16", "bf16", "fp8"}
        Stored element; fp8 is converted to float16 in registers, so only K and V are rounded.
    page : {16, 64}
        Tokens in a page, laid out NHD for 16 and HND for 64.
    tensor_cores : bool
        The prefill kernel on tensor cores instead of the decode kernel on CUDA cores.
    """

    element: Element
    page: PageSize
    tensor_cores: bool

    @property
    def name(self) -> str:
        """Such as ``flashinfer-paged64-tc-fp8``."""
        cores = ("tc",) if self.tensor_cores else ()
        return "-".join((f"flashinfer-paged{self.page}", *cores, self.element))

    @property
    def bits(self) -> int:
        """Bits per stored element."""
        return 8 if self.element == "fp8" else 16

    def obstacle(self, shape: DecodeShape) -> str | None:
        """Why FlashInfer cannot run; None if it can."""
        del shape  # paging takes every length, batch and group
        return _missing()

    def build(self, inputs: DecodeInputs, copies: int) -> Rotation:
        """Page K and V and plan the split of the work."""
        import flashinfer
        import torch

        shape = inputs.shape
        layout: Literal["NHD", "HND"] = "NHD" if self.page == 16 else "HND"
        q = _query(inputs, self.element)
        pages = -(-shape.tokens // self.page)

        def int32(values: range | list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=q.device)

        def make_step(k_scale: float) -> Callable[[Tensor, Tensor], Tensor]:
            wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                _workspace(q.device), layout, use_tensor_cores=self.tensor_cores, backend="fa2"
            )
            wrapper.plan(
                indptr=int32(range(0, (shape.batch + 1) * pages, pages)),
                indices=int32(range(shape.batch * pages)),
                last_page_len=int32([shape.tokens - (pages - 1) * self.page] * shape.batch),
                num_qo_heads=shape.heads,
                num_kv_heads=shape.kv_heads,
                head_dim=shape.head_dim,
                page_size=self.page,
                q_data_type=q.dtype,
                kv_data_type=torch_dtype(self.element),
            )
            return lambda k, v: wrapper.run(q, (k, v), k_scale=k_scale)

        return _rotation(
            inputs, self.element, copies, lambda x: page_cache(x, self.page, layout), make_step
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class FlashInferSingle:
    """``single_decode_with_kv_cache``: one request, one contiguous cache, laid out HND.

    Parameters
    ----------
    element : {"fp16", "fp8"}
        Stored element; fp8 is converted to float16 in registers.
    tensor_cores : bool
        The prefill kernel on tensor cores instead of the decode kernel on CUDA cores.
    """

    element: Element
    tensor_cores: bool

    @property
    def name(self) -> str:
        """Such as ``flashinfer-single-tc-fp16``."""
        return "-".join(
            ("flashinfer-single", *(("tc",) if self.tensor_cores else ()), self.element)
        )

    @property
    def bits(self) -> int:
        """Bits per stored element."""
        return 8 if self.element == "fp8" else 16

    def obstacle(self, shape: DecodeShape) -> str | None:
        """Why FlashInfer cannot run `shape`; None if it can."""
        if shape.batch != 1:
            return f"it decodes one request at a time, and the batch is {shape.batch}"
        return _missing()

    def build(self, inputs: DecodeInputs, copies: int) -> Rotation:
        """Copy K and V; there is nothing to plan."""
        import flashinfer

        q = _query(inputs, self.element)[0]

        def make_step(k_scale: float) -> Callable[[Tensor, Tensor], Tensor]:
            def step(k: Tensor, v: Tensor) -> Tensor:
                return flashinfer.single_decode_with_kv_cache(
                    q,
                    k,
                    v,
                    kv_layout="HND",
                    use_tensor_cores=self.tensor_cores,
                    k_scale=k_scale,
                ).unsqueeze(0)

            return step

        return _rotation(inputs, self.element, copies, lambda x: x[0].contiguous(), make_step)


@dataclass(frozen=True, slots=True, kw_only=True)
class FlashInferXqa:
    """``trtllm_batch_decode_with_kv_cache`` on XQA, what FlashInfer picks by itself on Hopper.

    Parameters
    ----------
    element : {"fp16", "bf16", "fp8"}
        Stored element.  With fp8 the kernel computes in fp8: it rounds q and the softmax weights
        to e4m3 as well.
    """

    element: Element

    _PAGE = 64

    @property
    def name(self) -> str:
        """Such as ``flashinfer-xqa-fp8``."""
        return f"flashinfer-xqa-{self.element}"

    @property
    def bits(self) -> int:
        """Bits per stored element."""
        return 8 if self.element == "fp8" else 16

    def obstacle(self, shape: DecodeShape) -> str | None:
        """Why XQA cannot run `shape`; None if it can."""
        if shape.head_dim % 16 or shape.head_dim > 256:
            return f"it has heads of up to 256 in steps of 16 channels, not {shape.head_dim}"
        return _missing()

    def build(self, inputs: DecodeInputs, copies: int) -> Rotation:
        """Page K and V."""
        import flashinfer
        import torch

        shape = inputs.shape
        q = _query(inputs, self.element)
        workspace = _workspace(q.device)
        pages = -(-shape.tokens // self._PAGE)
        table = torch.arange(shape.batch * pages, dtype=torch.int32, device=q.device)
        table = table.view(shape.batch, pages)
        lengths = torch.full((shape.batch,), shape.tokens, dtype=torch.int32, device=q.device)

        def make_step(k_scale: float) -> Callable[[Tensor, Tensor], Tensor]:
            return lambda k, v: flashinfer.decode.trtllm_batch_decode_with_kv_cache(
                query=q,
                kv_cache=(k, v),
                workspace_buffer=workspace,
                block_tables=table,
                seq_lens=lengths,
                max_seq_len=shape.tokens,
                bmm1_scale=k_scale / math.sqrt(shape.head_dim),
                bmm2_scale=1.0,
                kv_layout="HND",
                backend="xqa",
            )

        return _rotation(
            inputs, self.element, copies, lambda x: page_cache(x, self._PAGE, "HND"), make_step
        )
