"""The exceptions that alignedkv raises on purpose.

Every one derives from `AlignedKVError`, so ``except AlignedKVError`` catches all that the package
can foresee and nothing that it cannot.  Those that mean "the caller gave a wrong value" are
`ValueError` as well, as Python's own functions would raise.

A message has three parts: what was given, what is allowed, what to do about it.  No class here
stands for a fallback: code that cannot do what was asked raises instead of doing something else.
"""

from __future__ import annotations

__all__ = [
    "ActivationError",
    "AlignedKVError",
    "BoundMissedError",
    "CodegenError",
    "CompileError",
    "LaunchError",
    "SpecError",
    "TuningError",
    "UnsupportedModelError",
]


class AlignedKVError(Exception):
    """Base of every exception that alignedkv raises on purpose."""


class SpecError(AlignedKVError, ValueError):
    """A request that cannot be honoured as stated.

    Raised for values that a user chose: a tolerance or failure probability out of range, an unknown
    plane layout or bound kind, a combination of options that contradict each other.
    """


class ActivationError(AlignedKVError, ValueError):
    """Attention inputs that cannot be right.

    Raised for tensors and the files that hold them: wrong rank or shape, heads that do not divide,
    mixed dtypes, NaN or infinity in an attended row, a file that is missing, truncated or not of
    the expected kind.  The message names the tensor and, where there is one, the place in it.
    """


class UnsupportedModelError(AlignedKVError):
    """A model that the runtime cannot serve.

    Raised before anything of the model is changed.  The message names the part that stands in the
    way: the attention interface, a layer type, a head size, a device, a dtype.
    """


class BoundMissedError(AlignedKVError):
    """An output whose error bound exceeds the tolerance, where a miss was to raise.

    Only with ``on_miss="raise"``.  The message names the layer, how many heads missed and the
    largest bound.
    """


class CodegenError(AlignedKVError):
    """No kernel source can be generated for a specification and a configuration.

    The message lists every restriction that is broken, each with its reason.
    """


class CompileError(AlignedKVError):
    """A compiler is missing, or it rejected generated source.

    The message ends with the compiler's log and the path of the source, which is kept.
    """


class LaunchError(AlignedKVError):
    """A kernel was called with arguments that it was not built for, or the device refused it.

    Raised before the launch for a wrong dtype, shape, stride, alignment, device or capacity; the
    message names the argument.
    """


class TuningError(AlignedKVError):
    """A tuning run or its stored result cannot be used.

    Raised for a search space with no legal configuration, a journal or wisdom file that is damaged
    or from another version, or a sweep on a machine that has no GPU.
    """
