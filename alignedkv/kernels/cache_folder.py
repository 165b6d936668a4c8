"""The folder of what is compiled and tuned once: where it is, and how its files are written.

Each file is written whole or not at all, by an atomic rename, so that processes share the folder
without a lock.
"""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path

from alignedkv.errors import CompileError

_log = logging.getLogger(__name__)

CACHE_VARIABLE = "ALIGNEDKV_CACHE_DIR"


def cache_directory() -> Path:
    """Where compiled kernels are kept: ``ALIGNEDKV_CACHE_DIR``, else the user's cache folder."""
    if given := os.environ.get(CACHE_VARIABLE):
        return Path(given)
    user = os.environ.get("XDG_CACHE_HOME")
    return (Path(user) if user else Path.home() / ".cache") / "alignedkv"


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    """Write files in order, each atomically; the folder that holds them in the end.

    Where ``folder`` cannot be written (read-only, full), that is a temporary one of this process,
    and the log says so.

    Raises
    ------
    CompileError
        If a temporary folder cannot be written either.
    """
    try:
        write_atomically(folder, files)
        return folder
    except OSError as error:
        _log.warning("the cache folder cannot be used: %s", error)
    try:
        temporary = Path(tempfile.mkdtemp(prefix="alignedkv-"))
        write_atomically(temporary, files)
    except OSError as error:
        raise CompileError(
            f"neither {folder.parent} nor a temporary folder can be written: {error}. "
            f"Make room, or set {CACHE_VARIABLE} to a folder that can be written"
        ) from error
    _log.warning("using %s instead; set %s to keep kernels", temporary, CACHE_VARIABLE)
    return temporary


def write_atomically(folder: Path, files: dict[str, bytes]) -> None:
    """Write files in order; of one that fails nothing is left.

    Raises
    ------
    OSError
        If one cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        with tempfile.NamedTemporaryFile(dir=folder, prefix=f".{name}.", delete=False) as part:
            try:
                part.write(content)
                part.close()
                Path(part.name).replace(folder / name)
            except BaseException:
                Path(part.name).unlink(missing_ok=True)
                raise
