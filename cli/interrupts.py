"""Ctrl-C and termination: the first request stops the work and lets it clean up, the third one gives up waiting."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from .failures import failure_of
from .output import write_note

if TYPE_CHECKING:
    from optgptq.errors import OptGPTQError

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def stop_on_request() -> Iterator[None]:
    """Turn SIGINT, SIGTERM and SIGHUP into one KeyboardInterrupt in the main thread while the block runs.

    A second signal is only answered: an impatient key press must not stop the removal of what is half-written.
    The third one interrupts again.
    """
    requests = 0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal requests
        requests += 1
        if requests == 2:
            write_note("optgptq is removing what it has not finished; once more to stop at once")
            return
        raise KeyboardInterrupt(signal.Signals(number).name)

    previous = {number: signal.signal(number, handle) for number in _STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def tells_what_is_kept(output: Path) -> Iterator[None]:
    """Say, where the job that makes `output` is interrupted, or fails for want of memory or of a disk, what is kept.

    Raises:
        Interrupted: in the place of KeyboardInterrupt, where something is kept.
        CapacityError: in the place of the errors of allocators, where something is kept.
        OptGPTQError: of its kind, with what is kept, where something is and the same command can go on.
    """
    from optgptq.errors import CapacityError, Interrupted, OptGPTQError
    from optgptq.kept_work import kept_work
    from optgptq.memory import is_out_of_memory

    try:
        yield
    except KeyboardInterrupt as error:
        kept = kept_work(output)
        if kept is None:
            raise
        raise Interrupted("optgptq", expected="to finish", found="a request to stop", action=kept) from error
    except OptGPTQError as error:
        kept = kept_work(output) if _can_go_on(error, output) else None
        if kept is None:
            raise
        raise type(error)(
            error.where, expected=error.expected, found=error.found, action=f"{error.action} {kept}"
        ) from error
    except (MemoryError, RuntimeError) as error:
        kept = kept_work(output) if is_out_of_memory(error) else None
        if kept is None:
            raise
        told = failure_of(error)
        raise CapacityError(
            told.where, expected=told.expected, found=told.found, action=f"{told.action} {kept}"
        ) from error


def _can_go_on(error: OptGPTQError, output: Path) -> bool:
    """Say whether the machine failed, or what was written; every other command would fail again the same way."""
    from optgptq.checkpoint.publish import partial_folder
    from optgptq.errors import CapacityError, FormatError

    is_machine = isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, BlockingIOError)
    # Written, read back and found to be something else: nothing was published.
    is_torn = isinstance(error, FormatError) and partial_folder(output).name in error.where
    return is_machine or is_torn or isinstance(error, CapacityError)
