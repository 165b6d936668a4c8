"""Clocks and temperature of a GPU, through the driver's own NVML library.

A time without them says little: a GPU that is hot or shares its power budget runs slower.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Final

_SUCCESS: Final = 0
_SM_CLOCK, _MEMORY_CLOCK, _GPU_TEMPERATURE = 1, 2, 0
_LIBRARY: Final = "libnvidia-ml.so.1"


def read_clocks(pci_bus_id: str) -> dict[str, float]:
    """What NVML tells of a GPU now.

    Parameters
    ----------
    pci_bus_id : str
        Such as ``cupy.cuda.runtime.deviceGetPCIBusId`` gives: CUDA and NVML count GPUs differently.

    Returns
    -------
    dict
        sm_mhz, memory_mhz, temperature_c, power_w, as far as the GPU tells them; empty where there
        is no NVML.
    """
    library = _nvml()
    if library is None:
        return {}
    handle = ctypes.c_void_p()
    status = library.nvmlDeviceGetHandleByPciBusId_v2(
        pci_bus_id.encode("ascii"), ctypes.byref(handle)
    )
    if status != _SUCCESS:
        return {}
    questions = {
        "sm_mhz": (library.nvmlDeviceGetClockInfo, (ctypes.c_uint(_SM_CLOCK),), 1.0),
        "memory_mhz": (library.nvmlDeviceGetClockInfo, (ctypes.c_uint(_MEMORY_CLOCK),), 1.0),
        "temperature_c": (
            library.nvmlDeviceGetTemperature,
            (ctypes.c_uint(_GPU_TEMPERATURE),),
            1.0,
        ),
        "power_w": (library.nvmlDeviceGetPowerUsage, (), 1e-3),
    }
    facts = {}
    for name, (function, arguments, unit) in questions.items():
        value = ctypes.c_uint()
        if function(handle, *arguments, ctypes.byref(value)) == _SUCCESS:
            facts[name] = value.value * unit
    return facts


@functools.cache
def _nvml() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(_LIBRARY)
    except OSError:
        return None
    return library if library.nvmlInit_v2() == _SUCCESS else None
