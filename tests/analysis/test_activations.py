"""Saved activations: every layout and kind of file, one clear error for each way to be wrong."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from alignedkv.analysis.activations import AttentionCase
from alignedkv.analysis.case_files import find_cases, sample_path
from alignedkv.errors import ActivationError
from analysis_cases import make_case

safetensors = pytest.importorskip("safetensors.numpy")

METADATA = {"scaling": "0.125", "layer": "3", "sliding_window": "None", "softcap": "None"}


def layer(tokens=12, heads=4, kv_heads=2, head_dim=8, positions=3, dtype=np.float16, seed=0):
    """q, k, v of one layer."""
    rng = np.random.default_rng(seed)
    shapes = {
        "q": (heads, positions, head_dim),
        "k": (kv_heads, tokens, head_dim),
        "v": (kv_heads, tokens, head_dim),
    }
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def save(path: Path, tensors: dict, metadata: dict | None = None) -> Path:
    metadata = METADATA if metadata is None else metadata
    if path.suffix == ".safetensors":
        safetensors.save_file(tensors, path, metadata)
    elif path.suffix == ".npz":
        np.savez(path, **tensors, **metadata)
    else:
        torch = pytest.importorskip("torch")
        content = {name: torch.from_numpy(array) for name, array in tensors.items()}
        torch.save(content | {"metadata": metadata}, path)
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".pt"])
def test_a_layer_is_read_from_every_kind_of_file(tmp_path, suffix):
    tensors = layer()
    path = save(tmp_path / f"a{suffix}", tensors)
    references = find_cases(path)
    assert [(c.layer, c.kv_head) for c in references] == [(3, 0), (3, 1)]
    for head, reference in enumerate(references):
        case = pickle.loads(pickle.dumps(reference)).load()  # as a worker gets it
        assert (case.query == tensors["q"][2 * head : 2 * head + 2]).all()
        assert (case.key == tensors["k"][head]).all()
        assert (case.value == tensors["v"][head]).all()
        assert case.positions.tolist() == [9, 10, 11]
        assert (case.scaling, case.window, case.softcap, case.dtype) == (
            0.125, None, None, "float16",
        )  # fmt: skip


def test_bfloat16_is_exact(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    tensors = {name: torch.from_numpy(x).to(torch.bfloat16) for name, x in layer().items()}
    save_file(tensors, tmp_path / "a.safetensors", METADATA)
    torch.save(tensors | METADATA, tmp_path / "a.pt")
    for name in ("a.safetensors", "a.pt"):
        case = find_cases(tmp_path / name)[1].load()
        assert case.dtype == "bfloat16"
        assert case.input_bits == 16
        assert (case.key == tensors["k"][1].float().numpy()).all()


def test_decode_steps_follow_the_prompt(tmp_path):
    first, later = layer(), layer(tokens=5, positions=5, seed=1)
    tensors = first | {f"{name}_dec": array for name, array in later.items()}
    case = find_cases(save(tmp_path / "a.safetensors", tensors))[1].load()
    assert case.positions.tolist() == [9, 10, 11, 12, 13, 14, 15, 16]
    assert case.prefill == 12
    assert (case.key == np.concatenate([first["k"][1], later["k"][1]])).all()
    assert (case.query[:, 3:] == later["q"][2:]).all()


def test_facts_come_from_the_metadata(tmp_path):
    metadata = METADATA | {
        "sliding_window": "5", "softcap": "30.0", "start": "2", "query_positions": "4..6",
    }  # fmt: skip
    tensors = layer() | {"sinks": np.arange(4, dtype=np.float32)}
    case = find_cases(save(tmp_path / "a.safetensors", tensors, metadata))[1].load()
    assert (case.window, case.softcap, case.start) == (5, 30.0, 2)
    assert case.sinks.tolist() == [2, 3]
    assert [case.visible(i) for i in range(3)] == [(2, 5), (2, 6), (2, 7)]


def test_the_sample_is_there():
    references = find_cases(sample_path())
    assert [(c.layer, c.kv_head) for c in references] == [
        (layer, head) for layer in (5, 15, 25) for head in range(3)
    ]
    case = references[4].load()
    assert case.query.shape == (3, 16, 64)
    assert case.positions[[0, -1]].tolist() == [1008, 1023]


def test_selection(tmp_path):
    chosen = find_cases(sample_path(), layers=[15], kv_heads=[0, 2], positions=[-1, 1010])
    assert [(c.layer, c.kv_head) for c in chosen] == [(15, 0), (15, 2)]
    assert chosen[0].query_positions().tolist() == [1010, 1023]
    assert chosen[0].load().positions.tolist() == [1010, 1023]


def test_folders_and_globs(tmp_path):
    for number in range(3):
        save(tmp_path / f"l{number}.npz", layer(), METADATA | {"layer": str(number)})
    assert {c.layer for c in find_cases(tmp_path)} == {0, 1, 2}
    assert {c.layer for c in find_cases(str(tmp_path / "l[01].npz"))} == {0, 1}
    assert len(find_cases([tmp_path / "l0.npz", tmp_path / "l2.npz"])) == 4


def test_scaling_may_be_given(tmp_path):
    path = save(tmp_path / "a.npz", layer(), {})
    with pytest.raises(ActivationError, match="lacks 'scaling'"):
        find_cases(path)
    assert find_cases(path, scaling=0.5)[0].load().scaling == 0.5


def wrong(change):
    """The tensors of a layer after a change."""
    tensors = layer()
    change(tensors)
    return tensors


WRONG_TENSORS = {
    "v is missing": (lambda t: t.pop("v"), "tensor v is missing"),
    "no tensors of that name": (lambda t: t.update(K=t.pop("k")), "no keys found"),
    "rank 2": (lambda t: t.update(k=t["k"][0]), r"tensor k has shape \[12, 8\]"),
    "tokens differ": (lambda t: t.update(v=t["v"][:, :5]), "do not agree"),
    "channels differ": (lambda t: t.update(q=t["q"][:, :, :4]), "do not agree"),
    "heads do not divide": (lambda t: t.update(q=t["q"][:3]), "3 query heads"),
    "no tokens": (lambda t: t.update(k=t["k"][:, :0], v=t["v"][:, :0]), "at least one token"),
    "no positions": (lambda t: t.update(q=t["q"][:, :0]), "at least one token"),
    "integers": (lambda t: t.update(k=t["k"].astype(np.int32)), "tensor k is"),
    "mixed dtypes": (lambda t: t.update(q=t["q"].astype(np.float32)), "mix dtypes"),
    "wrong sinks": (lambda t: t.update(sinks=np.zeros(3, np.float16)), "one per query head"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), WRONG_TENSORS.values(), ids=WRONG_TENSORS)
@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_wrong_tensors_are_refused(tmp_path, change, message, suffix):
    path = save(tmp_path / f"a{suffix}", wrong(change))
    with pytest.raises(ActivationError, match=message) as caught:
        find_cases(path)
    assert path.name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_numbers_that_are_not_finite_are_placed(tmp_path, bad, name):
    tensors = layer()
    tensors[name][1, 2, 5] = bad
    reference = find_cases(save(tmp_path / "a.safetensors", tensors))[0 if name == "q" else 1]
    place = r"q\[1, 2, 5\]" if name == "q" else rf"{name}\[2, 5\]"
    with pytest.raises(ActivationError, match=place):
        reference.load()


WRONG_METADATA = {
    "scaling": ({"scaling": "eight"}, "scaling is 'eight'"),
    "infinite scaling": ({"scaling": "inf"}, "finite"),
    "window": ({"sliding_window": "0"}, "window 0"),
    "softcap": ({"softcap": "-1"}, "softcap -1"),
    "positions are no range": ({"query_positions": "last"}, "first..last"),
    "positions do not fit": ({"query_positions": "1..9"}, "do not fit"),
    "positions beyond the tokens": ({"query_positions": "10..12"}, "do not fit"),
    "padding hides the query": ({"start": "10"}, "padding"),
    "layer": ({"layer": "x"}, "layer is 'x'"),
}


@pytest.mark.parametrize(("change", "message"), WRONG_METADATA.values(), ids=WRONG_METADATA)
def test_wrong_metadata_is_refused(tmp_path, change, message):
    path = save(tmp_path / "a.safetensors", layer(), METADATA | change)
    with pytest.raises(ActivationError, match=message):
        find_cases(path)[0].load()


WRONG_SELECTIONS = {
    "layer": ({"layers": [7]}, r"layers \[7\]"),
    "no layer": ({"layers": []}, "layers"),
    "head": ({"kv_heads": [2]}, r"KV heads \[2\]"),
    "position": ({"positions": [3]}, r"no query at positions \[3\]"),
    "no position": ({"positions": []}, "no query"),
    "position before the first": ({"positions": [-4]}, "no query"),
}


@pytest.mark.parametrize(("selection", "message"), WRONG_SELECTIONS.values(), ids=WRONG_SELECTIONS)
def test_empty_selections_are_refused(tmp_path, selection, message):
    path = save(tmp_path / "a.npz", layer())
    with pytest.raises(ActivationError, match=message):
        find_cases(path, **selection)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".pt"])
@pytest.mark.parametrize("kept", [0, 5, 0.6])
def test_damaged_files_are_refused(tmp_path, suffix, kept):
    path = save(tmp_path / f"a{suffix}", layer(tokens=400))
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if kept < 1 else kept])
    with pytest.raises(ActivationError, match="cannot be read"):
        find_cases(path)[0].load()


def test_files_of_another_kind_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("k")
    with pytest.raises(ActivationError, match="unknown kind"):
        find_cases(tmp_path / "a.txt")
    with pytest.raises(ActivationError, match="no such file"):
        find_cases(tmp_path / "a.npz")
    with pytest.raises(ActivationError, match="in this folder"):
        find_cases(tmp_path)
    with pytest.raises(ActivationError, match="matches no file"):
        find_cases(str(tmp_path / "*.npz"))


class Harmful:
    """Unpickling this calls a function."""

    def __reduce__(self):
        return print, ("unpickled",)


def test_pickles_are_not_executed(tmp_path, capsys):
    torch = pytest.importorskip("torch")
    torch.save({"q": Harmful()}, tmp_path / "a.pt")
    np.savez(tmp_path / "a.npz", k=np.array([Harmful()], dtype=object))
    with pytest.raises(ActivationError, match="weights_only"):
        find_cases(tmp_path / "a.pt")
    with pytest.raises(ActivationError):
        find_cases(tmp_path / "a.npz")
    assert "unpickled" not in capsys.readouterr().out


def test_a_list_of_tensors_has_no_names(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save([torch.zeros(1)], tmp_path / "a.pt")
    with pytest.raises(ActivationError, match="holds a list"):
        find_cases(tmp_path / "a.pt")


WRONG_CASES = {
    "rank": ({"key": np.zeros((2, 48, 64))}, "give q"),
    "sizes": ({"value": np.zeros((47, 64))}, "give q"),
    "positions": ({"query": np.zeros((2, 3, 64))}, "does not fit"),
    "beyond the tokens": ({"positions": (48,)}, "must lie"),
    "dtype": ({"dtype": "float64"}, "dtype float64"),
    "sinks": ({"sinks": np.zeros(3)}, "one for each"),
    "NaN sinks": ({"sinks": np.array([0, np.nan])}, "not NaN"),
    "no tokens": ({"key": np.zeros((0, 64)), "value": np.zeros((0, 64))}, "empty"),
}


@pytest.mark.parametrize(("change", "message"), WRONG_CASES.values(), ids=WRONG_CASES)
def test_wrong_cases_are_refused(change, message):
    with pytest.raises(ActivationError, match=message):
        make_case(**change)


def test_a_case_knows_its_sizes():
    case = make_case(group=3, tokens=20, head_dim=80, dtype="float32")
    assert isinstance(case, AttentionCase)
    assert (case.group, case.tokens, case.head_dim, case.input_bits) == (3, 20, 80, 32)
