"""The kernels as functions: checks, arguments, streams.  What they compute, `reference` defines.

Arrays are torch or CuPy arrays on one GPU.  Every function works on a stream, by default CuPy's
current one, and returns without waiting for it, but for `encode`: outside a graph capture it asks
the device for the lengths, so that a full cache is an error and no lost token.
"""

from alignedkv.kernels.launch.rows import dequantise, encode, fit_transforms
from alignedkv.kernels.launch.steps import configuration, decode, probe, step

__all__ = [
    "configuration",
    "decode",
    "dequantise",
    "encode",
    "fit_transforms",
    "probe",
    "step",
]
