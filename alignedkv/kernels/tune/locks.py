"""One process at a time: an advisory lock on a file beside the one that is to be changed."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alignedkv.errors import TuningError

#: Seconds to wait for another process that works on the same file.
LOCK_TIMEOUT_S = 30.0


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold ``path``'s lock; the operating system frees it when its holder dies.

    Raises
    ------
    TuningError
        If another process holds it too long.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(path.name + ".lock").open("w") as lock:
        deadline = time.monotonic() + LOCK_TIMEOUT_S
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TuningError(
                        f"another process has held {lock.name} for {LOCK_TIMEOUT_S} s: stop it, "
                        "or wait for it, then try again"
                    ) from None
                time.sleep(0.02)
        yield
