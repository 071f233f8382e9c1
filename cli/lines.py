"""A file of JSON lines that grows while a command runs, and never ends with half a line."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class LineWriter:
    """Writes each record as a line, at once."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)
        self._num_bytes = 0
        self.num_lines = 0

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a line; where that fails or is interrupted, what was written of it is taken back."""
        from optgptq.reports.wording import finite

        line = json.dumps(finite(record), ensure_ascii=False, allow_nan=False).encode() + b"\n"
        written = 0
        try:
            while written < len(line):
                written += os.write(self._descriptor, line[written:])
        finally:
            if written == len(line):
                self._num_bytes += written
                self.num_lines += 1
            elif self._is_file:
                os.ftruncate(self._descriptor, self._num_bytes)


def require_new(path: Path, *, option: str, overwrite: bool) -> None:
    """Check before a long job that nothing is lost by writing a file.

    Raises:
        OutputError: there is one, and it may not be overwritten.
    """
    from optgptq.errors import OutputError

    if path.is_file() and not overwrite:
        raise OutputError(
            f"{option} {path}",
            expected="a file that does not exist",
            found="one that does",
            action="Name another file, or add --overwrite.",
        )


@contextmanager
def line_writer(path: Path | None) -> Iterator[LineWriter | None]:
    """Yield a writer to a file, which is made empty; None without a path."""
    if path is None:
        yield None
        return
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o666)
    try:
        yield LineWriter(descriptor)
    finally:
        os.close(descriptor)
