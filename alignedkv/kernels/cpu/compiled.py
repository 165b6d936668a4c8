"""`compiled`: Numba's njit with a disk cache that knows when any file of this package has changed.

Numba keys a cached function by its own file only; a function that has inlined one from another file
would outlive a change there, and so would one that has frozen another module's constant.  So the
cache lies in a folder named by the digest of all sources that the CPU kernels are made of, below
``ALIGNEDKV_CACHE_DIR`` or the user's cache folder.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numba

from alignedkv.kernels.cache_folder import cache_directory

_log = logging.getLogger(__name__)

Function = TypeVar("Function", bound=Callable[..., Any])

#: Sums may be reordered and products fused, but NaN, infinity and rounding keep their meaning.
FAST = {"reassoc", "contract", "nsz"}


def compiled(function: Function, **options: Any) -> Function:
    """Compile on first use, and keep the binary on disk where that is possible."""
    options = {"error_model": "numpy", "nogil": True, **options}
    config: Any = numba.config
    before = config.CACHE_DIR
    try:
        config.CACHE_DIR = str(_folder())
        dispatcher = numba.njit(cache=True, **options)(function)
    except (RuntimeError, OSError) as error:
        _log.warning("no cache for %s, which is compiled anew: %s", function.__name__, error)
        dispatcher = numba.njit(**options)(function)
    finally:
        config.CACHE_DIR = before
    return dispatcher  # type: ignore[no-any-return]


def fast(function: Function) -> Function:
    """`compiled`, for loops of multiplications and additions that should become vector code."""
    return compiled(function, fastmath=FAST)


def parallel(function: Function) -> Function:
    """`compiled`, for functions whose ``prange`` loops, and nothing else, run on all threads."""
    others = ("comprehension", "fusion", "inplace_binop", "numpy", "reduction", "setitem")
    return compiled(function, parallel={"prange": True, **dict.fromkeys(others, False)})


@functools.cache
def _folder() -> Path:
    digest = hashlib.sha256()
    here = Path(__file__).parent
    for folder in (here, here.parent, here.parent.parent):
        for source in sorted(folder.glob("*.py")):
            digest.update(source.read_bytes())
    return cache_directory() / "numba" / digest.hexdigest()[:16]
