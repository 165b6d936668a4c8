"""torch and CuPy arrays as a launch sees them: an address, and what must be true of it."""

from __future__ import annotations

import math
from typing import Final, NamedTuple

from alignedkv.errors import LaunchError
from alignedkv.kernels.arrays import Array

#: Alignment that every array's address must have, bytes: the widest load of a kernel.
ALIGNMENT: Final = 16
#: NumPy knows no bfloat16, and torch does little with unsigned integers.
_SAME_BITS: Final = {"bfloat16": ("uint16",), "uint32": ("int32",), "uint16": ("int16",)}


class DeviceArray(NamedTuple):
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
        """Whether elements of the last dimension lie side by side, if there are any."""
        return 0 in self.shape or self.shape[-1] == 1 or self.strides[-1] == 1

    def is_contiguous(self) -> bool:
        """Whether elements lie in order without gaps (dimensions of one element do not matter)."""
        if 0 in self.shape:
            return True
        expected = contiguous_strides(self.shape)
        together = zip(self.shape, self.strides, expected, strict=True)
        return all(extent == 1 or stride == wanted for extent, stride, wanted in together)


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides, in elements, of a contiguous array."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def names_of_dtype(dtype: str) -> tuple[str, ...]:
    """Names under which arrays may hold the bits of a dtype."""
    return (dtype, *_SAME_BITS.get(dtype, ()))
