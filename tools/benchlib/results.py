"""Files of results: what was run, where and with which versions, and rows as they come."""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path
from typing import Any

from benchlib.problem import DecodeShape

__all__ = ["report_failure", "run_facts", "write"]


def run_facts() -> dict[str, Any]:
    """The command line and the versions of what it ran on."""
    import cupy
    import torch

    return {
        "command": " ".join(["python", *sys.argv]),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cupy": cupy.__version__,
            "driver": str(cupy.cuda.runtime.driverGetVersion()),
        },
    }


def report_failure(
    content: dict[str, Any], shape: DecodeShape, data: str, error: Exception
) -> None:
    """Print why a case has no row, and keep it in ``content["failures"]``."""
    line = f"{shape}, {data}: {type(error).__name__}: {error}"
    print(f"FAILED {line}", flush=True)
    content["failures"].append(line)


def write(path: Path | None, content: dict[str, Any]) -> None:
    """Write the file whole, so that a reader never meets half of it; without a path do nothing."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)
