"""What an attention mask says, and whether the kernels can follow it.

The kernels attend to the tokens ``start <= t < length`` of a sequence: padding on the left is a
late start.  Everything else a mask can say (holes, biases, masks of single heads) is refused, never
ignored.
"""

from __future__ import annotations

import torch
from torch import Tensor

REFUSAL = (
    "an attention mask that is not padding on the left: decode steps attend to all tokens from "
    "each sequence's first one on; pad on the left (tokenizer.padding_side = 'left'), or unpatch "
    "the model"
)


def attended(mask: Tensor) -> Tensor:
    """Tokens that the newest query sees, bool [B, kv].

    Parameters
    ----------
    mask : bool tensor [B, 1, S, kv], True for "attend", or a float one, 0 for "attend"
    """
    row = mask[:, 0, -1]
    return row if row.dtype is torch.bool else row == 0


def left_padding(mask: Tensor) -> tuple[Tensor, Tensor]:
    """First attended token of each sequence, and whether the mask is nothing but left padding.

    Returns
    -------
    starts : int32 tensor [B]
    plain : bool tensor, one element
        Every token from the start to the newest is attended, none before it.
    """
    seen = attended(mask)
    starts = seen.int().argmax(dim=-1).int()
    return starts, follows(mask, starts, torch.full_like(starts, mask.shape[-1])).all()


def follows(mask: Tensor, starts: Tensor, lengths: Tensor) -> Tensor:
    """Whether the newest query's mask is exactly ``start <= t < length``, bool [B]."""
    if mask.shape[1] != 1:
        return torch.zeros(mask.shape[0], dtype=torch.bool, device=mask.device)
    token = torch.arange(mask.shape[-1], device=mask.device)
    expected = (token >= starts[:, None]) & (token < lengths[:, None])
    good = attended(mask) == expected
    if mask.dtype is not torch.bool:
        row = mask[:, 0, -1]
        good &= expected | (row <= torch.finfo(row.dtype).min)
    return good.all(dim=-1)


def causal(mask: Tensor, starts: Tensor, length: int) -> bool:
    """Whether S queries that end at token ``length - 1`` each see exactly what came before them.

    Waits for the device.
    """
    queries = mask.shape[2]
    ends = torch.arange(length - queries + 1, length + 1, device=mask.device)
    rows = mask.transpose(1, 2).flatten(0, 1)[:, :, None]
    same = follows(rows, starts.repeat_interleave(queries), ends.repeat(mask.shape[0]))
    return mask.shape[1] == 1 and bool(same.all())
