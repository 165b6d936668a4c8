"""Files of saved activations -> attention cases, listed without loading them.

`case_layout` says how such files name their tensors and what their metadata may hold.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from alignedkv.analysis.activations import AttentionCase
from alignedkv.analysis.case_layout import (
    check_layer,
    number,
    optional_number,
    stored_positions,
)
from alignedkv.analysis.tensor_files import SUFFIXES, TensorFile, open_tensor_file
from alignedkv.errors import ActivationError

_SAMPLE = "smollm2-135m-l05-l15-l25.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseReference:
    """A case that has not been loaded: cheap, and small enough to send to a worker.

    Attributes
    ----------
    file : TensorFile
    prefix : str
        What stands before ``q``, ``k``, ``v`` in the tensors' names.
    layer, kv_head : int
    scaling : float
    positions : tuple of int or None
        Query positions wanted; None: all that the file holds.
    """

    file: TensorFile
    prefix: str
    layer: int
    kv_head: int
    scaling: float
    positions: tuple[int, ...] | None = None

    def query_positions(self) -> NDArray[np.int64]:
        """Token numbers of the queries that `load` gives, ascending as the file stores them."""
        stored = stored_positions(self.file, self.prefix)
        return stored if self.positions is None else stored[np.isin(stored, self.positions)]

    def load(self) -> AttentionCase:
        """Read the case's own rows, and check them.

        Raises
        ------
        ActivationError
            If they are damaged, or hold NaN or infinity.
        """
        file = self.file
        kv_heads = file.tensors[self.prefix + "k"].shape[0]
        group = file.tensors[self.prefix + "q"].shape[0] // kv_heads
        heads = slice(self.kv_head * group, (self.kv_head + 1) * group)
        head = slice(self.kv_head, self.kv_head + 1)
        query = file.read(self.prefix + "q", heads)
        key = file.read(self.prefix + "k", head)[0]
        value = file.read(self.prefix + "v", head)[0]
        positions = stored_positions(file, self.prefix)
        prefill = len(key)
        if self.prefix + "q_dec" in file.tensors:
            query = np.concatenate([query, file.read(self.prefix + "q_dec", heads)], axis=1)
            key = np.concatenate([key, file.read(self.prefix + "k_dec", head)[0]])
            value = np.concatenate([value, file.read(self.prefix + "v_dec", head)[0]])
        if self.positions is not None:
            query = query[:, np.isin(positions, self.positions)]
            positions = self.query_positions()
        sinks = None
        if self.prefix + "sinks" in file.tensors:
            sinks = file.read(self.prefix + "sinks", heads).astype(np.float64)
        return AttentionCase(
            name=f"{file.path.name} layer {self.layer} KV head {self.kv_head}",
            layer=self.layer,
            kv_head=self.kv_head,
            query=query,
            key=key,
            value=value,
            positions=positions,
            dtype=file.tensors[self.prefix + "k"].dtype,
            scaling=self.scaling,
            window=optional_number(file, "sliding_window", int),
            softcap=optional_number(file, "softcap", float),
            sinks=sinks,
            start=number(file, "start", file.metadata.get("start", "0"), int),
            prefill=prefill,
        )


def sample_path() -> Path:
    """The activations that come with the package: three layers of SmolLM2-135M, 1024 tokens."""
    return Path(__file__).parent / "sample" / _SAMPLE


def find_cases(
    sources: str | Path | Iterable[str | Path],
    *,
    layers: Collection[int] | None = None,
    kv_heads: Collection[int] | None = None,
    positions: Collection[int] | None = None,
    scaling: float | None = None,
) -> list[CaseReference]:
    """List the cases of files, folders and globs, in the order of files, layers and KV heads.

    Shapes, types and the selection are checked here; numbers when a case is loaded.

    Parameters
    ----------
    sources : path or several
        Files, folders (all of their files that could hold activations) or glob patterns.
    layers, kv_heads : collections of int, optional
        Those wanted; default all.
    positions : collection of int, optional
        Query positions wanted, as token numbers; negative ones count from the last stored
        position of each case. Default all.
    scaling : float, optional
        Softmax scale of all cases, in place of the files' own.

    Raises
    ------
    ActivationError
        If a file is missing, damaged or lays its tensors out in another way, or nothing is left.
    """
    if isinstance(sources, str | Path):
        sources = [sources]
    paths = [path for source in sources for path in _files_of(source)]
    found = [
        reference
        for path in paths
        for reference in _cases_of(open_tensor_file(path), scaling=scaling)
    ]
    known_layers = sorted({case.layer for case in found})
    known_heads = sorted({case.kv_head for case in found})
    _check_selection("layers", layers, known_layers)
    _check_selection("KV heads", kv_heads, known_heads)
    chosen = [
        case
        for case in found
        if (layers is None or case.layer in layers)
        and (kv_heads is None or case.kv_head in kv_heads)
    ]
    if not chosen:
        raise ActivationError(
            f"no case has one of layers {sorted(layers or known_layers)} and one of KV heads "
            f"{sorted(kv_heads or known_heads)}"
        )
    return chosen if positions is None else [_at_positions(case, positions) for case in chosen]


def _files_of(source: str | Path) -> list[Path]:
    path = Path(source)
    if path.is_dir():
        files = sorted(item for item in path.iterdir() if item.suffix in SUFFIXES)
        if not files:
            raise ActivationError(f"{path}: no {', '.join(SUFFIXES)} file in this folder")
        return files
    if path.exists() or not glob.has_magic(str(source)):
        return [path]
    files = sorted(Path(name) for name in glob.glob(str(source), recursive=True))
    if not files:
        raise ActivationError(f"{source}: the pattern matches no file")
    return files


def _cases_of(file: TensorFile, *, scaling: float | None) -> Iterator[CaseReference]:
    prefixes = {
        match["prefix"]: int(match["layer"])
        for name in file.tensors
        if (match := re.fullmatch(r"(?P<prefix>layers\.(?P<layer>\d+)\.)k", name))
    }
    if not prefixes and "k" in file.tensors:
        prefixes = {"": number(file, "layer", file.metadata.get("layer", "0"), int)}
    if not prefixes:
        names = ", ".join(sorted(file.tensors)) or "none"
        raise ActivationError(
            f"{file.path}: no keys found; name the tensors q, k, v or layers.L.q, layers.L.k, "
            f"layers.L.v (it holds {names})"
        )
    if scaling is None:
        if "scaling" not in file.metadata:
            raise ActivationError(
                f"{file.path}: its metadata lacks 'scaling', the softmax scale; give it as an "
                "argument (for most models it is 1/sqrt(D))"
            )
        scaling = number(file, "scaling", file.metadata["scaling"], float)
    for prefix, layer in sorted(prefixes.items(), key=lambda item: item[1]):
        for kv_head in range(check_layer(file, prefix)):
            yield CaseReference(
                file=file, prefix=prefix, layer=layer, kv_head=kv_head, scaling=scaling
            )


def _check_selection(what: str, wanted: Collection[int] | None, known: list[int]) -> None:
    if wanted is None:
        return
    missing = sorted(set(wanted) - set(known))
    if missing or not wanted:
        raise ActivationError(f"{what} {missing}: not in the files; they hold {known}")


def _at_positions(case: CaseReference, wanted: Collection[int]) -> CaseReference:
    stored = stored_positions(case.file, case.prefix)
    chosen = {int(stored[p]) if -len(stored) <= p < 0 else p for p in wanted}
    missing = sorted(chosen - set(stored.tolist()))
    if missing or not chosen:
        raise ActivationError(
            f"{case.file.path}: no query at positions {missing}; it holds {stored[0]}..{stored[-1]}"
        )
    return replace(case, positions=tuple(sorted(chosen)))
