"""The competitors, as far as that needs no GPU: layouts, rounding, errors, calls, the clock."""

import contextlib
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

TOOLS = Path(__file__).resolve().parents[2] / "tools"

torch = pytest.importorskip("torch")

from benchlib import competitor, flashinfer_decode, peers, problem, timing, torch_sdpa  # noqa: E402

E4M3_UNIT_ROUNDOFF = 2.0**-4
E4M3_SMALLEST_NORMAL = 2.0**-6

SHAPES = (
    problem.DecodeShape(tokens=1, batch=1, heads=1, kv_heads=1, head_dim=16),
    problem.DecodeShape(tokens=63, batch=2, heads=6, kv_heads=2, head_dim=32),
    problem.DecodeShape(tokens=128, batch=1, heads=8, kv_heads=2, head_dim=64),
    problem.DecodeShape(tokens=145, batch=3, heads=7, kv_heads=1, head_dim=16),
)


@pytest.fixture(params=SHAPES, ids=lambda s: f"T{s.tokens}-B{s.batch}-G{s.group}-D{s.head_dim}")
def inputs(request):
    return problem.random_inputs(request.param, device="cpu")


def as_stored(inputs, element):
    """The step as a cache of `element` holds it, so that what is left is the kernel's own error."""
    query = "fp16" if element == "fp8" else element
    return problem.DecodeInputs(
        q=inputs.q.to(competitor.torch_dtype(query)),
        **{
            name: stored.float() * scale
            for name in ("k", "v")
            for stored, scale in [competitor.round_cache(getattr(inputs, name), element)]
        },
    )


def kernel_bound(inputs, unit):
    """Bound on the relative error of a kernel that rounds scores, weights and outputs to `unit`.

    Scores off by ``unit max |s|`` change a weight by a factor within ``exp(+-2 unit max |s|)``;
    the weights and the output are rounded once more, and every value is at most ``max |v|``.
    """
    q = inputs.q.double().unflatten(1, (inputs.shape.kv_heads, -1))
    scores = q @ inputs.k.double().transpose(2, 3) / math.sqrt(inputs.shape.head_dim)
    factor = math.exp(2 * unit * float(scores.abs().max())) * (1 + unit) ** 2 - 1
    smallest_output = problem.reference_output(inputs).abs().amax(-1).min()
    return factor * float(inputs.v.abs().max() / smallest_output)


UNIT_ROUNDOFF = {"fp16": 2.0**-11, "bf16": 2.0**-8, "fp8": 2.0**-11}


# Problem


@pytest.mark.parametrize("size", ["tokens", "batch", "heads", "kv_heads", "head_dim"])
def test_shape_refuses_empty_sizes(size):
    with pytest.raises(ValueError, match=f"{size} is 0"):
        problem.DecodeShape(**({"tokens": 8} | {size: 0}))


def test_shape_refuses_uneven_groups():
    with pytest.raises(ValueError, match="give a multiple of 8"):
        problem.DecodeShape(tokens=8, heads=12, kv_heads=8)


def test_inputs_refuse_shapes_that_do_not_fit():
    q, cache = torch.zeros(1, 4, 16), torch.zeros(1, 2, 8, 16)
    for wrong in ({"k": cache[..., :8]}, {"v": cache[:, :, :4]}, {"q": q[0]}, {"q": q[..., :8]}):
        with pytest.raises(ValueError, match="do not fit"):
            problem.DecodeInputs(**({"q": q, "k": cache, "v": cache} | wrong))


@given(tokens=st.integers(1, 10**6), batch=st.integers(1, 64), bits=st.sampled_from([8, 16]))
def test_copies_exceed_every_cache_and_no_more_than_needed(tokens, batch, bits):
    shape = problem.DecodeShape(tokens=tokens, batch=batch)
    copies = problem.copies_for_cold_cache(shape, bits)
    assert copies >= 2
    assert copies * shape.kv_bytes(bits) >= problem.COLD_BYTES
    assert copies == 2 or (copies - 1) * shape.kv_bytes(bits) < problem.COLD_BYTES


