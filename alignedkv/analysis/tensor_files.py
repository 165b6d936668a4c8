"""Files of named tensors, read slice by slice: safetensors, npz and pt behind one interface.

A file of any kind is opened again for every slice, so that a `TensorFile` can travel to a worker
process and a file larger than memory is never loaded whole: safetensors and pt files are mapped, of
an npz file one tensor is read at a time.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alignedkv.errors import ActivationError

SUFFIXES = (".safetensors", ".npz", ".pt")
_SAFETENSORS_DTYPES = {
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
}
_NPY_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
#: Key of a `.pt` dictionary that holds the metadata, itself a dictionary.
_METADATA_KEY = "metadata"


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """Shape and dtype name of a stored tensor."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorFile:
    """What a file holds, without its data.

    Attributes
    ----------
    path : Path
    tensors : mapping of name to TensorHeader
    metadata : mapping of str to str
        Of an npz file: its arrays of rank 0 and its strings.
    """

    path: Path
    tensors: Mapping[str, TensorHeader]
    metadata: Mapping[str, str]

    def read(self, name: str, rows: slice = slice(None)) -> NDArray[Any]:
        """Some rows of a tensor, along its first axis.

        Returns
        -------
        ndarray
            float16, float32 or float64; bfloat16 comes as float32, exactly.
        """
        reader = {
            ".safetensors": _read_safetensors,
            ".npz": _read_npz,
            ".pt": _read_torch,
        }[self.path.suffix]
        try:
            return reader(self.path, name, rows)
        except (
            OSError,
            ValueError,
            RuntimeError,
            EOFError,
            zipfile.BadZipFile,
            zlib.error,
        ) as error:
            raise _unreadable(self.path, error) from None


def open_tensor_file(path: Path) -> TensorFile:
    """Read names, shapes, dtypes and metadata of a file.

    Raises
    ------
    ActivationError
        If the file is missing, damaged, or of another kind than its suffix says.
    """
    if path.suffix not in SUFFIXES:
        raise ActivationError(f"{path}: unknown kind of file; give one of {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise ActivationError(f"{path}: no such file")
    opener = {".safetensors": _open_safetensors, ".npz": _open_npz, ".pt": _open_torch}[path.suffix]
    return opener(path)


def _unreadable(path: Path, error: Exception) -> ActivationError:
    reason = str(error).strip().splitlines()
    return ActivationError(
        f"{path}: cannot be read as {path.suffix} ({reason[0] if reason else type(error).__name__})"
        "; it is damaged, truncated or of another kind"
    )


def _open_safetensors(path: Path) -> TensorFile:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            tensors = {
                name: TensorHeader(
                    tuple(part.get_shape()),
                    _SAFETENSORS_DTYPES.get(part.get_dtype(), part.get_dtype().lower()),
                )
                for name, part in slices.items()
            }
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from None
    return TensorFile(path=path, tensors=tensors, metadata=metadata)


def _read_safetensors(path: Path, name: str, rows: slice) -> NDArray[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            part = file.get_slice(name)
            if part.get_dtype() == "BF16":
                import ml_dtypes  # noqa: F401  makes bfloat16 known to NumPy
            array: NDArray[Any] = part[rows]
    except SafetensorError as error:
        raise _unreadable(path, error) from None
    return _plain(array)


def _plain(array: NDArray[Any]) -> NDArray[Any]:
    """NumPy has no bfloat16 of its own: what `ml_dtypes` adds becomes float32."""
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array


def _open_npz(path: Path) -> TensorFile:
    tensors, metadata = {}, {}
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                with archive.open(member) as file:
                    version = np.lib.format.read_magic(file)
                    header = _NPY_HEADERS.get(version)
                    if header is None:
                        raise ValueError(f"{member} has version {version}")
                    shape, _, dtype = header(file)
                name = member.removesuffix(".npy")
                if shape and dtype.kind not in "US":
                    tensors[name] = TensorHeader(shape, dtype.name)
        with np.load(path, allow_pickle=False) as arrays:
            metadata = {name: str(arrays[name]) for name in arrays.files if name not in tensors}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise _unreadable(path, error) from None
    return TensorFile(path=path, tensors=tensors, metadata=metadata)


def _read_npz(path: Path, name: str, rows: slice) -> NDArray[Any]:
    with np.load(path, allow_pickle=False) as archive:
        array: NDArray[Any] = archive[name][rows]
    return array


def _load_torch(path: Path) -> dict[str, Any]:
    import pickle

    from torch import load

    try:
        content = load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise ActivationError(
            f"{path}: holds more than tensors (not loadable with weights_only) and is not opened, "
            "since unpickling it could run code; save a dictionary of tensors, numbers and strings"
        ) from None
    except (OSError, RuntimeError, ValueError, EOFError) as error:
        raise _unreadable(path, error) from None
    if not isinstance(content, dict):
        raise ActivationError(
            f"{path}: holds a {type(content).__name__}; save a dictionary of named tensors"
        )
    return content


def _open_torch(path: Path) -> TensorFile:
    content = _load_torch(path)
    metadata = {str(key): str(value) for key, value in content.get(_METADATA_KEY, {}).items()}
    tensors = {}
    for name, value in content.items():
        if hasattr(value, "shape") and hasattr(value, "dtype"):
            tensors[name] = TensorHeader(
                tuple(value.shape), str(value.dtype).removeprefix("torch.")
            )
        elif name != _METADATA_KEY:
            metadata[name] = str(value)
    return TensorFile(path=path, tensors=tensors, metadata=metadata)


def _read_torch(path: Path, name: str, rows: slice) -> NDArray[Any]:
    part = _load_torch(path)[name][rows]
    if str(part.dtype) == "torch.bfloat16":
        part = part.float()
    array: NDArray[Any] = part.numpy()
    return array
