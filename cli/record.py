"""The run record of a job as a file: what the checkpoint's manifest holds, and what it must not hold (timings)."""

from __future__ import annotations

import os
from pathlib import Path


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
