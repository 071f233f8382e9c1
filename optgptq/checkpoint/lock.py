"""One process at a time for an output: a lock in the hidden folder beside it, where a job also keeps its journal."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from optgptq.checkpoint import holder
from optgptq.checkpoint.disk import disk_error
from optgptq.errors import OutputError

LOCK_FILE = "lock"
LOCK_FILES = (LOCK_FILE, holder.HOLDER_FILE)


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
    descriptor, has_locks = _acquire(folder)
    try:
        yield
    finally:
        # Removed while the lock is held: whoever opened the file before finds that it is not the folder's any more.
        with suppress(OSError):
            is_empty = set(os.listdir(folder)) <= set(LOCK_FILES)
            if is_empty:
                os.unlink(folder / LOCK_FILE)
            if not has_locks:
                holder.release(folder)
            if is_empty:
                os.rmdir(folder)
        os.close(descriptor)


def _acquire(folder: Path) -> tuple[int, bool]:
    """Return the open lock file, and whether the file system's own lock holds it."""
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
            has_locks = _lock(folder, descriptor)
            if not has_locks and not _take_holder(folder):
                os.close(descriptor)
                continue
            if _is_the_file(path, descriptor):
                return descriptor, has_locks
            if not has_locks:
                holder.release(folder)
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock(folder: Path, descriptor: int) -> bool:
    """Return whether the file system has locks, and this process the one of the file."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise OutputError(
            str(folder),
            expected="one process that works on an output",
            found="another one that is at work on it",
            action="Wait for it, stop it, or choose another output folder.",
        ) from error
    except OSError:
        return False
    return True


def _take_holder(folder: Path) -> bool:
    """Return whether the lock could be taken; False where the folder went meanwhile."""
    try:
        holder.take(folder)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise disk_error(folder, error) from error
    return True


def _is_the_file(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
