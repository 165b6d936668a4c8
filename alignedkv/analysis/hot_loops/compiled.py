"""How loops are compiled.

Every function releases the GIL and runs on one core; parallelism is over heads, outside.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

_Function = TypeVar("_Function", bound=Callable[..., Any])


def compiled(function: _Function) -> _Function:
    """Exact IEEE arithmetic: what is written is what is computed, bit for bit."""
    return cast(_Function, numba.njit(nogil=True, cache=True, error_model="numpy")(function))


def compiled_sums(function: _Function) -> _Function:
    """Sums may be reordered, which is what lets them use vector instructions."""
    reordering = {"reassoc", "contract", "nsz"}
    compiler = numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=reordering)
    return cast(_Function, compiler(function))
