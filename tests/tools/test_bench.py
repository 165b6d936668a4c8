import ctypes
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

import bench as tool  # noqa: E402
from alignedkv.errors import TuningError  # noqa: E402
from alignedkv.kernels.tune.synthetic import KINDS  # noqa: E402
from benchlib.data import (  # noqa: E402
    captured_inputs,
    effective_tokens,
    synthetic_inputs,
)
from benchlib.energy import EnergyCounter, EnergyError  # noqa: E402
from benchlib.peers import PeerResult  # noqa: E402
from benchlib.problem import DecodeShape, OutputError, reference_output  # noqa: E402
from benchlib.rows import BF16_ATTENTION, Case, print_row, row  # noqa: E402
from benchlib.timing import Timing  # noqa: E402

SHAPE = DecodeShape(tokens=4096, heads=4, kv_heads=1)


def timing(us, **more):
    return Timing(median_us=us, p10_us=us, p90_us=us, replays=25, calls=32, **more)


def error(size):
    return OutputError(rms=size / 2, median=size / 2, max=size)


OURS = SimpleNamespace(
    attend=timing(20.0),
    step=timing(22.0),
    read_fraction=0.25,
    bound_max=2**-7,
    bound_median=2**-8,
    error=error(2**-9),
    error_over_bound=0.25,
    misses=0,
)
PEERS = [
    PeerResult(name="sdpa-cudnn-fp16", bits=16, timing=timing(50.0), error=error(2**-11)),
    PeerResult(name=BF16_ATTENTION, bits=16, timing=timing(60.0), error=error(2**-7)),
    PeerResult(name="flashinfer-xqa-fp8", bits=8, timing=timing(36.0), error=error(2**-4)),
    PeerResult(name="flashinfer-xqa-fp16", bits=16, reason="not installed"),
]


def test_a_row_names_the_fastest_peers_and_counts_useful_bytes():
    case = Case(shape=SHAPE, data="mixed", tolerance=2**-7)
    facts = row(case, OURS, PEERS, bandwidth=3e12, card="a card")
    assert (facts["best16_name"], facts["best16_us"]) == ("sdpa-cudnn-fp16", 50.0)
    assert (facts["best8_name"], facts["best8_us"]) == ("flashinfer-xqa-fp8", 36.0)
    assert facts["error_bf16"] == 2**-7
    moved = 0.25 * 2 * 4096 * 128 * 2
    assert facts["useful_gb_s"] == pytest.approx(moved / 20e-6 / 1e9)
    assert facts["ceiling_us"] == pytest.approx(moved / 3e12 * 1e6)
    required = "T batch head_dim group tolerance data ours_us best16_us best16_name best8_us "
    required += "best8_name read_fraction bound_max error_max error_bf16 card"
    assert set(required.split()) <= set(facts)


def test_without_peers_the_row_says_so_and_prints(capsys):
    case = Case(shape=SHAPE, data="flat", tolerance=2**-5)
    facts = row(case, OURS, [], bandwidth=3e12, card="a card")
    assert facts["best16_us"] is facts["best8_us"] is facts["error_bf16"] is None
    print_row(facts)
    assert "flat" in capsys.readouterr().out


@pytest.mark.parametrize("ratio", [0.99, 1.45])
def test_an_error_beyond_its_estimate_is_said(ratio, capsys):
    ours = SimpleNamespace(**{**vars(OURS), "error_over_bound": ratio})
    case = Case(shape=SHAPE, data="captured", tolerance=2**-7)
    facts = row(case, ours, PEERS, bandwidth=3e12, card="a card")
    assert facts["error_over_bound"] == ratio
    print_row(facts)
    assert ("exceeds its bound" in capsys.readouterr().out) == (ratio > 1)


def test_energy_is_printed_where_it_was_measured(capsys):
    ours = SimpleNamespace(**{**vars(OURS), "attend": timing(20.0, millijoules=31.4)})
    peers = [replace(PEERS[0], timing=timing(50.0, millijoules=62.8)), *PEERS[1:]]
    case = Case(shape=SHAPE, data="mixed", tolerance=2**-7)
    print_row(row(case, ours, peers, bandwidth=3e12, card="a card"))
    assert "mJ a step: 31.40, sdpa-cudnn-fp16 62.80\n" in capsys.readouterr().out


