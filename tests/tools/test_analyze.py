import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import save_file

import analyze as tool
import analyze_options
import analyze_output
import analyze_values

TOOL = Path(tool.__file__)
TABLES = ("outputs.csv", "schemes.csv", "tokens.csv", "tokens.parquet")
FILES = sorted([*TABLES, "report.html", "summary.json"])
METADATA = {"scaling": "0.25"}


@pytest.fixture
def no_report(monkeypatch):
    """Drawing takes most of a small run's time; tests/analysis/test_report.py looks at it."""
    monkeypatch.setattr(tool, "build_report", lambda findings, facts: facts.title)
    monkeypatch.setattr(analyze_options, "CURVE", ())


def tensors(tokens=40, positions=3, heads=4, kv_heads=2, head_dim=16, layer=0, dtype=np.float16):
    rng = np.random.default_rng(layer)
    shapes = {
        "q": (heads, positions, head_dim),
        "k": (kv_heads, tokens, head_dim),
        "v": (kv_heads, tokens, head_dim),
    }
    return {
        f"layers.{layer}.{name}": rng.standard_normal(shape).astype(dtype)
        for name, shape in shapes.items()
    }


@pytest.fixture
def capture(tmp_path):
    """Two layers of two KV heads with two query heads each, three positions."""
    path = tmp_path / "in" / "acts.safetensors"
    path.parent.mkdir()
    save_file(tensors(layer=0) | tensors(layer=3), path, METADATA)
    return path


def run(*options, out, jobs=1):
    return tool.main([str(option) for option in options] + ["--jobs", str(jobs), "--out", str(out)])


def json_lines(capsys):
    captured = capsys.readouterr()
    assert captured.err == ""
    return [json.loads(line) for line in captured.out.splitlines()]


def test_everything_is_written_and_the_table_is_printed(capture, tmp_path, capsys):
    out = tmp_path / "deep" / "down"
    assert run(capture, out=out) == 0
    assert sorted(file.name for file in out.iterdir()) == FILES
    printed = capsys.readouterr().out
    for word in ("layer 0", "layer 3", "all", "2^-7", "2^-5", "KIVI-4", "bf16", "report.html"):
        assert word in printed
    table = [line for line in printed.splitlines() if "report.html" not in line]
    assert max(map(len, table)) <= 80


@pytest.mark.usefixtures("no_report")
def test_json_has_one_object_per_tolerance(capture, tmp_path, capsys):
    options = ["--tolerance", "2^-4", "0.015625", "--scheme", "none", "--json"]
    assert run(capture, *options, out=tmp_path / "out") == 0
    objects = json_lines(capsys)
    assert [one["tolerance"] for one in objects] == [0.015625, 0.0625]
    for one in objects:
        assert one["cases"] == 2 * 4 * 3
        assert one["read_fraction"] == pytest.approx((one["bits_k"] + one["bits_v"]) / 32)
        assert one["bound"] == "estimate"
        assert one["misses"] == one["violations"] == 0
        assert 0 < one["error_median"] <= one["error_max"] <= one["bound_max"] <= one["tolerance"]
    assert objects[0]["read_fraction"] > objects[1]["read_fraction"]
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == objects


@pytest.mark.usefixtures("no_report")
def test_the_token_table_has_a_row_for_every_visible_token(capture, tmp_path):
    out = tmp_path / "out"
    assert run(capture, "--tolerance", "2^-4", "--positions", "all", out=out) == 0
    table = pd.read_parquet(out / "tokens.parquet")
    assert len(table) == 2 * 2 * (38 + 39 + 40)
    counts = table.groupby(["layer", "kv_head", "position"])["token"].agg(["min", "max", "count"])
    assert (
        list(counts.itertuples(index=False, name=None))
        == [
            (0, 37, 38),
            (0, 38, 39),
            (0, 39, 40),
        ]
        * 4
    )
    read_back = pd.read_csv(out / "tokens.csv")
    pd.testing.assert_frame_equal(read_back, table, check_dtype=False, rtol=1e-6)
    # What is read of the rows is what the summary says.
    summary = json.loads((out / "summary.json").read_text())[0]
    bits = table.groupby(["layer", "kv_head", "position"])[["key_bits", "value_bits"]].mean()
    assert bits["key_bits"].mean() == pytest.approx(summary["bits_k"])
    assert bits["value_bits"].mean() == pytest.approx(summary["bits_v"])


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize(
    ("options", "layers", "heads", "positions"),
    [
        ([], {0, 3}, {0, 1}, {37, 38, 39}),
        (["--layers", "3"], {3}, {0, 1}, {37, 38, 39}),
        (["--layers", "0..3", "--heads", "1"], None, None, None),
        (["--heads", "1", "--positions", "-1", "-3"], {0, 3}, {1}, {37, 39}),
        (["--layers", "0,3", "--positions", "37..38"], {0, 3}, {0, 1}, {37, 38}),
    ],
)
def test_layers_heads_and_positions_are_selected(
    capture, tmp_path, options, layers, heads, positions
):
    common = ["--scheme", "none", "--tolerance", "0.1"]
    code = run(capture, *common, *options, out=tmp_path / "out")
    if layers is None:  # a range over layers that are not there
        assert code == 2
        return
    table = pd.read_csv(tmp_path / "out" / "outputs.csv")
    assert set(table["layer"]) == layers
    assert set(table["kv_head"]) == heads
    assert set(table["position"]) == positions


