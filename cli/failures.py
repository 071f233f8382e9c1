"""How a command ends: every way to fail becomes an exit code and a four-part message."""

from __future__ import annotations

import errno
import json
import sys
import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING

import typer

from .output import write_note

if TYPE_CHECKING:
    from optgptq.errors import OptGPTQError

# Only optgptq.errors and optgptq.memory are imported here, inside functions: they load no torch.

REPORT_ADVICE = "This is a bug in optgptq: please report it with the trace above and the command that caused it."


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """What is told about a failed command: exit code, kind, and the four parts."""

    exit_code: int
    kind: str
    where: str
    expected: str
    found: str
    action: str


def usage_failure(error: Exception) -> Failure:
    """Return the failure for a command line that typer refused; `error` is one of its `UsageError`s."""
    # typer carries click inside since 0.26, so the fields of its errors are read from the instance.
    context = error.ctx  # type: ignore[attr-defined]
    command = context.command_path if context is not None else "optgptq"
    return Failure(
        exit_code=2,
        kind="UsageError",
        where=command,
        expected="a command line that the help describes",
        found=error.format_message(),  # type: ignore[attr-defined]
        action=f"Run `{command} --help`.",
    )


def failure_of(error: BaseException) -> Failure:
    """Return exit code and message for any exception that reaches the border of the program."""
    from optgptq.errors import ExitCode, OptGPTQError
    from optgptq.memory import is_out_of_memory

    if isinstance(error, OptGPTQError):
        return _own_failure(error)
    if isinstance(error, KeyboardInterrupt):
        return Failure(
            exit_code=ExitCode.INTERRUPTED,
            kind="Interrupted",
            where="optgptq",
            expected="to finish",
            found="a request to stop",
            action="Nothing half-written was left. Run the same command again to start over.",
        )
    if is_out_of_memory(error):
        return Failure(
            exit_code=ExitCode.CAPACITY,
            kind="CapacityError",
            where="memory",
            expected="enough free memory",
            found=_first_line(error),
            action="Close other programs, use fewer or shorter calibration windows, or a machine with more memory.",
        )
    if isinstance(error, OSError):
        failure = _system_failure(error)
        if failure is not None:
            return failure
    return Failure(
        exit_code=ExitCode.BUG,
        kind=type(error).__name__,
        where="optgptq",
        expected="no internal error",
        found=_first_line(error),
        action=REPORT_ADVICE,
    )


def _own_failure(error: OptGPTQError) -> Failure:
    return Failure(
        exit_code=error.exit_code,
        kind=type(error).__name__,
        where=error.where,
        expected=error.expected,
        found=error.found,
        action=error.action,
    )


def _system_failure(error: OSError) -> Failure | None:
    """Return the failure for errors of the machine that no command foresaw; None for all others."""
    from optgptq.errors import ExitCode

    where = str(error.filename) if error.filename is not None else "file system"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Failure(
            exit_code=ExitCode.CAPACITY,
            kind="CapacityError",
            where=where,
            expected="free disk space",
            found=_first_line(error),
            action="Free disk space, or write to another disk.",
        )
    if error.errno == errno.EIO:
        return Failure(
            exit_code=ExitCode.INPUT,
            kind="OutputError",
            where=where,
            expected="a disk that reads and writes",
            found=_first_line(error),
            action="Check the disk and its connection, then run the same command again.",
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return Failure(
            exit_code=ExitCode.INPUT,
            kind="OutputError",
            where=where,
            expected="permission to use it",
            found=_first_line(error),
            action="Change its permissions, or name another path.",
        )
    return None


def failure_record(error: OptGPTQError) -> dict[str, str | int]:
    """Return an error of one part of a job as JSON has it."""
    return _as_record(_own_failure(error))


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def report(error: BaseException, failure: Failure, *, as_json: bool) -> None:
    """Write a failure to stderr: one JSON object on one line, or four lines; a bug comes with its trace."""
    from optgptq.errors import ExitCode

    if failure.exit_code == ExitCode.BUG:
        traceback.print_exception(error, file=sys.stderr)
    if as_json:
        write_note(json.dumps({"error": _as_record(failure)}, ensure_ascii=False))
        return
    heading = "interrupted" if failure.exit_code == ExitCode.INTERRUPTED else "error"
    styled = typer.style(f"{heading}:", fg="red", bold=True) if sys.stderr.isatty() else f"{heading}:"
    write_note(
        f"{styled} {_one_line(failure.where)}\n"
        f"  expected: {_one_line(failure.expected)}\n"
        f"  found:    {_one_line(failure.found)}\n"
        f"  to do:    {_one_line(failure.action)}"
    )


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _as_record(failure: Failure) -> dict[str, str | int]:
    return {
        "kind": failure.kind,
        "exit_code": int(failure.exit_code),
        "where": failure.where,
        "expected": failure.expected,
        "found": failure.found,
        "action": failure.action,
    }
