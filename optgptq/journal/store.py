"""The journal of a job: a hidden folder beside its output, one file for each finished step.

`job.json` says which job the steps belong to. It is the first file that is written and the first that is removed:
without it every other file is rubbish. A lock keeps two processes from working on one output.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, Self

import torch

from optgptq.checkpoint.disk import disk_error
from optgptq.errors import OutputError
from optgptq.journal.entry import SUFFIX, Entry, read_entry, write_entry

KEY_FILE = "job.json"
_LOCK_FILE = "lock"


class Steps(Protocol):
    """Finished steps by name: what a part of a job needs of the journal."""

    def get(self, name: str) -> Entry | None:
        """Return what a finished step left; None where it has not been finished."""

    def put(self, name: str, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
        """Keep a finished step; CapacityError or OutputError where it cannot be written."""

    def sync(self) -> None:
        """Force everything that was put to disk: from here on a power cut does not take it."""

    def scope(self, prefix: str) -> Steps:
        """Return the steps whose names begin with `prefix` and a dot, under the rest of their names."""


class NothingKept:
    """Steps of a job without a journal: nothing is ever known, and nothing is kept."""

    def get(self, name: str) -> Entry | None:
        del name
        return None

    def put(self, name: str, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
        del name, tensors, facts

    def sync(self) -> None:
        return

    def scope(self, prefix: str) -> Self:
        del prefix
        return self


class Journal:
    """Steps kept in folder `path`.

    Attributes:
        path: the folder.
        key: what decides the bytes of the job that the steps belong to; None before `begin`.
    """

    def __init__(self, path: Path, key: Mapping[str, Any] | None) -> None:
        self.path = path
        self.key = key
        self._unsynced: set[Path] = set()

    def begin(self, key: Mapping[str, Any]) -> None:
        """Drop every step and say which job the next ones belong to."""
        try:
            self._drop()
            partial = self.path / f"{KEY_FILE}.partial"
            partial.write_text(json.dumps(key, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            _sync(partial)
            os.replace(partial, self.path / KEY_FILE)
            _sync(self.path)
        except OSError as error:
            raise disk_error(self.path, error) from error
        self.key = key

    def get(self, name: str) -> Entry | None:
        return read_entry(self._file(name))

    def put(self, name: str, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
        path = self._file(name)
        write_entry(path, Entry(tensors, facts))
        self._unsynced.add(path)

    def forget(self, name: str) -> None:
        """Drop a step, if it is there."""
        path = self._file(name)
        self._unsynced.discard(path)
        path.unlink(missing_ok=True)

    def sync(self) -> None:
        try:
            for path in sorted(self._unsynced):
                _sync(path)
            _sync(self.path)
        except OSError as error:
            raise disk_error(self.path, error) from error
        self._unsynced.clear()

    def scope(self, prefix: str) -> Steps:
        return _Scope(self, prefix)

    @property
    def is_empty(self) -> bool:
        """No step was kept."""
        return not any(path.suffix == SUFFIX for path in self.path.iterdir())

    def remove(self) -> None:
        """Remove the folder: the job is done, or has nothing that is worth keeping."""
        self._drop()
        shutil.rmtree(self.path, ignore_errors=True)

    def _drop(self) -> None:
        (self.path / KEY_FILE).unlink(missing_ok=True)
        for path in self.path.iterdir():
            if path.name == _LOCK_FILE:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        self._unsynced.clear()
        self.key = None

    def _file(self, name: str) -> Path:
        return self.path / f"{name}{SUFFIX}"


class _Scope:
    """Steps of a journal under a prefix."""

    def __init__(self, steps: Steps, prefix: str) -> None:
        self._steps = steps
        self._prefix = prefix

    def get(self, name: str) -> Entry | None:
        return self._steps.get(f"{self._prefix}.{name}")

    def put(self, name: str, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
        self._steps.put(f"{self._prefix}.{name}", tensors, facts)

    def sync(self) -> None:
        self._steps.sync()

    def scope(self, prefix: str) -> Steps:
        return _Scope(self, prefix)


@contextmanager
def open_journal(path: Path) -> Iterator[Journal]:
    """Open or make the journal in folder `path` and hold its lock meanwhile; an empty one is removed on the way out.

    Raises:
        OutputError: another process works on it, or the folder cannot be made.
        CapacityError: the disk is full.
    """
    try:
        path.mkdir(exist_ok=True)
        descriptor = os.open(path / _LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise disk_error(path, error) from error
    try:
        _lock(path, descriptor)
        journal = Journal(path, _read_key(path))
        if journal.key is None:
            journal._drop()
        yield journal
    finally:
        os.close(descriptor)


def _lock(path: Path, descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise OutputError(
            str(path),
            expected="one process that works on an output",
            found="another one that is at work on it",
            action="Wait for it, stop it, or choose another output folder.",
        ) from error


def _read_key(path: Path) -> Mapping[str, Any] | None:
    try:
        key = json.loads((path / KEY_FILE).read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    return key if isinstance(key, dict) else None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
