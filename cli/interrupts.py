"""Ctrl-C and termination: the first request stops the work and lets it clean up, the third one gives up waiting."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from .output import write_note

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
    """Say, where the job that makes `output` is interrupted or runs out of memory or disk, what is kept of it.

    Raises:
        Interrupted: in the place of KeyboardInterrupt, where something is kept.
        CapacityError: with what is kept, where something is.
    """
    from optgptq.errors import CapacityError, Interrupted
    from optgptq.kept_work import kept_work

    try:
        yield
    except KeyboardInterrupt as error:
        kept = kept_work(output)
        if kept is None:
            raise
        raise Interrupted("optgptq", expected="to finish", found="a request to stop", action=kept) from error
    except CapacityError as error:
        kept = kept_work(output)
        if kept is None:
            raise
        raise CapacityError(
            error.where, expected=error.expected, found=error.found, action=f"{error.action} {kept}"
        ) from error
