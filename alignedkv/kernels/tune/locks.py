"""One process at a time: an advisory lock on a file beside the one that is to be changed."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from alignedkv.errors import TuningError

#: Seconds to wait for another process that works on the same file.
LOCK_TIMEOUT_S = 30.0


class FileLock:
    """A lock that the operating system frees when its holder dies.

    Has the two methods that Optuna wants of a journal's lock, whose own one outlives its holder.

    Parameters
    ----------
    path : Path
        The lock file; it stays behind, empty.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[str] | None = None

    def acquire(self) -> bool:
        """Wait for the lock and take it.

        Raises
        ------
        TuningError
            If another process holds it too long.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        file = self._path.open("w")
        deadline = time.monotonic() + LOCK_TIMEOUT_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    file.close()
                    raise TuningError(
                        f"another process has held {self._path} for {LOCK_TIMEOUT_S:.0f} s: stop "
                        "it, or wait for it, then try again"
                    ) from None
                time.sleep(0.005)
        self._file = file
        return True

    def release(self) -> None:
        """Give the lock back."""
        if self._file is not None:
            self._file.close()
            self._file = None


@contextmanager
def exclusive(path: Path, purpose: str = "lock") -> Iterator[None]:
    """Hold the lock of ``path`` for one purpose; other purposes do not wait.

    Raises
    ------
    TuningError
        If another process holds it too long.
    """
    lock = FileLock(path.with_name(f"{path.name}.{purpose}"))
    lock.acquire()
    try:
        yield
    finally:
        lock.release()
