"""The run record of a job as a file: what the checkpoint's manifest holds, and what it must not hold (timings)."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from .output import finite

if TYPE_CHECKING:
    from optgptq.quantize import QuantizeResult


def require_writable(path: Path, *, option: str = "--record") -> None:
    """Check before a long job that a file can be written.

    Raises:
        OutputError: the folder is missing or may not be written to, or the path is a folder.
    """
    from optgptq.errors import OutputError

    folder = path.parent
    if path.is_dir():
        found = "a folder"
    elif not folder.is_dir():
        found = f"no folder {folder}"
    elif not os.access(folder, os.W_OK):
        found = f"no permission to write to {folder}"
    else:
        return
    raise OutputError(
        f"{option} {path}",
        expected="a file in a folder that exists and may be written to",
        found=found,
        action="Create the folder, or name another file.",
    )


def write_record(path: Path, result: QuantizeResult) -> None:
    """Write the record beside its final name first, then rename it, so that no half of a record is ever seen."""
    record = {
        **result.record,
        "seconds": result.seconds,
        "peak_memory_bytes": result.peak_memory_bytes,
        "bits_per_weight": result.bits_per_weight,
        "warnings": list(result.warnings),
    }
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.write_text(json.dumps(finite(record), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
