"""The energy that a GPU has taken, as its driver counts it (NVML)."""

from __future__ import annotations

import ctypes

__all__ = ["EnergyCounter", "EnergyError"]


class EnergyError(RuntimeError):
    """NVML is missing, or does not count this GPU's energy."""


class EnergyCounter:
    """Energy of the current GPU since the driver was loaded.

    Raises
    ------
    EnergyError
        If NVML is not installed, does not know the GPU or does not count its energy (before Volta).
    """

    def __init__(self) -> None:
        import torch

        try:
            self._nvml = ctypes.CDLL("libnvidia-ml.so.1")
        except OSError as error:
            raise EnergyError(f"no NVML: {error}") from None
        self._device = ctypes.c_void_p()
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        name = f"GPU-{properties.uuid}".encode()
        self._call("nvmlInit_v2")
        self._call("nvmlDeviceGetHandleByUUID", name, ctypes.byref(self._device))
        self.joules()

    def joules(self) -> float:
        """Joules so far; the driver counts thousandths, and adds to them every few milliseconds."""
        total = ctypes.c_ulonglong()
        self._call("nvmlDeviceGetTotalEnergyConsumption", self._device, ctypes.byref(total))
        return total.value / 1000

    def _call(self, function: str, *arguments: object) -> None:
        code = getattr(self._nvml, function)(*arguments)
        if code != 0:
            raise EnergyError(f"{function} answers {code} (nvmlReturn_t in nvml.h)")