@pytest.mark.usefixtures("no_report")
def test_folders_globs_and_several_kinds_of_file_are_read(tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    save_file(tensors(layer=1), folder / "a.safetensors", METADATA)
    np.savez(folder / "b.npz", scaling=np.array("0.25"), **tensors(layer=2))
    torch = pytest.importorskip("torch")
    three = {name: torch.from_numpy(x) for name, x in tensors(layer=4).items()}
    torch.save(three | {"metadata": METADATA}, folder / "c.pt")
    common = ["--scheme", "none", "--tolerance", "0.1", "--json"]
    for source, layers in ((folder, 3), (folder / "[ab].*", 2), (folder / "c.pt", 1)):
        assert run(source, *common, out=tmp_path / "out") == 0
        assert json_lines(capsys)[0]["cases"] == layers * 4 * 3


@pytest.mark.usefixtures("no_report")
def test_a_file_may_follow_an_option_of_several_values(capture, tmp_path, capsys):
    argv = ["--json", "--scheme", "none", "--tolerance", "2^-4", str(capture)]
    assert tool.main([*argv, "--jobs", "1", "--out", str(tmp_path / "out")]) == 0
    assert [one["tolerance"] for one in json_lines(capsys)] == [2.0**-4]


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize(
    "options",
    [
        ["--bound", "deterministic"],
        ["--bound", "statistical", "--failure", "1e-3"],
        ["--layout", "4-4-8"],
        ["--layout", "4|2|2|8,4|4|8", "--stored-planes", "2"],
        ["--group", "8"],
        ["--sample-values"],
        ["--exact-first", "4", "--exact-last", "8"],
        ["--transform", "none", "--dither-rows", "256", "--seed", "7", "--scaling", "0.1"],
    ],
)
def test_every_option_is_served(capture, tmp_path, capsys, options):
    common = ["--tolerance", "0.2", "--scheme", "none", "--json", "--positions", "-1"]
    assert run(capture, *common, *options, out=tmp_path / "out") == 0
    (one,) = json_lines(capsys)
    assert one["violations"] == 0
    kinds = [option for option in options if option in ("deterministic", "statistical")]
    assert one["bound"] == (kinds or ["estimate"])[0]


@pytest.mark.usefixtures("no_report")
def test_schemes_are_chosen_by_name(capture, tmp_path):
    out = tmp_path / "out"
    options = ["--scheme", "kivi-4", "paper, as published", "fp8-e4m3,int8", "--tolerance", "0.1"]
    assert run(capture, *options, out=out) == 0
    found = pd.read_csv(out / "schemes.csv")["scheme"].unique()
    assert set(found) == {"KIVI-4", "paper, as published", "fp8 e4m3", "int8"}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("zero values", lambda t: t["layers.0.v"].fill(0)),
        ("constant keys", lambda t: t["layers.0.k"].fill(3)),
        ("subnormal values", lambda t: np.multiply(t["layers.0.v"], 1e-40, out=t["layers.0.v"])),
        ("huge values", lambda t: np.multiply(t["layers.0.v"], 1e37, out=t["layers.0.v"])),
        ("values beyond float16", lambda t: t["layers.0.v"].fill(1e6)),
        ("one huge key", lambda t: t["layers.0.k"][0, 3].fill(1e30)),
    ],
)
def test_unusual_numbers_are_not_errors(tmp_path, capsys, name, change):
    data = tensors(dtype=np.float32)
    change(data)
    path = tmp_path / "in.safetensors"
    save_file(data, path, METADATA)
    options = ["--json", "--positions", "-1", "--tolerance", "2^-7"]
    assert run(path, *options, out=tmp_path / "out") == 0
    (one,) = json_lines(capsys)
    assert one["violations"] == 0, name


