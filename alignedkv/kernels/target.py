"""Facts of a GPU, as data: code generation and pruning never ask the driver."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceTarget:
    """What restrictions and defaults need to know of a GPU.

    Attributes
    ----------
    name : str
        As the driver gives it, such as "NVIDIA H100 80GB HBM3".
    compute_capability : tuple of two int
    sm_count : int
    shared_bytes_per_block, shared_bytes_per_sm : int
        Shared memory that a block may opt in to, and that the blocks of an SM share.  A block takes
        `reserved_shared_bytes` more than it asks for.
    reserved_shared_bytes : int
    registers_per_sm : int
        32-bit registers.
    threads_per_sm : int
    l2_bytes : int
    bandwidth : float
        Peak of the device memory in bytes/s.
    """

    name: str
    compute_capability: tuple[int, int]
    sm_count: int
    shared_bytes_per_block: int
    shared_bytes_per_sm: int
    reserved_shared_bytes: int
    registers_per_sm: int
    threads_per_sm: int
    l2_bytes: int
    bandwidth: float

    @property
    def arch(self) -> str:
        """Name of the architecture for the compiler, such as "sm_90"."""
        major, minor = self.compute_capability
        return f"sm_{major}{minor}"

    @classmethod
    def from_properties(cls, properties: Mapping[str, Any]) -> DeviceTarget:
        """From the dict of ``cupy.cuda.runtime.getDeviceProperties(device)``."""
        name = properties["name"]
        return cls(
            name=name.decode() if isinstance(name, bytes) else name,
            compute_capability=(properties["major"], properties["minor"]),
            sm_count=properties["multiProcessorCount"],
            shared_bytes_per_block=properties["sharedMemPerBlockOptin"],
            shared_bytes_per_sm=properties["sharedMemPerMultiprocessor"],
            reserved_shared_bytes=properties["reservedSharedMemPerBlock"],
            registers_per_sm=properties["regsPerMultiprocessor"],
            threads_per_sm=properties["maxThreadsPerMultiProcessor"],
            l2_bytes=properties["l2CacheSize"],
            bandwidth=_bandwidth(properties),
        )


def _bandwidth(properties: Mapping[str, Any]) -> float:
    """Peak bytes/s: two transfers a clock (kHz) over a bus (bits); 0 where clocks are not told."""
    clock, bus = properties.get("memoryClockRate", 0), properties.get("memoryBusWidth", 0)
    return 2e3 * float(clock) * float(bus) / 8


#: NVIDIA A100 (SXM, 80 GB).
SM80 = DeviceTarget(
    name="NVIDIA A100-SXM4-80GB",
    compute_capability=(8, 0),
    sm_count=108,
    shared_bytes_per_block=163 << 10,
    shared_bytes_per_sm=164 << 10,
    reserved_shared_bytes=1 << 10,
    registers_per_sm=1 << 16,
    threads_per_sm=2048,
    l2_bytes=40 << 20,
    bandwidth=2.04e12,
)
#: NVIDIA H100 (SXM, 80 GB).
SM90 = DeviceTarget(
    name="NVIDIA H100 80GB HBM3",
    compute_capability=(9, 0),
    sm_count=132,
    shared_bytes_per_block=227 << 10,
    shared_bytes_per_sm=228 << 10,
    reserved_shared_bytes=1 << 10,
    registers_per_sm=1 << 16,
    threads_per_sm=2048,
    l2_bytes=50 << 20,
    bandwidth=3.35e12,
)
#: NVIDIA B200.
SM100 = DeviceTarget(
    name="NVIDIA B200",
    compute_capability=(10, 0),
    sm_count=148,
    shared_bytes_per_block=227 << 10,
    shared_bytes_per_sm=228 << 10,
    reserved_shared_bytes=1 << 10,
    registers_per_sm=1 << 16,
    threads_per_sm=2048,
    l2_bytes=126 << 20,
    bandwidth=8.0e12,
)
TARGETS = (SM80, SM90, SM100)
