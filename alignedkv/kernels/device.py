"""Where kernels run: a GPU and a stream, and the launch itself.

Launches go to the driver's ``cuLaunchKernelEx``: arguments are one struct passed by value, and a
kernel may be let start while the one before it in the stream still runs (programmatic dependent
launch), which CuPy's own launch has no word for.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from alignedkv.errors import LaunchError
from alignedkv.kernels import compile as compiling
from alignedkv.kernels.arrays import Array
from alignedkv.kernels.config import DecodeConfig
from alignedkv.kernels.device_array import DeviceArray
from alignedkv.kernels.legality import check_legal, default_config
from alignedkv.kernels.spec import DecodeSpec
from alignedkv.kernels.storage import held_dtype
from alignedkv.kernels.target import DeviceTarget

#: Shared memory that a block gets without asking for more, bytes.
SHARED_WITHOUT_ASKING: Final = 48 << 10
#: First compute capability with programmatic dependent launch.
_OVERLAP_CAPABILITY: Final = (9, 0)
_SUCCESS: Final = 0
_MEMORY_CLOCK_RATE: Final = 36  # cudaDevAttr...
_PROGRAMMATIC_STREAM_SERIALIZATION: Final = 6  # CU_LAUNCH_ATTRIBUTE_...


class _LaunchAttribute(ctypes.Structure):
    """``CUlaunchAttribute``: its value is a union of 64 bytes, of which one int is used here."""

    _fields_ = (
        ("id", ctypes.c_int),
        ("pad", ctypes.c_char * 4),
        ("value", ctypes.c_int),
        ("rest", ctypes.c_char * 60),
    )


class _LaunchConfig(ctypes.Structure):
    """``CUlaunchConfig``."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_LaunchAttribute)),
        ("attribute_count", ctypes.c_uint),
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Place:
    """A GPU, a stream on it, and the kernels that serve a spec there.

    Attributes
    ----------
    spec : DecodeSpec
    config : DecodeConfig
    target : DeviceTarget
    device : int
    stream : cupy.cuda.Stream
    functions : dict
        Kernels that have been launched, by file, name and dynamic shared memory.
    """

    spec: DecodeSpec
    config: DecodeConfig
    target: DeviceTarget
    device: int
    stream: Any
    functions: dict[tuple[str, str, int], Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls, spec: DecodeSpec, array: Array, config: DecodeConfig | None, stream: int | None
    ) -> Place:
        """The GPU of ``array``, with the default config and CuPy's current stream if not given.

        Raises
        ------
        CodegenError
            If the config is not legal for the spec on that GPU.
        LaunchError
            If the array is on no GPU.
        """
        import cupy

        device = DeviceArray.of("the cache", array).device
        if stream is None:
            with cupy.cuda.Device(device):
                stream = cupy.cuda.get_current_stream().ptr
        return _place(spec, config, device, stream)

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Array:
        """Zeroed CuPy array; bfloat16 as uint16 bit patterns."""
        import cupy

        with cupy.cuda.Device(self.device), self.stream:
            return cupy.zeros(shape, held_dtype(dtype))

    def copy(self, array: Array) -> Array:
        """CuPy copy of a torch or CuPy array."""
        import cupy

        with cupy.cuda.Device(self.device), self.stream:
            return cupy.array(array)

    def fill(self, array: Array, number: float) -> None:
        """Overwrite a torch or CuPy array by a number."""
        import cupy

        with cupy.cuda.Device(self.device), self.stream:
            cupy.asarray(array).fill(number)

    def scale(self, array: Array, source: Array, factor: float) -> None:
        """Overwrite a torch or CuPy array by a multiple of another."""
        import cupy

        with cupy.cuda.Device(self.device), self.stream:
            cupy.multiply(cupy.asarray(source), factor, out=cupy.asarray(array))

    def launch(
        self,
        file: str,
        kernel: str,
        arguments: NDArray[np.void],
        *,
        grid: tuple[int, int],
        block: tuple[int, int],
        shared_bytes: int = 0,
        overlapping: bool = False,
    ) -> None:
        """Launch a kernel with one struct as its argument.

        Parameters
        ----------
        file, kernel : str
            Such as "encode.cu", "encode".
        arguments : structured array []
            `arguments.pack` of the struct that the kernel takes.
        grid, block : pair of int
            Blocks; threads.
        shared_bytes : int
            Dynamic shared memory of a block.
        overlapping : bool
            The kernel may start while the one before it still runs; it waits itself
            (``await_previous_kernel``) where it needs that one's results.  Without effect on GPUs
            that cannot.

        Raises
        ------
        LaunchError
            If the driver refuses.
        """
        import cupy

        with cupy.cuda.Device(self.device):
            function = self._function(file, kernel, shared_bytes)
            overlaps = overlapping and self.target.compute_capability >= _OVERLAP_CAPABILITY
            attribute = _LaunchAttribute(id=_PROGRAMMATIC_STREAM_SERIALIZATION, value=1)
            setup = _LaunchConfig(
                grid=(*grid, 1),
                block=(*block, 1),
                shared_bytes=shared_bytes,
                stream=self.stream.ptr,
                attributes=ctypes.pointer(attribute),
                attribute_count=int(overlaps),
            )
            parameters = (ctypes.c_void_p * 1)(arguments.ctypes.data)
            status = _driver().cuLaunchKernelEx(
                ctypes.byref(setup), ctypes.c_void_p(function), parameters, None
            )
        if status != _SUCCESS:
            raise LaunchError(
                f"{kernel}, grid {grid}, block {block}, {shared_bytes} bytes of shared memory: the "
                f"driver says {_error_name(status)}. Spec: {self.spec}; config: {self.config}"
            )

    def _function(self, file: str, kernel: str, shared_bytes: int) -> Any:
        """A kernel that may use ``shared_bytes`` on this GPU, the current one."""
        known = self.functions.get((file, kernel, shared_bytes))
        if known is None:
            module = compiling.load(self.spec, self.config, file, self.target.arch, self.device)
            known = module.get_function(kernel)
            if shared_bytes > SHARED_WITHOUT_ASKING:
                known.max_dynamic_shared_size_bytes = shared_bytes
            self.functions[file, kernel, shared_bytes] = known
        return known.kernel.ptr


