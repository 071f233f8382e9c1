"""Files that are there whole or not at all: a text beside its final name first, then renamed."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from optgptq.checkpoint.disk import disk_error, force_to_disk
from optgptq.errors import OutputError


def write_whole(path: Path, text: str) -> None:
    """Write `text` as UTF-8 to `path`, where the old file stays until the new one is on the disk.

    Raises:
        CapacityError: the disk is full.
        OutputError: the file cannot be written.
    """
    # One name for all processes: what one that was killed has left is written over by the next.
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as stream:
            stream.write(text.encode("utf-8", errors="replace"))
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
        force_to_disk(path.parent)
    except OSError as error:
        raise disk_error(path, error) from error
    finally:
        # The next one writes over what cannot be removed.
        with suppress(OSError):
            partial.unlink()


def require_outside(path: Path, checkpoint: Path) -> None:
    """Check that a file would not come to lie in a checkpoint.

    Raises:
        OutputError: it would, and `verify` would find a file that the manifest does not list.
    """
    if path.resolve().is_relative_to(checkpoint.resolve()):
        raise OutputError(
            str(path),
            expected="a file outside the checkpoint, whose manifest lists every file in it",
            found=f"one inside {checkpoint.name}",
            action="Name a file beside the checkpoint.",
        )