def test_reference_output_is_attention(inputs):
    shape = inputs.shape
    q, k, v = (x.double().numpy() for x in (inputs.q, inputs.k, inputs.v))
    expected = np.empty_like(q)
    for b in range(shape.batch):
        for h in range(shape.heads):
            scores = k[b, h // shape.group] @ q[b, h] / np.sqrt(shape.head_dim)
            weights = np.exp(scores - scores.max())
            expected[b, h] = weights @ v[b, h // shape.group] / weights.sum()
    np.testing.assert_allclose(problem.reference_output(inputs).numpy(), expected, rtol=1e-12)


def test_output_error_is_per_head_and_relative():
    reference = torch.tensor([[[1.0, -4.0], [0.5, 0.25], [2.0, 2.0]]], dtype=torch.float64)
    output = reference.clone()
    output[0, 0, 0] += 1.0  # a quarter of the head's largest element
    output[0, 1, 1] -= 0.5  # all of it
    error = problem.output_error(output, reference)
    assert (error.median, error.max) == (0.25, 1.0)
    assert error.rms == pytest.approx(math.sqrt((0.25**2 + 1 + 0) / 3))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_output_error_refuses_what_is_no_number(bad):
    reference = torch.ones(1, 2, 4, dtype=torch.float64)
    output = reference.clone()
    output[0, 1, 3] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        problem.output_error(output, reference)


def test_output_error_refuses_another_shape():
    with pytest.raises(ValueError, match="differ in shape"):
        problem.output_error(torch.ones(1, 4, 2), torch.ones(1, 2, 4))


# Rounding and layout


@given(exponent=st.integers(-30, 15), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=50)
def test_fp8_cache_is_within_half_a_unit_everywhere(exponent, seed):
    generator = torch.Generator().manual_seed(seed)
    cache = torch.randn(1, 2, 33, 16, generator=generator) * 2.0**exponent
    stored, scale = competitor.round_cache(cache, "fp8")
    assert stored.dtype == torch.float8_e4m3fn
    error = (stored.float().double() * scale - cache.double()).abs()
    allowed = E4M3_UNIT_ROUNDOFF * cache.abs().double().clamp_min(E4M3_SMALLEST_NORMAL * scale)
    # The quotient by the scale is rounded to float32 first.
    assert bool((error <= allowed * (1 + 2.0**-20)).all())
    assert float(stored.float().abs().max()) == 448.0


def test_fp8_cache_of_zeros_stays_zero():
    stored, scale = competitor.round_cache(torch.zeros(1, 1, 4, 16), "fp8")
    assert scale == 1.0
    assert not stored.float().any()


@given(
    tokens=st.integers(1, 70), batch=st.integers(1, 3), heads=st.integers(1, 3), page=st.just(16)
)
def test_every_token_is_found_in_its_page(tokens, batch, heads, page):
    cache = torch.arange(1, 1 + batch * heads * tokens * 2).view(batch, heads, tokens, 2)
    pages = -(-tokens // page)
    for layout in ("NHD", "HND"):
        paged = flashinfer_decode.page_cache(cache, page, layout)
        assert paged.is_contiguous()
        inside = (page, heads) if layout == "NHD" else (heads, page)
        assert paged.shape == (batch * pages, *inside, 2)
        for b, h, t in np.ndindex(batch, heads, tokens):
            place = (t % page, h) if layout == "NHD" else (h, t % page)
            assert torch.equal(paged[(b * pages + t // page, *place)], cache[b, h, t])
        assert int((paged == 0).sum()) == batch * heads * (pages * page - tokens) * 2


# Competitors


def test_names_are_unique_and_leaders_exist():
    names = [peer.name for peer in peers.all_peers()]
    assert len(set(names)) == len(names)
    assert [peer.name for peer in peers.named_peers(peers.LEADERS)] == list(peers.LEADERS)
    assert {peer.bits for peer in peers.named_peers(peers.LEADERS)} == {8, 16}


def test_bits_follow_the_stored_element():
    for peer in peers.all_peers():
        assert peer.bits == (8 if peer.name.endswith("fp8") else 16)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"no peer is called nobody; there are sdpa-cudnn-fp16"):
        peers.named_peers(["sdpa-cudnn-fp16", "nobody"])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("element", ["fp16", "bf16"])
@pytest.mark.parametrize("backend", ["flash", "cudnn"])
def test_sdpa_computes_the_step(monkeypatch, inputs, backend, element, packed):
    # Both backends need a GPU; the arguments mean the same to the one that torch has on a CPU.
    asked = []

    def any_backend(backend):
        asked.append(backend.name)
        return contextlib.nullcontext()

    monkeypatch.setattr("torch.nn.attention.sdpa_kernel", any_backend)
    peer = torch_sdpa.TorchSdpa(backend=backend, element=element, packed=packed)
    rotation = peer.build(inputs, copies=3)
    stored = as_stored(inputs, element)
    error = problem.output_error(rotation.output(), problem.reference_output(stored))
    assert error.max <= kernel_bound(stored, UNIT_ROUNDOFF[element])
    assert set(asked) == {f"{backend.upper()}_ATTENTION"}
    assert len(rotation.calls) == 3
    assert all(torch.equal(call(), rotation.calls[0]()) for call in rotation.calls)


class FakeFlashInfer:
    """What the competitors ask of FlashInfer, in float64 from the page tables that they give it."""

    def __init__(self):
        self.decode = SimpleNamespace(trtllm_batch_decode_with_kv_cache=self.xqa)
        self.seen = []

    def attend(self, q, k, v, scale):
        """Attention of ``q [H, D]`` over ``k, v [Hkv, T, D]``."""
        self.seen.append((k.data_ptr(), v.data_ptr()))
        k, v = (x.float().double().repeat_interleave(len(q) // len(k), 0) for x in (k, v))
        weights = torch.softmax(torch.einsum("hd,htd->ht", q.double(), k) * scale, -1)
        return torch.einsum("ht,htd->hd", weights, v).to(q.dtype)

    def gather(self, cache, layout, table, length):
        """The first `length` tokens of the pages in `table`, ``[Hkv, T, D]``."""
        pages = cache.float()[table.long()]
        if layout == "NHD":
            pages = pages.transpose(1, 2)
        return pages.transpose(0, 1).flatten(1, 2)[:, :length]

    def single_decode_with_kv_cache(self, q, k, v, *, kv_layout, use_tensor_cores, k_scale):
        assert kv_layout == "HND"
        return self.attend(q, k, v, k_scale / math.sqrt(q.shape[-1]))

    def xqa(
        self,
        *,
        query,
        kv_cache,
        workspace_buffer,
        block_tables,
        seq_lens,
        max_seq_len,
        bmm1_scale,
        bmm2_scale,
        kv_layout,
        backend,
    ):
        assert backend == "xqa"
        assert not workspace_buffer.any()
        assert int(seq_lens.max()) == max_seq_len
        rows = (
            self.attend(
                q, *(self.gather(x, kv_layout, table, int(n)) for x in kv_cache), bmm1_scale
            )
            for q, table, n in zip(query, block_tables, seq_lens, strict=True)
        )
        return torch.stack(list(rows)) * bmm2_scale

    def BatchDecodeWithPagedKVCacheWrapper(  # noqa: N802 - FlashInfer's name
        self, workspace, kv_layout, *, use_tensor_cores, backend
    ):
        assert backend == "fa2"
        assert not workspace.any()
        plan = {}

        def run(q, cache, *, k_scale):
            scale = k_scale / math.sqrt(plan["head_dim"])
            rows = []
            for b in range(len(q)):
                start, stop = plan["indptr"][b : b + 2]
                length = (int(stop - start) - 1) * plan["page_size"] + int(plan["last_page_len"][b])
                table = plan["indices"][start:stop]
                kv = (self.gather(x, kv_layout, table, length) for x in cache)
                rows.append(self.attend(q[b], *kv, scale))
            return torch.stack(rows)

        return SimpleNamespace(plan=lambda **given: plan.update(given), run=run)


FLASHINFER_PEERS = [peer for peer in peers.all_peers() if peer.name.startswith("flashinfer")]


@pytest.mark.parametrize("peer", FLASHINFER_PEERS, ids=lambda peer: peer.name)
def test_flashinfer_is_given_the_right_step(monkeypatch, inputs, peer):
    fake = FakeFlashInfer()
    monkeypatch.setitem(sys.modules, "flashinfer", fake)
    monkeypatch.setattr(flashinfer_decode, "_WORKSPACE_BYTES", 64)
    if peer.name.startswith("flashinfer-single") and inputs.shape.batch > 1:
        assert "one request at a time" in peer.obstacle(inputs.shape)
        return
    rotation = peer.build(inputs, copies=2)
    error = problem.output_error(
        rotation.output(), problem.reference_output(as_stored(inputs, peer.element))
    )
    # The stand-in computes in float64 and rounds its output.
    assert error.max <= UNIT_ROUNDOFF[peer.element] * (1 + 2.0**-20)


def test_a_rotation_reads_another_copy_in_every_call(monkeypatch):
    fake = FakeFlashInfer()
    monkeypatch.setitem(sys.modules, "flashinfer", fake)
    inputs = problem.random_inputs(SHAPES[2], device="cpu")
    peer = flashinfer_decode.FlashInferSingle(element="fp16", tensor_cores=True)
    for call in peer.build(inputs, copies=4).calls:
        call()
    assert len(set(fake.seen)) == len(fake.seen) == 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_without_a_gpu_every_peer_says_so_and_none_is_timed():
    inputs = problem.random_inputs(SHAPES[0], device="cpu")
    reference = problem.reference_output(inputs)
    results = [peers.measure_peer(peer, inputs, reference) for peer in peers.all_peers()]
    assert {result.reason for result in results} == {"torch finds no CUDA device"}
    assert peers.fastest(results, 16) is None


def test_a_missing_flashinfer_is_a_reason(monkeypatch):
    monkeypatch.setattr(flashinfer_decode, "no_cuda", lambda: None)
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    reason = flashinfer_decode.FlashInferXqa(element="fp16").obstacle(SHAPES[0])
    assert "flashinfer cannot be imported" in reason
    assert "pip install flashinfer-python" in reason


def test_a_peer_that_fails_is_reported_not_raised(monkeypatch):
    inputs = problem.random_inputs(SHAPES[0], device="cpu")
    reference = problem.reference_output(inputs)
    broken = SimpleNamespace(name="broken", bits=8, obstacle=lambda shape: None)
    broken.build = lambda inputs, copies: (_ for _ in ()).throw(RuntimeError("no kernel\nnoise"))
    result = peers.measure_peer(broken, inputs, reference)
    assert (result.reason, result.timing) == ("RuntimeError: no kernel", None)
    nan = competitor.Rotation(calls=(lambda: torch.full_like(inputs.q, math.nan),))
    broken.build = lambda inputs, copies: nan
    assert "NaN" in peers.measure_peer(broken, inputs, reference).reason


def test_fastest_is_the_lowest_median_of_its_bits():
    def result(name, bits, us):
        replays = timing.Timing.from_replays([us, us], 1) if us else None
        return peers.PeerResult(name=name, bits=bits, timing=replays)

    results = [
        result("a", 16, 9.0),
        result("b", 8, 1.0),
        result("c", 16, 5.0),
        result("d", 16, None),
    ]
    assert peers.fastest(results, 16).name == "c"
    assert peers.fastest(results, 8).name == "b"


# Clock


def test_timing_is_per_call():
    replays = [float(us) for us in range(100, 121)]
    summary = timing.Timing.from_replays(replays, calls=10)
    assert (summary.median_us, summary.p10_us, summary.p90_us) == pytest.approx((11.0, 10.2, 11.8))
    assert (summary.replays, summary.calls) == (21, 10)


@given(st.lists(st.floats(1e-3, 1e6), min_size=2, max_size=40), st.integers(1, 100))
def test_percentiles_are_ordered_and_inside_the_samples(replays, calls):
    summary = timing.Timing.from_replays(replays, calls)
    ordered = (summary.p10_us, summary.median_us, summary.p90_us)
    slack = 1 + 1e-12
    assert min(replays) / calls <= ordered[0] * slack
    assert ordered[0] <= ordered[1] * slack
    assert ordered[1] <= ordered[2] * slack
    assert ordered[2] <= max(replays) / calls * slack


@pytest.mark.parametrize("replays", [[], [1.0], [1.0, math.nan], [1.0, 0.0], [1.0, math.inf]])
def test_timing_refuses_what_cannot_be_measured(replays):
    with pytest.raises(ValueError, match=r"say nothing|positive and finite"):
        timing.Timing.from_replays(replays, 1)


def test_the_clock_refuses_nothing_to_time_and_broken_kernels():
    with pytest.raises(ValueError, match="no call"):
        timing.time_graph([])
    with pytest.raises(ValueError, match="1 replays"):
        timing.time_graph([lambda: None], replays=1)
    with pytest.raises(ValueError, match="call 1 returned NaN"):
        timing.time_graph([lambda: torch.ones(2), lambda: torch.tensor([1.0, math.nan])])


def test_nothing_needs_torch_before_it_is_used():
    program = (
        "import sys\n"
        "for name in ('torch', 'cupy', 'flashinfer'): sys.modules[name] = None\n"
        "from benchlib import peers, problem\n"
        "shape = problem.DecodeShape(tokens=8)\n"
        "print({peer.obstacle(shape) for peer in peers.all_peers()})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=TOOLS, capture_output=True, text=True, check=True
    )
    assert done.stdout == "{'torch is not installed'}\n"
