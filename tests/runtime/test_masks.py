"""Masks: left padding is followed, everything else is recognised and refused."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from alignedkv.runtime import masks


def as_float(mask: torch.Tensor, lowest: float) -> torch.Tensor:
    return torch.where(mask, 0.0, lowest)


@given(
    starts=st.lists(st.integers(0, 9), min_size=1, max_size=3),
    hole=st.none() | st.tuples(st.integers(0, 2), st.integers(0, 9)),
    lowest=st.sampled_from([None, -torch.inf, torch.finfo(torch.float32).min]),
)
def test_left_padding_and_holes(
    starts: list[int], hole: tuple[int, int] | None, lowest: float | None
) -> None:
    first = torch.tensor(starts)
    mask = (torch.arange(10) >= first[:, None])[:, None, None]
    plain = True
    if hole is not None and hole[0] < len(starts):
        row, column = hole
        plain = column < starts[row] or column == starts[row] < 9
        if column == starts[row]:
            first[row] += 1
        mask[row, ..., column] = False
    found, ok = masks.left_padding(mask if lowest is None else as_float(mask, lowest))
    assert bool(ok) == plain
    if plain:
        assert found.tolist() == first.tolist()


def test_a_bias_is_no_padding() -> None:
    mask = torch.zeros(1, 1, 1, 6)
    assert masks.left_padding(mask)[1]
    mask[..., 2] = -1.0
    assert not masks.left_padding(mask)[1]
    mask[..., :3] = -1.0
    assert not masks.left_padding(mask)[1]


def test_a_mask_of_single_heads_is_refused() -> None:
    assert not masks.left_padding(torch.ones(1, 4, 1, 6, dtype=torch.bool))[1]


def test_columns_past_the_newest_token_stay_masked() -> None:
    mask = torch.zeros(2, 1, 1, 10, dtype=torch.bool)
    mask[0, ..., :5] = True
    mask[1, ..., 2:5] = True
    starts, lengths = torch.tensor([0, 2]), torch.tensor([5, 5])
    assert masks.follows(mask, starts, lengths).tolist() == [True, True]
    assert masks.follows(mask, starts, lengths + 1).tolist() == [False, False]


@pytest.mark.parametrize("queries", [1, 3, 6])
def test_causal(queries: int) -> None:
    starts = torch.tensor([0, 3])
    token, last = torch.arange(12), torch.arange(12 - queries, 12)
    mask = (token <= last[:, None]) & (token >= starts[:, None, None])
    mask = mask[:, None]
    assert masks.causal(mask, starts, 12)
    assert not masks.causal(mask, starts + 1, 12)
    mask[0, 0, 0, 5] = False
    assert not masks.causal(mask, starts, 12)
    if queries > 1:
        tree = torch.ones(2, 1, queries, 12, dtype=torch.bool)
        assert not masks.causal(tree, torch.zeros(2), 12)