def test_a_single_token_is_no_error(tmp_path, capsys):
    path = tmp_path / "in.safetensors"
    save_file(tensors(tokens=1, positions=1), path, METADATA)
    assert run(path, "--json", out=tmp_path / "out") == 0
    assert [one["violations"] for one in json_lines(capsys)] == [0, 0]


def broken(tmp_path, **changes):
    data = {**tensors(), **{f"layers.0.{name}": x for name, x in changes.items()}}
    path = tmp_path / "broken.safetensors"
    save_file({name: x for name, x in data.items() if x is not None}, path, METADATA)
    return [str(path)]


def truncated(tmp_path):
    path = tmp_path / "cut.safetensors"
    save_file(tensors(), path, METADATA)
    path.write_bytes(path.read_bytes()[:-100])
    return [str(path)]


def poisoned(tmp_path, number):
    data = tensors()
    data["layers.0.v"][1, 7, 5] = number
    path = tmp_path / "nan.safetensors"
    save_file(data, path, METADATA)
    return [str(path)]


def pickled(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "evil.pt"
    torch.save({"q": Path("anything")}, path)
    return [str(path)]


def empty_folder(tmp_path):
    (tmp_path / "void").mkdir()
    return [str(tmp_path / "void")]


HALF, SINGLE = np.float16, np.float32
BAD_INPUT = [
    (lambda t: ["no/such.safetensors"], "no such file"),
    (lambda t: ["no/such*.npz"], "matches no file"),
    (empty_folder, "in this folder"),
    (truncated, "damaged"),
    (pickled, "more than tensors"),
    (lambda t: poisoned(t, np.nan), "v[7, 5] is nan"),
    (lambda t: poisoned(t, np.inf), "v[7, 5] is inf"),
    (lambda t: broken(t, k=None), "k"),
    (lambda t: broken(t, v=np.ones((2, 39, 16), HALF)), "do not agree"),
    (lambda t: broken(t, q=np.ones((4, 16), HALF)), "[4, 16]"),
    (lambda t: broken(t, q=np.ones((3, 2, 16), HALF)), "do not divide"),
    (lambda t: broken(t, q=np.ones((4, 2, 16), SINGLE)), "mix dtypes"),
    (lambda t: broken(t, k=np.ones((2, 0, 16), HALF), v=np.ones((2, 0, 16), HALF)), "at least"),
    (lambda t: broken(t, q=np.ones((4, 2, 16), np.int8)), "float16"),
]


def assert_refused(argv, tmp_path, capsys, said):
    before = sorted(tmp_path.rglob("*"))
    try:
        code = tool.main(argv)
    except SystemExit as stop:  # argparse's way
        code = stop.code
    captured = capsys.readouterr()
    assert code == 2
    assert said in captured.err
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("analyze: ")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("make", "said"), BAD_INPUT)
def test_bad_files_are_one_line_exit_code_2_and_nothing_written(make, said, tmp_path, capsys):
    argv = make(tmp_path)
    out = tmp_path / "out" / "in"
    capsys.readouterr()
    options = ["--jobs", "1", "--json", "--tolerance", "0.1", "--scheme", "none"]
    assert_refused([*argv, *options, "--out", str(out)], tmp_path, capsys, said)


def test_numbers_that_a_worker_finds_are_one_line_too(tmp_path, capfd):
    argv = [*poisoned(tmp_path, np.nan), "--jobs", "2", "--json", "--out", str(tmp_path / "out")]
    assert_refused(argv, tmp_path, capfd, "v[7, 5] is nan")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--tolerance", "0"], "tolerance"),
        (["--tolerance", "1.5"], "tolerance"),
        (["--tolerance", "nan"], "tolerance"),
        (["--tolerance", "tiny"], "tiny"),
        (["--failure", "0"], "failure"),
        (["--failure", "2"], "failure"),
        (["--bound", "rough"], "rough"),
        (["--layout", "4|4"], "sum to 16"),
        (["--layout", "4|4|8,4|4|8,4|4|8"], "one layout"),
        (["--stored-planes", "5"], "stored_planes"),
        (["--scheme", "kivi-3"], "kivi-3"),
        (["--layers", "9"], "[9]"),
        (["--layers", "one"], "one"),
        (["--heads", "2"], "[2]"),
        (["--positions", "5"], "[5]"),
        (["--layers", "3..0"], "layers"),
        (["--jobs", "0"], "jobs"),
        (["--jobs", "many"], "jobs"),
        (["--transform", "fourier"], "fourier"),
        (["--dither-rows", "3"], "dither_rows"),
        (["--group", "0"], "positive"),
        (["--sample-values", "--bound", "deterministic"], "sample_values"),
        (["--sample-values", "--group", "2"], "sampled"),
        (["--no-such-option"], "--no-such-option"),
    ],
)
def test_bad_options_are_one_line_exit_code_2_and_nothing_written(
    capture, options, said, tmp_path, capsys
):
    out = str(tmp_path / "out")
    argv = [str(capture), "--json", "--jobs", "1", "--scheme", "none", "--out", out, *options]
    assert_refused(argv, tmp_path, capsys, said)