@functools.lru_cache(maxsize=1024)
def _place(spec: DecodeSpec, config: DecodeConfig | None, device: int, stream: int) -> Place:
    target = device_target(device)
    if config is None:
        config = default_config(spec, target)
    check_legal(spec, config, target)
    return Place(
        spec=spec, config=config, target=target, device=device, stream=external_stream(stream)
    )


@dataclass(frozen=True, slots=True)
class _StreamHandle:
    """A stream known by its number, as an object of the CUDA stream protocol."""

    handle: int

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.handle  # version of the protocol, cudaStream_t


def external_stream(handle: int) -> Any:
    """The ``cupy.cuda.Stream`` of a ``cudaStream_t``; 0 is the default stream.

    Whoever made the stream keeps it alive.
    """
    import cupy

    if not handle:
        return cupy.cuda.Stream.null
    # From CuPy 14.0 on, which deprecates ExternalStream.
    return cupy.cuda.Stream.from_external(_StreamHandle(handle))


@functools.cache
def device_target(device: int) -> DeviceTarget:
    """Facts of a GPU of this machine."""
    from cupy.cuda import runtime

    properties = dict(runtime.getDeviceProperties(device))
    # CUDA 13 took the clock out of the properties.
    clock = runtime.deviceGetAttribute(_MEMORY_CLOCK_RATE, device)
    return DeviceTarget.from_properties({"memoryClockRate": clock, **properties})


@functools.cache
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise LaunchError(f"no CUDA driver: {error}. Install the driver of the GPU") from error


def _error_name(status: int) -> str:
    name = ctypes.c_char_p()
    _driver().cuGetErrorName(status, ctypes.byref(name))
    return (name.value or b"error %d" % status).decode()
