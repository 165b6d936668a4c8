"""The forecast: bytes by arithmetic, shares by measurement, the break-even by a memory model."""

from __future__ import annotations

import pytest

from alignedkv import runtime
from alignedkv.errors import SpecError
from alignedkv.kernels import storage
from alignedkv.policy import BoundKind, PrecisionPolicy
from alignedkv.runtime.forecast import read_share
from tiny_models import make_tiny, tiny


def test_bytes_are_arithmetic() -> None:
    told = runtime.forecast(tiny("Llama"), context=1000, batch=3)
    numbers = 2 * 2 * 2 * 64 * 3 * 1000
    assert told.stock_bytes_read == 2 * numbers
    assert told.stock_bytes_stored == 4 * numbers
    assert told.bytes_read == round(told.read_share * 2 * numbers)
    assert (told.layers_served, told.layers_total) == (2, 2)
    assert told.break_even == 0


def test_stored_bytes_are_those_of_the_storage() -> None:
    policy = PrecisionPolicy(stored_planes=2)
    told = runtime.forecast(tiny("Llama"), context=1000, policy=policy)
    spec = runtime.AlignedKVCache(tiny("Llama").config, runtime.make_request(policy))
    assert spec.served == [0, 1]
    per_token = 4 + 2 * 2 * 64 * 4 // 8
    assert told.bytes_stored == 2 * 2 * 1000 * per_token
    assert storage.SCALE_BYTES == 4


def test_sliding_windows_do_not_count() -> None:
    told = runtime.forecast(tiny("Gemma3"), context=1000)
    assert (told.layers_served, told.layers_total) == (1, 2)


def test_parts_of_a_large_group_read_for_themselves() -> None:
    model = make_tiny("Llama", num_attention_heads=32, num_key_value_heads=2, head_dim=64)
    told = runtime.forecast(model, context=1000, policy="output")
    usual = runtime.forecast(tiny("Llama"), context=1000, policy="output")
    assert told.bytes_read == 2 * usual.bytes_read


def test_in_words() -> None:
    words = str(runtime.forecast(tiny("Llama"), context=4096, policy="output"))
    assert words.startswith("2 of 2 layers keep planes; at 1 x 4096 tokens a step reads about ")
    assert "(27%)" in words


@pytest.mark.parametrize("bound", list(BoundKind))
def test_finer_reads_more(bound: BoundKind) -> None:
    shares = [read_share(PrecisionPolicy(tolerance=2.0**-n, bound=bound)) for n in range(3, 11)]
    assert shares == sorted(shares)
    assert 0.1 < shares[0] <= shares[-1] < 1
    estimate = read_share(PrecisionPolicy(tolerance=2.0**-6))
    assert read_share(PrecisionPolicy(tolerance=2.0**-6, bound=bound)) >= estimate


@pytest.mark.parametrize("options", [{"context": 0}, {"context": 10, "batch": 0}])
def test_nothing_to_forecast(options: dict[str, int]) -> None:
    with pytest.raises(SpecError, match="at least one of each"):
        runtime.forecast(make_tiny("Llama"), **options)
