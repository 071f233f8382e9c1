"""Disk trouble, told apart: full, or not allowed."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from optgptq.errors import CapacityError, OptGPTQError, OutputError

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def disk_error(path: Path, error: OSError) -> OptGPTQError:
    """Return the error to raise for a failed write: CapacityError for a full disk, else OutputError."""
    if error.errno in FULL_DISK:
        return CapacityError(
            str(path),
            expected="room on the disk",
            found=error.strerror or str(error),
            action="Free space on that disk; nothing half-written was left.",
        )
    return OutputError(
        str(path),
        expected="a place that can be written",
        found=error.strerror or str(error),
        action="Choose another output folder or change its permissions.",
    )


def force_to_disk(path: Path) -> None:
    """Make the content of a file, or the names in a folder, last through a power cut; OSError where that fails."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_disk_space(folder: Path, num_bytes: int) -> None:
    """Raise CapacityError when the disk of `folder` has less than `num_bytes` free."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise CapacityError(
            str(folder),
            expected=f"{num_bytes / 1e6:,.1f} MB free for the output",
            found=f"{free / 1e6:,.1f} MB",
            action="Free space and run the same command again. An output folder on another disk does as well, but "
            "what an interrupted job has kept stays beside this one.",
        )