@pytest.mark.parametrize("below", ["", "below"])
def test_a_file_in_place_of_the_output_folder_is_refused(capture, below, tmp_path, capsys):
    (tmp_path / "taken").write_text("mine")
    out = tmp_path / "taken" / below
    assert_refused([str(capture), "--out", str(out)], tmp_path, capsys, "give a folder")
    assert (tmp_path / "taken").read_text() == "mine"


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_write_permission_is_refused(capture, tmp_path, capsys):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    assert_refused([str(capture), "--out", str(locked)], tmp_path, capsys, "cannot be written")


@pytest.mark.usefixtures("no_report")
def test_what_the_folder_holds_already_stays(capture, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    (out / "report.html").write_text("old")
    assert run(capture, "--scheme", "none", "--tolerance", "0.1", out=out) == 0
    assert sorted(file.name for file in out.iterdir()) == sorted([*FILES, "notes.txt"])
    assert (out / "report.html").read_text() != "old"


def test_a_failure_leaves_the_old_files_whole(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "report.html").write_text("old")
    with (  # noqa: PT012
        pytest.raises(KeyboardInterrupt),
        analyze_output.staged_folder(out) as folder,
    ):
        (folder / "report.html").write_text("half of the n")
        raise KeyboardInterrupt
    assert [file.name for file in out.iterdir()] == ["report.html"]
    assert (out / "report.html").read_text() == "old"


def test_ctrl_c_leaves_nothing(tmp_path):
    """In a process of its own, with workers, stopped while the first files are growing."""
    path = tmp_path / "in.safetensors"
    save_file(tensors(tokens=2000, positions=200), path, METADATA)
    out = tmp_path / "out"
    command = [sys.executable, TOOL, path, "--positions", "all", "--jobs", "2", "--out", out]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while not any(stage.stat().st_size for stage in tmp_path.glob(".analyze-*/tokens.csv")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does it: to the workers too
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "nothing was written" in errors
    assert "Traceback" not in errors
    assert sorted(file.name for file in tmp_path.iterdir()) == ["in.safetensors"]


@pytest.mark.usefixtures("no_report")
def test_two_dask_workers_serve_the_same_call(capture, tmp_path, capsys):
    distributed = pytest.importorskip("distributed")
    options = [str(capture), "--json", "--tolerance", "0.1", "--scheme", "none"]
    assert tool.main([*options, "--jobs", "1", "--out", str(tmp_path / "alone")]) == 0
    alone = json_lines(capsys)
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=None
    ) as cluster:
        address = cluster.scheduler_address
        assert tool.main([*options, "--jobs", address, "--out", str(tmp_path / "dask")]) == 0
        assert json_lines(capsys) == alone
        with distributed.Client(cluster) as client:
            workers = client.scheduler_info()["workers"]
            finished = client.run(lambda dask_worker: dask_worker.state.executed_count)
    assert len(workers) == 2
    assert all(count > 0 for count in finished.values())
    for file in ("tokens.csv", "outputs.csv"):
        alone, dask = ((tmp_path / folder / file).read_text() for folder in ("alone", "dask"))
        assert alone == dask


def test_a_scheduler_that_is_not_there_is_one_line(capture, tmp_path, capsys, monkeypatch):
    pytest.importorskip("distributed")
    monkeypatch.setattr(tool, "_CONNECT_TIMEOUT", 0.5)
    argv = [str(capture), "--jobs", "tcp://127.0.0.1:9", "--json", "--out", str(tmp_path / "out")]
    assert_refused(argv, tmp_path, capsys, "no Dask scheduler")


@pytest.mark.parametrize(
    ("text", "number"),
    [("2^-7", 2**-7), ("2**-7", 2**-7), ("1/128", 2**-7), ("0.01", 0.01), ("2^-7.5", 2**-7.5)],
)
def test_tolerances_are_read_as_people_write_them(text, number):
    assert analyze_values.parse_tolerance(text) == [number]
