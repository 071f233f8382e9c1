"""One process at a time for an output: a lock in the hidden folder beside it, where a job also keeps its journal."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from optgptq.checkpoint.disk import disk_error
from optgptq.errors import OutputError

LOCK_FILE = "lock"

_logger = logging.getLogger(__name__)


def work_folder(output: Path) -> Path:
    """Return the folder beside `output` that belongs to whoever makes it."""
    return output.with_name(f".{output.name}.work")


@contextmanager
def hold_lock(folder: Path) -> Iterator[None]:
    """Make `folder` where there is none and hold the lock in it; with nothing else in it, it is removed at the end.

    Raises:
        OutputError: another process holds it, or the folder cannot be made.
        CapacityError: the disk is full.
    """
    descriptor = _acquire(folder)
    try:
        yield
    finally:
        # Removed while the lock is held: whoever opened the file before finds that it is not the folder's any more.
        with suppress(OSError):
            if os.listdir(folder) == [LOCK_FILE]:
                os.unlink(folder / LOCK_FILE)
                os.rmdir(folder)
        os.close(descriptor)


def _acquire(folder: Path) -> int:
    path = folder / LOCK_FILE
    while True:
        try:
            folder.mkdir(exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            if isinstance(error, FileNotFoundError) and folder.parent.is_dir():
                continue  # removed in between by the process that held it
            raise disk_error(folder, error) from error
        try:
            _lock(folder, descriptor)
            if _is_the_file(path, descriptor):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock(folder: Path, descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise OutputError(
            str(folder),
            expected="one process that works on an output",
            found="another one that is at work on it",
            action="Wait for it, stop it, or choose another output folder.",
        ) from error
    except OSError as error:
        _logger.warning("%s: the file system has no locks (%s); nothing keeps a second job away", folder, error)


def _is_the_file(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
