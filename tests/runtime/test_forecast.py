"""The forecast: bytes by arithmetic, shares by measurement, the break-even by a memory model."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest

from alignedkv import runtime
from alignedkv.errors import SpecError
from alignedkv.kernels import storage
from alignedkv.policy import BoundKind, PrecisionPolicy, model_policy, output_policy
from alignedkv.runtime.forecast import read_share
from tiny_models import make_tiny, tiny

RESULTS = Path(__file__).parents[2] / "benchmarks/results"
#: Bytes of four rows kept exact in float32, of those of one row of a 16-bit cache.
FOUR_FLOAT32_ROWS = 4 * 4 / 2


def test_bytes_are_arithmetic() -> None:
    told = runtime.forecast(tiny("Llama"), context=1000, batch=3)
    numbers = 2 * 2 * 2 * 64 * 3 * 1000
    assert told.stock_bytes_read == 2 * numbers
    assert told.stock_bytes_stored == 4 * numbers
    assert told.bytes_read == pytest.approx(told.read_share * 2 * numbers)
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
    assert told.bytes_read == pytest.approx(2 * usual.bytes_read, abs=1)


def test_in_words() -> None:
    told = runtime.forecast(tiny("Llama"), context=4096, policy="output")
    words = str(told)
    assert words.startswith("2 of 2 layers keep planes; at 1 x 4096 tokens a step reads about ")
    assert f"({told.read_share:.0%})" in words
    share = read_share(output_policy(), 4096) + FOUR_FLOAT32_ROWS / 4096
    assert told.read_share == pytest.approx(share, rel=0.01)


@pytest.mark.parametrize("context", [1, 3, 1000])
def test_exact_rows_are_read_and_stored(context: int) -> None:
    model = tiny("Llama")
    with_rows, without = (
        runtime.forecast(model, context=context, batch=3, policy=model_policy(exact_first=rows))
        for rows in (4, 0)
    )
    a_row = 2 * 2 * 3 * 2 * 64 * 4
    assert with_rows.bytes_stored - without.bytes_stored == 4 * a_row
    kept = min(context, 4)
    others = (1 - kept / context) * without.bytes_read
    assert with_rows.bytes_read == pytest.approx(others + kept * a_row, abs=2)


def test_shares_are_those_that_models_read() -> None:
    """What the forecast says beside what evaluate.py measured, rows kept exact counted in both."""
    seen = set()
    for model, context in product(("smollm2", "gemma3"), (1024, 4096)):
        told = json.loads((RESULTS / f"evaluate-{model}-{context}.json").read_text())
        assert int(told["options"]["exact_first"]) == 4
        for row in told["predictions"]:
            name, _, bits = row["name"].partition(" 2^-")
            if name == "alignedkv":
                share = read_share(model_policy(tolerance=2.0 ** -float(bits)), context)
                expected = share + FOUR_FLOAT32_ROWS / context
                assert expected == pytest.approx(row["read_fraction"], rel=0.15)
                seen.add((model, context, bits))
    assert len(seen) == 2 * 2 * 3


def test_shares_of_long_contexts_are_those_that_the_bench_read() -> None:
    rows = json.loads((RESULTS / "decode-nvidia-h200.json").read_text())["rows"]
    for tokens, batch in ((32768, 8), (131072, 1)):
        for tolerance in (2.0**-5, 2.0**-7):
            read = [
                row["read_fraction"]
                for row in rows
                if (row["T"], row["batch"], row["tolerance"]) == (tokens, batch, tolerance)
            ]
            assert len(read) == 2
            share = read_share(PrecisionPolicy(tolerance=tolerance), tokens)
            assert share == pytest.approx(sum(read) / 2, rel=0.15)


def test_longer_contexts_read_a_smaller_share() -> None:
    policy = model_policy()
    shares = [read_share(policy, context) for context in (1, 1024, 3000, 4096, 9999, 131072)]
    assert shares == sorted(shares, reverse=True)
    assert len(set(shares)) == 5
    assert read_share(policy, 1 << 20) == shares[-1]


def test_nobody_reads_more_than_all() -> None:
    assert read_share(PrecisionPolicy(tolerance=2.0**-16), 4096) == 1.0


@pytest.mark.parametrize("bound", list(BoundKind))
def test_finer_reads_more(bound: BoundKind) -> None:
    policies = [PrecisionPolicy(tolerance=2.0**-n, bound=bound) for n in range(3, 9)]
    shares = [read_share(policy, 4096) for policy in policies]
    assert shares == sorted(shares)
    assert 0.1 < shares[0] < shares[-1] < 1
    estimate = read_share(PrecisionPolicy(tolerance=2.0**-6), 4096)
    assert read_share(PrecisionPolicy(tolerance=2.0**-6, bound=bound), 4096) >= estimate


@pytest.mark.parametrize("options", [{"context": 0}, {"context": 10, "batch": 0}])
def test_nothing_to_forecast(options: dict[str, int]) -> None:
    with pytest.raises(SpecError, match="at least one of each"):
        runtime.forecast(make_tiny("Llama"), **options)
