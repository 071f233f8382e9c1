"""Where words go: results to stdout, everything else to stderr."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import typer

_INTERRUPTED = 75


def write_result(text: str) -> None:
    """Write a result to stdout at once; where its reader left (`... | head -1`), end the command as interrupted."""
    write_piece(text if text.endswith("\n") else text + "\n")


def write_piece(text: str) -> None:
    """Write a part of a result to stdout as it is; see `write_result`."""
    try:
        sys.stdout.write(text if _can_write(text) else text.encode("ascii", "backslashreplace").decode())
        sys.stdout.flush()
    except BrokenPipeError:
        drop_stream("stdout")
        raise typer.Exit(_INTERRUPTED) from None


def write_json(record: Mapping[str, Any]) -> None:
    """Write one JSON object to stdout, in the order of its keys; numbers that are not finite become null."""
    from optgptq.reports.wording import finite

    plain = finite(record)
    text = json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False)
    write_result(text if _can_write(text) else json.dumps(plain, indent=2, allow_nan=False))


def _can_write(text: str) -> bool:
    """Return whether stdout has a spelling for every character: half a surrogate pair in a name has none anywhere."""
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def write_note(text: str) -> None:
    """Write a line for people to stderr; a closed stderr is not worth stopping for."""
    try:
        sys.stderr.write(text if text.endswith("\n") else text + "\n")
        sys.stderr.flush()
    except BrokenPipeError:
        drop_stream("stderr")


def drop_stream(name: str) -> None:
    """Point `stdout` or `stderr` at nothing after its reader went away, so that the flush at exit cannot fail again."""
    descriptor = {"stdout": 1, "stderr": 2}[name]
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, descriptor)
    os.close(nothing)


def table(rows: Sequence[Sequence[str]], *, header: Sequence[str] = ()) -> str:
    """Return rows as aligned columns of plain text; a column whose cells are all numbers is set to the right."""
    lines = [list(header), *map(list, rows)] if header else [list(row) for row in rows]
    if not lines:
        return ""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    numeric = [all(_is_number(row[column]) for row in rows) for column in range(len(widths))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in lines
    )


def _is_number(cell: str) -> bool:
    return cell in ("", "-") or cell.removesuffix("%").replace(",", "").replace(".", "", 1).lstrip("+-").isdigit()


def human_bytes(count: int | float) -> str:
    """Return a number of bytes with a binary unit: `1.5 GiB`."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def human_seconds(seconds: float) -> str:
    """Return a duration: `0.8 s` under ten seconds, `12 s` under a minute, then `3:05` or `1:02:03`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
