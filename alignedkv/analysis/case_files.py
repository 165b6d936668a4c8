"""Files of saved activations -> attention cases, listed without loading them.

Two layouts of names are known, with the same metadata (strings):

- one file for all layers: ``layers.L.q, layers.L.k, layers.L.v`` (and ``layers.L.sinks``);
- one file per layer, as `tools/capture.py` writes them: ``q, k, v``, and ``q_dec, k_dec, v_dec`` of
  decode steps that follow; the layer is the metadata's ``layer``.

``k, v`` are [KV heads, T, D] and ``q`` is [query heads, positions, D], after the rotary embedding
and before the softmax scale; ``sinks`` are learned sink logits [query heads].

==================  ===============================================================================
metadata            meaning
==================  ===============================================================================
scaling             softmax scale; required here or as an argument
query_positions     ``"first..last"``, the tokens whose queries ``q`` holds; default the last ones
sliding_window      tokens that a query sees, itself included; default and ``"None"``: all
softcap             scores become ``softcap tanh(score / softcap)``; default and ``"None"``: none
start               first token that is not padding; default 0
layer               layer number of a file that holds one layer
==================  ===============================================================================
"""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from alignedkv.analysis.activations import DTYPES, AttentionCase
from alignedkv.analysis.tensor_files import (
    SUFFIXES,
    TensorFile,
    TensorHeader,
    open_tensor_file,
)
from alignedkv.errors import ActivationError

_Number = TypeVar("_Number", int, float)
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
        stored = _stored_positions(self.file, self.prefix)
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
        positions = _stored_positions(file, self.prefix)
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
            window=_optional_number(file, "sliding_window", int),
            softcap=_optional_number(file, "softcap", float),
            sinks=sinks,
            start=_number(file, "start", file.metadata.get("start", "0"), int),
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
        prefixes = {"": _number(file, "layer", file.metadata.get("layer", "0"), int)}
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
        scaling = _number(file, "scaling", file.metadata["scaling"], float)
    for prefix, layer in sorted(prefixes.items(), key=lambda item: item[1]):
        for kv_head in range(_check_headers(file, prefix)):
            yield CaseReference(
                file=file, prefix=prefix, layer=layer, kv_head=kv_head, scaling=scaling
            )


def _check_headers(file: TensorFile, prefix: str) -> int:
    """Check shapes and types of one layer; return its KV heads."""
    decoded = any(prefix + part in file.tensors for part in ("q_dec", "k_dec", "v_dec"))
    suffixes = ("", "_dec") if decoded else ("",)
    headers = {part + s: _header(file, prefix + part + s) for s in suffixes for part in "qkv"}
    kinds = sorted({header.dtype for header in headers.values()})
    if len(kinds) > 1:
        raise ActivationError(
            f"{file.path}: {prefix}q, {prefix}k, {prefix}v mix dtypes {kinds}; save all in one"
        )
    heads, kv_heads = headers["q"].shape[0], headers["k"].shape[0]
    if kv_heads == 0 or heads == 0 or heads % kv_heads:
        raise ActivationError(
            f"{file.path}: {heads} query heads of {prefix}q do not divide among {kv_heads} KV "
            f"heads of {prefix}k"
        )
    channels = headers["k"].shape[2]
    for suffix in suffixes:
        query, key, value = (headers[part + suffix].shape for part in "qkv")
        names = f"{prefix}q{suffix} {list(query)}, k {list(key)}, v {list(value)}"
        if (
            key != value
            or (key[0], key[2]) != (kv_heads, channels)
            or (query[0], query[2]) != (heads, channels)
        ):
            raise ActivationError(
                f"{file.path}: {names} do not agree; give q [{heads}, positions, {channels}] and "
                f"k, v [{kv_heads}, tokens, {channels}]"
            )
        if 0 in (*query, *key):
            raise ActivationError(
                f"{file.path}: {names}: at least one token, position and channel are needed"
            )
    sinks = file.tensors.get(prefix + "sinks")
    if sinks is not None and sinks.shape != (heads,):
        raise ActivationError(
            f"{file.path}: {prefix}sinks is {list(sinks.shape)}; give [{heads}], one per query head"
        )
    _stored_positions(file, prefix)
    return kv_heads


def _header(file: TensorFile, name: str) -> TensorHeader:
    if name not in file.tensors:
        raise ActivationError(
            f"{file.path}: tensor {name} is missing; it holds {', '.join(sorted(file.tensors))}"
        )
    header = file.tensors[name]
    if len(header.shape) != 3:
        raise ActivationError(
            f"{file.path}: tensor {name} has shape {list(header.shape)}; give [heads, tokens, "
            "channels]"
        )
    if header.dtype not in DTYPES:
        raise ActivationError(
            f"{file.path}: tensor {name} is {header.dtype}; give {', '.join(DTYPES)}"
        )
    return header


def _stored_positions(file: TensorFile, prefix: str) -> NDArray[np.int64]:
    """Token numbers of the queries in ``q``, then of those in ``q_dec``."""
    tokens = file.tensors[prefix + "k"].shape[1]
    count = file.tensors[prefix + "q"].shape[1]
    text = file.metadata.get("query_positions", f"{tokens - count}..{tokens - 1}")
    match = re.fullmatch(r"(\d+)\.\.(\d+)", text)
    if match is None:
        raise ActivationError(
            f"{file.path}: query_positions {text!r}; give first..last, such as 1008..1023, one "
            f"for each of the {count} positions of {prefix}q, among tokens 0..{tokens - 1}"
        )
    positions = np.arange(int(match[1]), int(match[2]) + 1)
    if len(positions) != count or positions[-1] >= tokens:
        raise ActivationError(
            f"{file.path}: query_positions {text} do not fit {prefix}q with {count} positions and "
            f"{prefix}k with {tokens} tokens"
        )
    if prefix + "q_dec" in file.tensors:
        decoded = file.tensors[prefix + "k_dec"].shape[1]
        count = file.tensors[prefix + "q_dec"].shape[1]
        if count != decoded:
            raise ActivationError(
                f"{file.path}: {prefix}q_dec has {count} steps and {prefix}k_dec {decoded}; each "
                "decode step has one query and one key"
            )
        positions = np.concatenate([positions, tokens + np.arange(decoded)])
    return positions


def _check_selection(what: str, wanted: Collection[int] | None, known: list[int]) -> None:
    if wanted is None:
        return
    missing = sorted(set(wanted) - set(known))
    if missing or not wanted:
        raise ActivationError(f"{what} {missing}: not in the files; they hold {known}")


def _at_positions(case: CaseReference, wanted: Collection[int]) -> CaseReference:
    stored = _stored_positions(case.file, case.prefix)
    chosen = {int(stored[p]) if -len(stored) <= p < 0 else p for p in wanted}
    missing = sorted(chosen - set(stored.tolist()))
    if missing or not chosen:
        raise ActivationError(
            f"{case.file.path}: no query at positions {missing}; it holds {stored[0]}..{stored[-1]}"
        )
    return replace(case, positions=tuple(sorted(chosen)))


def _number(file: TensorFile, name: str, text: str, kind: Callable[[str], _Number]) -> _Number:
    try:
        return kind(text)
    except ValueError:
        raise ActivationError(f"{file.path}: metadata {name} is {text!r}; give a number") from None


def _optional_number(file: TensorFile, name: str, kind: Callable[[str], _Number]) -> _Number | None:
    text = file.metadata.get(name, "None")
    return None if text in ("None", "") else _number(file, name, text, kind)
