"""Local files read as text or as rows, each row with its place for messages."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from optgptq.errors import TextError

NumberedRow = tuple[str, Mapping[str, Any]]
PARQUET_ROWS_PER_BATCH = 256


def missing_column(where: str, column: str, columns: Sequence[str]) -> TextError:
    """Return the error for a column that is not there; it lists those that are."""
    return TextError(
        where,
        expected=f"a column {column!r}",
        found=f"the columns {', '.join(columns)}" if columns else "no columns",
        action="Set calibration.column to one of them (--column for eval).",
    )


def _unreadable(path: Path, error: OSError) -> TextError:
    return TextError(
        f"text {path}",
        expected="a file that can be read",
        # pyarrow puts a sentence of its own where the system's words belong.
        found=(os.strerror(error.errno) if error.errno else str(error)).lower(),
        action="Check the path and its permissions.",
    )


def _not_utf8(path: Path, offset: int, byte: int) -> TextError:
    return TextError(
        f"text {path}",
        expected="UTF-8",
        found=f"byte {byte:#04x} at offset {offset}",
        action=f"Convert the file, for example with `iconv -f latin1 -t utf-8 {path.name}`.",
    )


def read_text(path: Path) -> str:
    """Return the whole file as one text, line ends untouched.

    Raises:
        TextError: not readable, or not UTF-8 (the message gives the byte offset).
    """
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise _unreadable(path, error) from error
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error.start, error.object[error.start]) from error


def _lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Yield line number (from 1), byte offset and bytes of each line that is not blank."""
    offset = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, offset, line
                offset += len(line)
    except OSError as error:
        raise _unreadable(path, error) from error


def read_jsonl(path: Path) -> Iterator[NumberedRow]:
    """Yield the objects of a file with one JSON object per line; blank lines are passed over.

    Raises:
        TextError: not readable, not UTF-8, not JSON or not an object; the message gives the line.
    """
    for number, offset, line in _lines(path):
        where = f"text {path} line {number}"
        try:
            row = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise _not_utf8(path, offset + error.start, error.object[error.start]) from error
        except (ValueError, RecursionError) as error:  # the latter for thousands of brackets
            raise TextError(
                where, expected="one JSON object per line", found=str(error), action="Correct or remove this line."
            ) from error
        if not isinstance(row, dict):
            raise TextError(
                where,
                expected="one JSON object per line",
                found=f"a JSON {type(row).__name__}",
                action='Write each line as an object such as {"text": "..."}.',
            )
        yield where, row


def read_parquet(path: Path, column: str) -> Iterator[NumberedRow]:
    """Yield the rows of a Parquet file, reading `column` alone and a few rows at a time.

    Raises:
        TextError: not readable, not Parquet, or no such column.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if column not in names:
                raise missing_column(f"text {path}", column, names)
            number = 0
            for batch in file.iter_batches(batch_size=PARQUET_ROWS_PER_BATCH, columns=[column]):
                for row in batch.to_pylist():
                    number += 1
                    yield f"text {path} row {number}", row
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:  # the latter for names of columns and for text
        raise TextError(
            f"text {path}",
            expected="a Parquet file",
            found=next(iter(str(error).splitlines()), type(error).__name__),
            action="Check that the file is complete and of this type.",
        ) from error
    except OSError as error:
        raise _unreadable(path, error) from error
