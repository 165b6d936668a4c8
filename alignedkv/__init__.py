"""Attention over a KV cache stored as bit planes, with a bound on the error of every output.

Importing this package needs NumPy alone and does no work: nothing is read, compiled, registered or
configured.  Import what you use by its full name, for example ``from alignedkv import runtime``.
"""

__all__ = ["__version__"]

__version__ = "0.1.0.dev0"
