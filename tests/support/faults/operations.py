"""What a command does to the files below one folder, operation by operation."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Change(StrEnum):
    """Kinds of operations that change a disk, and the one that makes changes last."""

    CREATE = "create"
    WRITE = "write"
    TRUNCATE = "truncate"
    FSYNC = "fsync"
    MKDIR = "mkdir"
    RENAME = "rename"
    EXCHANGE = "exchange"
    LINK = "link"
    UNLINK = "unlink"
    RMDIR = "rmdir"


GROWING = frozenset({Change.CREATE, Change.WRITE, Change.TRUNCATE, Change.MKDIR, Change.LINK})


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation that was done.

    Attributes:
        change: its kind.
        path: relative to the watched folder; "" is that folder.
        other: the second name of a rename, an exchange or a link.
        offset: where bytes were written, or the new length of a truncated file.
        data: bytes that were written.
    """

    change: Change
    path: str
    other: str = ""
    offset: int = 0
    data: bytes = b""


class Fault(StrEnum):
    """What goes wrong at an operation.

    NONE nothing; FULL no room from there on until something is removed, which nothing here waits for; DENIED this one
    is not allowed; READ_ONLY nothing is allowed from there on; INPUT_OUTPUT the device fails at it; TORN half of a
    write is done, then the process dies; BEFORE and AFTER it dies right before or after; TERMINATED and INTERRUPTED
    the process is asked to stop; SHORT every write from there on takes a byte or the half of what it was given.
    """

    NONE = "none"
    FULL = "full"
    DENIED = "denied"
    READ_ONLY = "read only"
    INPUT_OUTPUT = "input output"
    TORN = "torn"
    BEFORE = "before"
    AFTER = "after"
    TERMINATED = "terminated"
    INTERRUPTED = "interrupted"
    SHORT = "short"


KILLED = 137
KILLS = frozenset({Fault.TORN, Fault.BEFORE, Fault.AFTER})
