"""What a file of activations must hold: names, shapes and types of a layer, and its metadata.

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

import re
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from alignedkv.analysis.activations import DTYPES
from alignedkv.analysis.tensor_files import TensorFile, TensorHeader
from alignedkv.errors import ActivationError

_Number = TypeVar("_Number", int, float)


def check_layer(file: TensorFile, prefix: str) -> int:
    """Check shapes and types of one layer; return its KV heads.

    Parameters
    ----------
    file : TensorFile
    prefix : str
        What stands before ``q``, ``k``, ``v`` in the tensors' names.

    Raises
    ------
    ActivationError
        With the tensor's name and shape, and what is allowed.
    """
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
    stored_positions(file, prefix)
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


def stored_positions(file: TensorFile, prefix: str) -> NDArray[np.int64]:
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


def number(file: TensorFile, name: str, text: str, kind: Callable[[str], _Number]) -> _Number:
    """A number of the metadata."""
    try:
        return kind(text)
    except ValueError:
        raise ActivationError(f"{file.path}: metadata {name} is {text!r}; give a number") from None


def optional_number(file: TensorFile, name: str, kind: Callable[[str], _Number]) -> _Number | None:
    """A number of the metadata, or None where it is absent or says so."""
    text = file.metadata.get(name, "None")
    return None if text in ("None", "") else number(file, name, text, kind)
