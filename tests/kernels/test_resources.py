"""The gate without a GPU: every kernel compiles for every architecture, and none spills.

A representative matrix by default; ``--slow`` takes all values of the spec.
"""

from __future__ import annotations

import importlib.util
import itertools
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from alignedkv.kernels.codegen import CUDA_DIR
from alignedkv.kernels.compile import build
from alignedkv.kernels.legality import configurations, default_config
from alignedkv.kernels.spec import (
    DTYPES,
    HEAD_DIMS,
    LAYOUTS,
    MAX_GROUP,
    MAX_SUBGROUP,
    MIN_STORED_PLANES,
    PAGE_TOKENS,
    DecodeSpec,
)
from alignedkv.kernels.target import SM90, TARGETS, DeviceTarget
from alignedkv.planes import PlaneLayout
from alignedkv.policy import BoundKind

PAPER = "paper.cu"
FILES = sorted(path.name for path in CUDA_DIR.glob("*.cu") if path.name != PAPER)

#: What models in use need, and each option of the spec at least once.
REPRESENTATIVE = (
    DecodeSpec(head_dim=128, group=4),
    DecodeSpec(head_dim=64, group=3, bound=BoundKind.DETERMINISTIC, query_dtype="float32"),
    DecodeSpec(head_dim=80, group=1, layout=PlaneLayout.parse("4|4|8"), stored_planes=2),
    DecodeSpec(head_dim=96, group=8, row_dtype="float16", page_tokens=16, sinks=True),
    DecodeSpec(head_dim=128, group=4, sample_values=True, exact_rows=True),
    DecodeSpec(head_dim=192, group=2, stored_planes=3, exact_rows=True, row_dtype="float32"),
    DecodeSpec(head_dim=256, group=16, softcap=True, page_tokens=256, dither_rows=256),
    DecodeSpec(head_dim=128, group=7, layout=PlaneLayout.parse("4|2|2|8"), sample_values=True),
    DecodeSpec(head_dim=128, group=4, bound=BoundKind.STATISTICAL, dither_rows=256),
    DecodeSpec(head_dim=256, group=8, bound=BoundKind.STATISTICAL),
    DecodeSpec(head_dim=64, group=5, bound=BoundKind.STATISTICAL, sample_values=True),
)


def every_spec() -> Iterator[DecodeSpec]:
    """All shapes with every bound, and all options with the default shape."""
    for bound, head_dim, group in itertools.product(BoundKind, HEAD_DIMS, range(1, MAX_GROUP + 1)):
        if group <= MAX_SUBGROUP or bound is BoundKind.ESTIMATE:
            yield DecodeSpec(head_dim=head_dim, group=group, bound=bound)
    for text in LAYOUTS:
        layout = PlaneLayout.parse(text)
        for head_dim, stored in itertools.product(
            HEAD_DIMS, range(MIN_STORED_PLANES, len(layout) + 1)
        ):
            yield DecodeSpec(head_dim=head_dim, group=4, layout=layout, stored_planes=stored)
    for query, row, page in itertools.product(DTYPES, DTYPES, (None, *PAGE_TOKENS)):
        yield DecodeSpec(head_dim=128, group=4, query_dtype=query, row_dtype=row, page_tokens=page)
    switches = ("softcap", "sinks", "exact_rows", "sample_values")
    for bound, rows, on in itertools.product(
        BoundKind, (32, 64, 128, 256), itertools.product((False, True), repeat=len(switches))
    ):
        options = dict(zip(switches, on, strict=True))
        unsound = options["sample_values"] and bound is BoundKind.DETERMINISTIC
        if not unsound and not (options["softcap"] and bound is BoundKind.STATISTICAL):
            yield DecodeSpec(head_dim=128, group=4, bound=bound, dither_rows=rows, **options)


#: Bytes a thread that prepare.cu may spill around a correctly rounded division, which is a function
#: of the compiler's that saves the registers it uses.
CALL_SPILL = 24


def check(spec: DecodeSpec, target: DeviceTarget, file: str) -> None:
    config = default_config(spec, target)
    resources = build(spec, config, file, target.arch).resources
    assert resources, f"{file} has no kernel"
    allowed = CALL_SPILL if file == "prepare.cu" else 0
    for kernel, taken in resources.items():
        assert taken.registers > 0
        spilt = max(taken.spill_store_bytes, taken.spill_load_bytes)
        assert spilt <= allowed, (kernel, taken, spec)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("spec", REPRESENTATIVE, ids=lambda s: f"D{s.head_dim}-G{s.group}")
def test_no_spills_on_the_main_target(spec: DecodeSpec, file: str) -> None:
    check(spec, SM90, file)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.arch)
def test_no_spills_anywhere(target: DeviceTarget, file: str) -> None:
    for spec in REPRESENTATIVE[:2]:
        check(spec, target, file)


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.arch)
@pytest.mark.parametrize("group", [1, 4, MAX_GROUP])
def test_no_spills_in_the_papers_kernel(group: int, target: DeviceTarget) -> None:
    spec = DecodeSpec(head_dim=128, group=group, query_dtype="float16", row_dtype="float16")
    check(spec, target, PAPER)


# ---- guards -------------------------------------------------------------------------------------

#: Places of decode.cu that are guarded against lanes that have parted: two in the merge, behind
#: loops over a lane's own splits, once a head.
GUARDED = 2
#: What policies ask for by default.  The proof hangs on little: on the group, on a dtype.
SAMPLED = tuple(
    DecodeSpec(
        head_dim=head_dim, group=group, query_dtype=dtype, row_dtype=dtype, sample_values=True
    )
    for dtype in ("bfloat16", "float16")
    for head_dim, group in ((128, 4), (64, 3), (128, 1), (128, 5), (128, 8), (256, 4))
)


@pytest.fixture(scope="module")
def nvdisasm() -> Path:
    """The disassembler, which comes as a wheel."""
    spec = importlib.util.find_spec("nvidia")
    places = spec.submodule_search_locations if spec else None
    found = [path for place in places or () for path in Path(place).glob("cu1?/bin/nvdisasm")]
    if not found:
        pytest.skip("no nvdisasm: pip install nvidia-cuda-nvdisasm")
    return found[0]


@pytest.mark.parametrize(
    "spec",
    REPRESENTATIVE + SAMPLED,
    ids=lambda s: f"D{s.head_dim}-G{s.group}-{s.row_dtype}-{s.bound.value}",
)
def test_the_compiler_knows_that_warps_stay_together(
    spec: DecodeSpec, nvdisasm: Path, tmp_path: Path
) -> None:
    """Else each of some fifty warp-wide instructions is guarded: 8 % of a step (NOTES.md)."""
    binary = build(spec, default_config(spec, SM90), "decode.cu", SM90.arch)
    # CuPy leaves out a cubin's last byte, which nvdisasm wants and the driver does not.
    file = tmp_path / "decode.cubin"
    file.write_bytes(binary.cubin.read_bytes() + b"\0")
    done = subprocess.run([nvdisasm, "-c", file], capture_output=True, text=True, check=True)
    assert "IMMA" in done.stdout
    assert done.stdout.count("BRA.DIV") <= GUARDED


# ---- everything ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.arch)
def test_no_spills_at_all(target: DeviceTarget, file: str) -> None:
    for spec in every_spec():
        check(spec, target, file)


@pytest.mark.slow
def test_every_configuration_compiles() -> None:
    spec = REPRESENTATIVE[0]
    for config in configurations(spec, SM90):
        assert build(spec, config, "decode.cu", SM90.arch).resources