def test_without_the_drivers_library_there_is_no_energy(monkeypatch):
    def missing(name):
        raise OSError(f"{name}: no such file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(EnergyError, match=r"libnvidia-ml"):
        EnergyCounter()


def test_cases_keep_the_tolerances_of_one_input_together():
    options = tool.parse(["decode", "--sizes", "8192", "32768x8", "--data", "flat", "peaky"])
    found = list(tool.cases(options))
    assert [(shape.tokens, shape.batch, data) for shape, data, _ in found] == [
        (8192, 1, "flat"),
        (8192, 1, "peaky"),
        (32768, 8, "flat"),
        (32768, 8, "peaky"),
    ]
    assert found[0][2] == [2**-7, 2**-5]


def test_the_plot_is_drawn_from_a_result(tmp_path):
    rows = []
    for tokens in (8192, 32768):
        shape = DecodeShape(tokens=tokens)
        for tolerance in (2**-7, 2**-5):
            case = Case(shape=shape, data="mixed", tolerance=tolerance)
            rows.append(row(case, OURS, PEERS, bandwidth=3e12, card="a card"))
    file = tmp_path / "decode.json"
    file.write_text(json.dumps({"rows": rows, "card": "a card"}))
    assert tool.main(["plot", str(file)]) == 0
    picture = (tmp_path / "decode.svg").read_text()
    assert picture.startswith("<?xml")
    assert "</svg>" in picture


def test_what_cannot_be_done_is_one_line_and_exit_code_2(tmp_path, capsys):
    assert tool.main(["plot", str(tmp_path / "missing.json")]) == 2
    if not torch.cuda.is_available():
        assert tool.main(["decode"]) == 2
        assert "GPU" in capsys.readouterr().err


@pytest.mark.parametrize("kind", KINDS)
def test_scores_have_the_shape_that_their_kind_claims(kind):
    inputs = synthetic_inputs(SHAPE, kind, device="cpu")
    scores = (inputs.q.float() @ inputs.k[0, 0].float().T)[0] / 128**0.5
    claimed = KINDS[kind]
    if claimed.spread is not None:
        # float16 rounds q and k; the sink alone may move the standard deviation further.
        torch.testing.assert_close(
            scores[:, 1:].std(1), torch.full((4,), claimed.spread), rtol=0.1, atol=0
        )
    weight = torch.softmax(scores, 1)
    if claimed.sink_mass is not None:
        torch.testing.assert_close(
            weight[:, 0], torch.full((4,), claimed.sink_mass), rtol=0.1, atol=0
        )
    if kind == "model":
        rest = weight[:, 1:] / weight[:, 1:].sum(1, keepdim=True)
        effective = 1 / rest.square().sum(1)
        assert ((effective > 7) & (effective < 66)).all()
    assert (effective_tokens(inputs) > 1000).all() == (kind == "flat")


def test_the_same_seed_gives_the_same_numbers():
    small = DecodeShape(tokens=64, heads=2, kv_heads=1, head_dim=64)
    one, two = (synthetic_inputs(small, "mixed", seed=3, device="cpu") for _ in range(2))
    assert torch.equal(one.k, two.k)
    assert torch.equal(one.q, two.q)
    other = synthetic_inputs(small, "mixed", seed=4, device="cpu")
    assert not torch.equal(one.k, other.k)


def test_captured_rows_repeat_and_keep_their_outputs():
    import alignedkv.analysis

    sample = next((tool.Path(alignedkv.analysis.__file__).parent / "sample").glob("*.safetensors"))
    once, thrice = (
        captured_inputs(
            DecodeShape(tokens=tokens, heads=9, kv_heads=3, head_dim=64), sample, device="cpu"
        )
        for tokens in (1024, 3072)
    )
    torch.testing.assert_close(reference_output(once), reference_output(thrice))
    with pytest.raises(ValueError, match="head_dim 64"):
        captured_inputs(SHAPE, sample, device="cpu")


def test_an_unknown_kind_is_named():
    with pytest.raises(TuningError, match="flat, mixed"):
        synthetic_inputs(SHAPE, "smooth", device="cpu")
