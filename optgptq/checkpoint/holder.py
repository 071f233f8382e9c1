"""A lock for file systems that have none: a file that only one process can create, and that says who did.

What is left by a process that died is known again on the machine that it ran on: another boot, no process of that
number, or one that began at another time. Of a process on another machine nothing can be known.
"""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

from optgptq.errors import OutputError

HOLDER_FILE = "lock.holder"


def take(folder: Path) -> None:
    """Create the file in `folder`, in the place of one whose process is gone.

    Raises:
        OutputError: another process has it, or one of which nothing can be known.
        OSError: the file cannot be written; FileNotFoundError where the folder is gone.
    """
    path = folder / HOLDER_FILE
    while not _create(path):
        content = _content(path)
        if content is None:
            continue  # removed in between by the process that held it
        _require_gone(path, content)
        _move_away(path, content)


def release(folder: Path) -> None:
    """Remove the file, which this process holds."""
    (folder / HOLDER_FILE).unlink(missing_ok=True)


def _create(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except FileExistsError:
        return False
    try:
        os.write(descriptor, json.dumps(_myself()).encode())
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)
    return True


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _require_gone(path: Path, content: bytes) -> None:
    """Raise OutputError unless the process that wrote `content` is known to be gone."""
    try:
        holder = json.loads(content)
    except ValueError:
        holder = None
    if not isinstance(holder, dict):
        raise _held(path, "a file that does not say whose it is")
    here = _myself()
    if holder.get("host") != here["host"]:
        raise _held(path, f"one of process {holder.get('pid')} on machine {holder.get('host')}")
    if holder.get("boot") != here["boot"]:
        return
    number = holder.get("pid")
    # Numbers of processes mean nothing in another container.
    if holder.get("namespace") != here["namespace"] or not isinstance(number, int):
        raise _held(path, f"one of process {number} in another container of this machine")
    if _started(number) is not None and _started(number) == holder.get("started"):
        raise OutputError(
            str(path.parent),
            expected="one process that works on an output",
            found=f"another one that is at work on it, process {number}",
            action="Wait for it, stop it, or choose another output folder.",
        )


def _held(path: Path, found: str) -> OutputError:
    return OutputError(
        str(path),
        expected="no lock of another process, or one of a process that is known to be gone",
        found=found,
        action=f"The file system has no locks of its own. Once no job works on this output any more, remove {path} and "
        "run the same command again.",
    )


def _move_away(path: Path, content: bytes) -> None:
    """Remove the file of a process that is gone, unless another process was faster and the file is its own."""
    aside = path.with_name(f"{HOLDER_FILE}.{os.getpid()}")
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return
    if aside.read_bytes() != content:
        os.rename(aside, path)
        return
    aside.unlink()


def _myself() -> dict[str, Any]:
    return {
        "host": platform.node(),
        "boot": _text(Path("/proc/sys/kernel/random/boot_id")),
        "namespace": _namespace(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
    }


def _namespace() -> str | None:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def _started(number: int) -> str | None:
    """Return what tells a process from a later one of the same number; None where there is no such process.

    Source: proc_pid_stat(5), field 22, counted behind the name in parentheses. Without /proc it is told alone that
    the process is there.
    """
    text = _text(Path(f"/proc/{number}/stat"))
    if text is not None:
        return text.rpartition(")")[2].split()[19]
    if Path("/proc/self/stat").exists():
        return None
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        return "there"
    return "there"


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
