"""Runs one input and says how it ended: done, refused as it should be, or a crash, a hang, or a file outside."""

from __future__ import annotations

import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from optgptq.errors import OptGPTQError

# Of the processor, so that other work on the machine is no hang; and a limit for what only waits.
SECONDS_PER_INPUT = 5.0
WAITING_SECONDS = 120.0
EXTRA_MEMORY_BYTES = 1 << 30
_EXIT_CODES = (2, 3, 4, 5, 6)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How an input ended.

    Attributes:
        kind: `done`, `refused`, or one of the faults `crash`, `hang`, `outside`, `bad message`.
        detail: exit code of a refusal; what went wrong otherwise.
        place: where a fault was raised, so that equal faults can be told apart from others.
    """

    kind: str
    detail: str = ""
    place: str = ""

    @property
    def is_fault(self) -> bool:
        return self.kind not in ("done", "refused")


class _TimeLimit(BaseException):
    """Not an Exception: no handler of the code under test may swallow it."""


@dataclass(slots=True)
class Watch:
    """Files that are opened, listed, written or removed outside the allowed folders, seen by an audit hook.

    A hook cannot be taken away again, so it asks whether a watch is on.
    """

    allowed: tuple[str, ...] = ()
    is_on: bool = False
    outside: list[str] = field(default_factory=list)

    def hook(self, event: str, arguments: tuple[object, ...]) -> None:
        if not self.is_on or event not in _EVENTS:
            return
        if event in _NEVER:
            self.outside.append(f"{event} {str(arguments)[:200]}")
            return
        path = arguments[0]
        if isinstance(path, bytes):
            path = os.fsdecode(path)
        if not isinstance(path, str) or "\0" in path:  # a descriptor that was opened before, or a path that fails
            return
        self.is_on = False
        try:
            target = os.path.realpath(path)
        finally:
            self.is_on = True
        if not (target + os.sep).startswith(self.allowed):
            self.outside.append(f"{event} {target}")


_NEVER = frozenset({"subprocess.Popen", "os.system", "os.exec", "os.fork", "os.posix_spawn", "socket.connect"})
_PATHS = ("open", "os.listdir", "os.scandir", "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.truncate")
_EVENTS = _NEVER | frozenset((*_PATHS, "os.symlink", "os.link", "os.chmod", "shutil.copyfile", "shutil.rmtree"))


def start_watch() -> Watch:
    """Return a watch, whose hook stays in this process for good; files of interpreter and packages are allowed."""
    root = Path(__file__).resolve().parents[3]
    places = [*{os.path.realpath(place) for place in (sys.prefix, sys.base_prefix, *sys.path) if place}]
    places += [str(root / "optgptq"), str(root / "cli"), str(root / "configs")]
    watch = Watch(allowed=("/proc/", "/sys/", "/dev/null", "/dev/urandom", "/usr/", *places))
    sys.addaudithook(watch.hook)
    return watch


def run_guarded(call: Callable[[], object], folder: Path, watch: Watch) -> Outcome:
    """Run `call`, which may touch files of `folder` only, and say how it ended."""
    before = watch.allowed
    watch.allowed = (*before, str(folder.resolve()) + os.sep)
    watch.outside.clear()
    try:
        outcome = _timed(call, watch)
    finally:
        watch.is_on = False
        watch.allowed = before
    if watch.outside:
        return Outcome(kind="outside", detail=watch.outside[0], place=watch.outside[0].split()[0])
    return outcome


def _timed(call: Callable[[], object], watch: Watch) -> Outcome:
    def ring(number: int, frame: FrameType | None) -> None:
        raise _TimeLimit

    previous = {number: signal.signal(number, ring) for number in (signal.SIGPROF, signal.SIGALRM)}
    signal.setitimer(signal.ITIMER_PROF, SECONDS_PER_INPUT)
    signal.setitimer(signal.ITIMER_REAL, WAITING_SECONDS)
    try:
        watch.is_on = True
        call()
    except OptGPTQError as error:
        watch.is_on = False
        return _refusal(error)
    except _TimeLimit as error:
        watch.is_on = False
        return Outcome(kind="hang", detail=f"more than {SECONDS_PER_INPUT:.0f} s", place=_place(error))
    except BaseException as error:  # panics of Rust are not of the kind Exception
        watch.is_on = False
        if isinstance(error, KeyboardInterrupt):
            raise
        return Outcome(kind="crash", detail=f"{type(error).__name__}: {str(error)[:200]}", place=_place(error))
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in previous.items():
            signal.signal(number, handler)
        watch.is_on = False
    return Outcome(kind="done")


def _refusal(error: OptGPTQError) -> Outcome:
    parts = (error.where, error.expected, error.found, error.action)
    place = _place(error)
    if int(error.exit_code) not in _EXIT_CODES:
        return Outcome(kind="bad message", detail=f"exit code {int(error.exit_code)}", place=place)
    if not all(isinstance(part, str) and part.strip() for part in parts):
        return Outcome(kind="bad message", detail=f"an empty part: {parts}"[:300], place=place)
    if sum(map(len, parts)) > 20_000:
        return Outcome(kind="bad message", detail=f"{sum(map(len, parts))} characters", place=place)
    return Outcome(kind="refused", detail=str(int(error.exit_code)))


def _place(error: BaseException) -> str:
    """Return the innermost line of this project that the error passed."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "/optgptq/" in frame.filename or "/cli/" in frame.filename]
    return f"{Path(own[-1].filename).name}:{own[-1].lineno} {own[-1].name}" if own else "outside the package"


@contextmanager
def memory_limit(extra_bytes: int = EXTRA_MEMORY_BYTES) -> Iterator[None]:
    """Let this process have no more than `extra_bytes` of addresses beyond those it has now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as stream:
        used = int(stream.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + extra_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
