"""The system calls that change a disk, watched below one folder, with one fault among them.

They are replaced in this process for good: meant for one that was forked for a single command.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.faults.operations import GROWING, KILLED, Change, Fault, Operation

from optgptq.checkpoint import publish

_FLAGS = {"r": 0, "w": os.O_CREAT | os.O_TRUNC, "x": os.O_CREAT | os.O_EXCL, "a": os.O_CREAT | os.O_APPEND}
_SIGNALS = {Fault.TERMINATED: signal.SIGTERM, Fault.INTERRUPTED: signal.SIGINT}


class WatchedDisk:
    """The folder `root`: its operations in order, and a fault at operation `at` (from 0).

    Attributes:
        log: operations that were done.
    """

    def __init__(self, root: Path, fault: Fault, at: int) -> None:
        self.log: list[Operation] = []
        self._root = os.path.realpath(root)
        self._fault = fault
        self._at = at
        self._count = 0
        self._lock = threading.RLock()

    def relative(self, path: Any, dir_fd: int | None = None) -> str | None:
        """Return a path (or an open descriptor) relative to the root; None where it lies elsewhere."""
        if isinstance(path, int):
            name = os.readlink(f"/proc/self/fd/{path}")
            if name.endswith(" (deleted)"):
                # A file without a name: nothing of it outlives the process.
                return None
        else:
            base = os.getcwd() if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}")
            name = os.path.normpath(os.path.join(base, os.fsdecode(path)))
        if name == self._root:
            return ""
        return name.removeprefix(self._root + "/") if name.startswith(self._root + "/") else None

    def do(self, operation: Operation, perform: Callable[[], Any], torn: Callable[[], Any] | None = None) -> Any:
        """Perform an operation, or what the fault makes of it; `torn` does the half of it."""
        with self._lock:
            number, self._count = self._count, self._count + 1
            if number == self._at:
                self._die(operation, perform, torn)
            error = self._error(operation.change, number)
            if error is not None:
                raise OSError(error, os.strerror(error), operation.path, None, operation.other or None)
            try:
                result = perform()
            except OSError:
                self._count -= 1  # it has changed nothing, and is not in the log
                raise
            self.log.append(operation)
        if number == self._at and self._fault in _SIGNALS:
            os.kill(os.getpid(), _SIGNALS[self._fault])
        return result

    def length(self, size: int) -> int:
        """Return how many bytes of a write are done at once."""
        is_short = self._fault is Fault.SHORT and self._count >= self._at
        return max(1, size // 2) if is_short and size else size

    def _die(self, operation: Operation, perform: Callable[[], Any], torn: Callable[[], Any] | None) -> None:
        match self._fault:
            case Fault.BEFORE:
                os._exit(KILLED)
            case Fault.AFTER:
                perform()
                os._exit(KILLED)
            case Fault.TORN:
                if torn is not None:
                    torn()
                os._exit(KILLED)
            case _:
                return

    def _error(self, change: Change, number: int) -> int | None:
        match self._fault:
            case Fault.FULL if number >= self._at and change in GROWING:
                return errno.ENOSPC
            case Fault.DENIED if number == self._at:
                return errno.EACCES
            case Fault.READ_ONLY if number >= self._at:
                return errno.EROFS
            case Fault.INPUT_OUTPUT if number == self._at:
                return errno.EIO
            case _:
                return None


def watch(root: Path, fault: Fault, at: int) -> WatchedDisk:
    """Replace the system calls of this process by watched ones and return what they write to."""
    disk = WatchedDisk(root, fault, at)
    _watch_names(disk)
    _watch_descriptors(disk)
    _watch_open(disk)
    # Copies inside the kernel pass by every write.
    shutil._USE_CP_SENDFILE = False  # type: ignore[attr-defined]
    return disk


def _watch_names(disk: WatchedDisk) -> None:
    def one(change: Change, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(path: Any, *values: Any, dir_fd: int | None = None, **named: Any) -> Any:
            name = disk.relative(path, dir_fd)
            if name is None:
                return call(path, *values, dir_fd=dir_fd, **named)
            return disk.do(Operation(change, name), lambda: call(path, *values, dir_fd=dir_fd, **named))

        return watched

    def two(change: Change, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(first: Any, second: Any, **named: Any) -> Any:
            names = disk.relative(first), disk.relative(second)
            if names[0] is None or names[1] is None:
                return call(first, second, **named)
            return disk.do(Operation(change, names[0], names[1]), lambda: call(first, second, **named))

        return watched

    os.mkdir, os.rmdir = one(Change.MKDIR, os.mkdir), one(Change.RMDIR, os.rmdir)
    os.unlink = os.remove = one(Change.UNLINK, os.unlink)
    os.rename, os.replace = two(Change.RENAME, os.rename), two(Change.RENAME, os.replace)
    os.link = two(Change.LINK, os.link)
    publish.exchange = two(Change.EXCHANGE, publish.exchange)  # type: ignore[attr-defined]


def _watch_descriptors(disk: WatchedDisk) -> None:
    write, pwrite, fsync, ftruncate = os.write, os.pwrite, os.fsync, os.ftruncate

    def watched_pwrite(descriptor: int, data: Any, offset: int) -> int:
        name = disk.relative(descriptor)
        if name is None:
            return pwrite(descriptor, data, offset)
        part = memoryview(data).cast("B")
        part = part[: disk.length(len(part))]
        operation = Operation(Change.WRITE, name, offset=offset, data=bytes(part))
        return disk.do(
            operation,
            lambda: pwrite(descriptor, part, offset),
            lambda: pwrite(descriptor, part[: len(part) // 2], offset),
        )

    def watched_write(descriptor: int, data: Any) -> int:
        if disk.relative(descriptor) is None:
            return write(descriptor, data)
        done = watched_pwrite(descriptor, data, os.lseek(descriptor, 0, os.SEEK_CUR))
        os.lseek(descriptor, done, os.SEEK_CUR)
        return done

    def watched_fsync(descriptor: Any) -> None:
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        name = disk.relative(number)
        if name is None:
            fsync(number)
        else:
            # The model of the disk decides what lasts; to wait for the real one would prove nothing.
            disk.do(Operation(Change.FSYNC, name), lambda: None)

    def watched_ftruncate(descriptor: int, length: int) -> None:
        name = disk.relative(descriptor)
        if name is None:
            ftruncate(descriptor, length)
        else:
            disk.do(Operation(Change.TRUNCATE, name, offset=length), lambda: ftruncate(descriptor, length))

    os.write, os.pwrite = watched_write, watched_pwrite
    os.fsync = os.fdatasync = watched_fsync
    os.ftruncate = watched_ftruncate


def _watch_open(disk: WatchedDisk) -> None:
    system_open, stream_open = os.open, io.open

    def watched_open(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        name = disk.relative(path, dir_fd)
        call = lambda: system_open(path, flags, mode, dir_fd=dir_fd)  # noqa: E731
        if name is None or flags & os.O_TMPFILE == os.O_TMPFILE:
            return call()
        exists = os.path.lexists(os.path.join(disk._root, name))
        if flags & os.O_TRUNC and exists:
            return disk.do(Operation(Change.TRUNCATE, name), call)
        if flags & os.O_CREAT and not exists:
            return disk.do(Operation(Change.CREATE, name), call)
        return call()

    def watched_stream(file: Any, mode: str = "r", buffering: int = -1, *values: Any, **named: Any) -> Any:
        is_read = not set(mode) & set("wxa+")
        if is_read or isinstance(file, int) or named.get("opener") is not None or disk.relative(file) is None:
            return stream_open(file, mode, buffering, *values, **named)
        access = os.O_RDWR if "+" in mode else os.O_WRONLY
        kind = next(letter for letter in mode if letter in _FLAGS)
        raw = _WatchedFile(
            watched_open(file, access | _FLAGS[kind] | os.O_CLOEXEC, 0o666), "r+" if "+" in mode else "w"
        )
        if "a" in mode:
            os.lseek(raw.fileno(), 0, os.SEEK_END)
        binary: Any = raw
        if buffering != 0:
            binary = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return binary if "b" in mode else io.TextIOWrapper(binary, *values, **named)

    os.open = watched_open
    io.open = watched_stream  # type: ignore[assignment]
    builtins.open = watched_stream  # type: ignore[assignment]


class _WatchedFile(io.FileIO):
    """A file whose writes go through `os.write` and `os.ftruncate`."""

    def write(self, data: Any) -> int:
        return os.write(self.fileno(), data)

    def truncate(self, size: int | None = None) -> int:
        length = self.tell() if size is None else size
        os.ftruncate(self.fileno(), length)
        return length
