"""torch and CuPy arrays as a launch sees them: an address, and what must be true of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from alignedkv.errors import LaunchError
from alignedkv.kernels.arrays import Array

#: Alignment that every array's address must have, bytes: the widest load of a kernel.
ALIGNMENT: Final = 16
#: NumPy knows no bfloat16, and torch does little with unsigned integers.
_SAME_BITS: Final = {"bfloat16": ("uint16",), "uint32": ("int32",), "uint16": ("int16",)}


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceArray:
    """What a launch wants to know of a torch or CuPy array.

    Attributes
    ----------
    address : int
    shape, strides : tuple of int
        Strides in elements.
    dtype : str
        NumPy's name, or "bfloat16".
    device : int
        Number of the GPU.
    """

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    device: int

    @classmethod
    def of(cls, name: str, array: Array) -> DeviceArray:
        """Look at an array.

        Raises
        ------
        LaunchError
            If it is no torch or CuPy array, or not on a GPU.
        """
        if hasattr(array, "data_ptr") and hasattr(array, "device"):
            if array.device.type != "cuda":
                raise LaunchError(f"{name} is on {array.device}: move it to the GPU of the cache")
            return cls(
                address=array.data_ptr(),
                shape=tuple(array.shape),
                strides=tuple(array.stride()),
                dtype=str(array.dtype).removeprefix("torch."),
                device=array.device.index,
            )
        if hasattr(array, "__cuda_array_interface__"):
            return cls(
                address=array.data.ptr,
                shape=tuple(array.shape),
                strides=tuple(step // array.itemsize for step in array.strides),
                dtype=array.dtype.name,
                device=array.device.id,
            )
        raise LaunchError(f"{name} is a {type(array).__name__}: give a torch or CuPy array")

    def has_contiguous_rows(self) -> bool:
        """Whether elements of the last dimension lie side by side."""
        return self.shape[-1] == 1 or self.strides[-1] == 1

    def is_contiguous(self) -> bool:
        """Whether elements lie in order without gaps (dimensions of one element do not matter)."""
        expected = 1
        for extent, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if extent != 1 and stride != expected:
                return False
            expected *= extent
        return True


def check_dtype(name: str, array: DeviceArray, dtype: str) -> None:
    """Raise LaunchError unless an array holds the named dtype, or its bits under another name."""
    allowed = (dtype, *_SAME_BITS.get(dtype, ()))
    if array.dtype not in allowed:
        raise LaunchError(f"{name} is {array.dtype}: give {' or '.join(allowed)}")


def check_place(name: str, array: DeviceArray, device: int, alignment: int = ALIGNMENT) -> None:
    """Raise LaunchError unless an array is on the device and begins at an aligned address."""
    if array.device != device:
        raise LaunchError(f"{name} is on GPU {array.device}: move it to GPU {device}")
    if array.address % alignment:
        raise LaunchError(
            f"{name} begins at address {array.address:#x}: give one that is a multiple of "
            f"{alignment}, such as a copy has"
        )
