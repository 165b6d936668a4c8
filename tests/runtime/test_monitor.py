"""The report: what it says of a run is what the run did."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch

from alignedkv import runtime
from alignedkv.kernels import storage
from alignedkv.policy import PrecisionPolicy
from alignedkv.runtime import AlignedKVCache, make_request
from alignedkv.runtime.monitor import BINS, BINS_PER_BIT, LOWEST_EXPONENT, _medians
from alignedkv.runtime.patch import patch_of
from tiny_models import CACHE, make_tiny, prompt

COLUMNS = ["layer", "read_fraction", "bound_median", "bound_max", "misses", "stored_bytes"]


def test_before_any_step() -> None:
    model = make_tiny("Gemma3")
    with runtime.patched(model):
        report = runtime.report(model)
    assert list(report.columns) == COLUMNS
    assert report.layer.tolist() == [1]
    assert report[["read_fraction", "bound_median", "bound_max"]].isna().all(axis=None)
    assert (report[["misses", "stored_bytes"]] == 0).all(axis=None)


def test_counts_are_those_of_the_steps() -> None:
    model = make_tiny("Llama")
    ratios, read, misses = [], 0, 0
    with runtime.patched(model, "output", on_miss="flag"), torch.no_grad():
        cache = AlignedKVCache(
            model.config,
            make_request("output", on_miss="flag"),
            monitor=patch_of(model).monitor,
        )
        model(prompt(2, 30), **{CACHE: cache})
        tensors = cache.layers[1].tensors
        for step in range(5):
            model(torch.full((2, 1), step + 3), **{CACHE: cache})
            bound, size, missed, rows = (tensor.clone() for tensor in tensors.results)
            ratios.append((bound / size).flatten())
            misses += int(missed.sum())
            reads = rows.numpy()
            passes = reads[..., 0, 0] // (31 + step - 4)
            read += storage.bytes_read(tensors.spec, reads, exact=4 * passes).sum()
        row = runtime.report(model).iloc[1]
    ratio = torch.cat(ratios).double()
    stock = sum(range(31, 36)) * 2 * 2 * 64 * 2 * 2
    assert row.read_fraction == pytest.approx(read / stock)
    assert row.bound_max == pytest.approx(float(ratio.max()))
    assert abs(np.log2(row.bound_median / float(ratio.median()))) <= 1 / BINS_PER_BIT
    assert row.misses == misses


def test_exact_rows_are_read_and_stored() -> None:
    """Where every row is exact nothing else is read: K and V of float32, twice a 16-bit cache's."""
    model = make_tiny("Llama")
    with runtime.patched(model, PrecisionPolicy(exact_first=64)), torch.no_grad():
        cache = model(prompt(2, 30))[CACHE]
        for token in range(5):
            model(torch.full((2, 1), token + 3), **{CACHE: cache})
        report = runtime.report(model)
        tensors = cache.layers[0].tensors
    assert report.read_fraction.tolist() == [2.0, 2.0]
    rows = tensors.rows[-2:]
    assert [tuple(row.shape) for row in rows] == [(2, 2, 64, 64)] * 2
    others = sum(t.nbytes for t in tensors.everything()) - sum(t.nbytes for t in rows)
    assert report.stored_bytes[0] - others == 2 * 2 * 2 * 64 * 64 * 4


@pytest.mark.parametrize("exact_last", [0, 3])
def test_exact_rows_of_padded_sequences(exact_last: int) -> None:
    """A sequence of 5 tokens and one of 30: rows kept exact are those behind the padding."""
    model = make_tiny("Llama")
    mask = torch.ones(2, 31, dtype=torch.long)
    mask[1, :25] = 0
    policy = PrecisionPolicy(exact_first=4, exact_last=exact_last)
    with runtime.patched(model, policy, on_miss="flag"), torch.no_grad():
        cache = model(prompt(2, 30), attention_mask=mask[:, :-1])[CACHE]
        model(torch.full((2, 1), 3), attention_mask=mask, **{CACHE: cache})
        totals = patch_of(model).monitor._totals[torch.device("cpu")]
    kept = 4 + exact_last + min(4 + exact_last, 6)
    assert totals.exact.tolist() == [2 * kept] * 2
    assert totals.reads[:, 0, 0].tolist() == [2 * (31 + 6 - kept)] * 2


def test_padding_does_not_count() -> None:
    model = make_tiny("Llama")
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[1, :20] = 0
    with runtime.patched(model):
        model.generate(prompt(2, 30), attention_mask=mask, max_new_tokens=2)
        totals = patch_of(model).monitor._totals[torch.device("cpu")]
    assert totals.tokens.tolist() == [2 * (31 + 11)] * 2


def test_stored_bytes_are_those_of_live_caches() -> None:
    model = make_tiny("Llama")
    with runtime.patched(model), torch.no_grad():
        first = model(prompt(1, 300))
        one = runtime.report(model).stored_bytes
        assert one.tolist() == [layer.tensors.bytes() for layer in first[CACHE].layers]
        second = model(prompt(1, 300))
        assert (runtime.report(model).stored_bytes == 2 * one).all()
        del first, second
        gc.collect()
        assert (runtime.report(model).stored_bytes == 0).all()


def test_several_queries_at_once_are_all_counted() -> None:
    model = make_tiny("Llama")
    with runtime.patched(model), torch.no_grad():
        cache = model(prompt(1, 30))[CACHE]
        model(prompt(1, 5), **{CACHE: cache})
        totals = patch_of(model).monitor._totals[torch.device("cpu")]
    assert totals.tokens.tolist() == [2 * sum(range(31, 36))] * 2
    assert totals.histogram.sum(dim=1).tolist() == [4 * 5] * 2


def test_medians_of_a_histogram() -> None:
    histogram = np.zeros((3, BINS), np.int64)
    histogram[0, 10], histogram[0, 20], histogram[0, 30] = 3, 1, 1
    histogram[1, 7] = 1
    medians = np.log2(_medians(histogram))
    assert medians[0] == pytest.approx(LOWEST_EXPONENT + 10.5 / BINS_PER_BIT)
    assert medians[1] == pytest.approx(LOWEST_EXPONENT + 7.5 / BINS_PER_BIT)
    assert np.isnan(medians[2])


@pytest.mark.slow
def test_memory_does_not_grow_over_2000_steps() -> None:
    import resource

    model = make_tiny("Llama")

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    with runtime.patched(model), torch.no_grad():
        cache = AlignedKVCache(model.config, monitor=patch_of(model).monitor, max_cache_len=2400)
        model(prompt(1, 30), **{CACHE: cache})
        token = torch.tensor([[5]])
        for _ in range(300):
            model(token, **{CACHE: cache})
        gc.collect()
        before, tensors = peak(), sum(isinstance(o, torch.Tensor) for o in gc.get_objects())
        for _ in range(2000):
            model(token, **{CACHE: cache})
        gc.collect()
        after = sum(isinstance(o, torch.Tensor) for o in gc.get_objects())
    assert after <= tensors
    assert peak() - before < 4 << 10
