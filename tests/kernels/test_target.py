from __future__ import annotations

import pytest

from alignedkv.kernels.target import SM80, SM90, SM100, TARGETS, DeviceTarget

H100_PROPERTIES = {
    "name": b"NVIDIA H100 80GB HBM3",
    "major": 9,
    "minor": 0,
    "multiProcessorCount": 132,
    "sharedMemPerBlockOptin": 232448,
    "sharedMemPerMultiprocessor": 233472,
    "reservedSharedMemPerBlock": 1024,
    "regsPerMultiprocessor": 65536,
    "maxThreadsPerMultiProcessor": 2048,
    "l2CacheSize": 52428800,
    "memoryClockRate": 2619000,
    "memoryBusWidth": 5120,
}


def test_properties_of_a_driver() -> None:
    target = DeviceTarget.from_properties(H100_PROPERTIES)
    assert target.bandwidth == pytest.approx(3.35e12, rel=1e-2)
    for name in DeviceTarget.__slots__:
        if name != "bandwidth":
            assert getattr(target, name) == getattr(SM90, name)


def test_a_driver_that_tells_no_clocks() -> None:
    properties = {k: v for k, v in H100_PROPERTIES.items() if not k.startswith("memory")}
    assert DeviceTarget.from_properties(properties).bandwidth == 0


def test_architectures() -> None:
    assert [target.arch for target in TARGETS] == ["sm_80", "sm_90", "sm_100"]
    assert (SM80, SM90, SM100) == TARGETS
