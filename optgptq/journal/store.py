"""The journal of a job: a hidden folder beside its output, one file for each finished step.

`job.json` says which job the steps belong to. It is the first file that is written and the first that is removed:
without it every other file is rubbish. A lock keeps two processes from working on one output.

Steps whose names begin with `session-` tell of the job and are no work that is worth keeping.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, Self

import torch

from optgptq.checkpoint.disk import disk_error, force_to_disk
from optgptq.checkpoint.lock import LOCK_FILES, hold_lock
from optgptq.errors import OutputError
from optgptq.journal.entry import SUFFIX, Entry, has_all_bytes, read_entry, write_entry

_logger = logging.getLogger(__name__)

KEY_FILE = "job.json"
SESSION_PREFIX = "session-"


class Steps(Protocol):
    """Finished steps by name: what a part of a job needs of the journal."""

    def get(self, name: str) -> Entry | None:
        """Return what a finished step left; None where it has not been finished."""

    def put(self, name: str, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
        """Keep a finished step; CapacityError or OutputError where it cannot be written."""

    def forget(self, name: str) -> None:
        """Drop a step, if it is there; OutputError where it cannot be removed."""

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

    def forget(self, name: str) -> None:
        del name

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
        except OSError as error:
            raise disk_error(self.path, error) from error
        self.restate(key)

    def restate(self, key: Mapping[str, Any]) -> None:
        """Say anew which job the steps belong to, and keep them."""
        try:
            partial = self.path / f"{KEY_FILE}.partial"
            partial.write_text(json.dumps(key, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            force_to_disk(partial)
            os.replace(partial, self.path / KEY_FILE)
            force_to_disk(self.path)
            force_to_disk(self.path.parent)
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
        path = self._file(name)
        self._unsynced.discard(path)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise disk_error(path, error) from error

    def sync(self) -> None:
        try:
            for path in sorted(self._unsynced):
                force_to_disk(path)
            force_to_disk(self.path)
        except OSError as error:
            raise disk_error(self.path, error) from error
        self._unsynced.clear()

    def scope(self, prefix: str) -> Steps:
        return _Scope(self, prefix)

    @property
    def is_empty(self) -> bool:
        """No step was kept that is worth going on from."""
        return not any(
            path.suffix == SUFFIX and not path.name.startswith(SESSION_PREFIX) for path in self.path.iterdir()
        )

    @property
    def num_bytes(self) -> int:
        """Bytes that the steps take on the disk."""
        return sum(path.stat().st_size for path in self.path.iterdir() if path.suffix == SUFFIX)

    def names(self, prefix: str) -> list[str]:
        """Return the sorted names of steps that begin with `prefix`, whole or torn."""
        return sorted(
            path.stem for path in self.path.iterdir() if path.suffix == SUFFIX and path.name.startswith(prefix)
        )

    def has_all_bytes(self, name: str) -> bool:
        """Say whether a step's file is as long as it must be, which is known without reading it."""
        return has_all_bytes(self._file(name))

    def remove(self) -> None:
        """Remove every step: the job is done, or has nothing that is worth keeping. The folder goes with its lock.

        What cannot be removed is left for the next job, with a warning in the log.
        """
        self.clear()

    def clear(self) -> None:
        """Remove what is in the folder, as far as that can be done."""
        try:
            self._drop()
        except OSError as error:
            _logger.warning("%s: could not be removed (%s)", self.path, error)

    def _drop(self) -> None:
        (self.path / KEY_FILE).unlink(missing_ok=True)
        # Before any step goes: a power cut must not bring the file back without them.
        force_to_disk(self.path)
        for path in self.path.iterdir():
            if path.name in LOCK_FILES:
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

    def forget(self, name: str) -> None:
        self._steps.forget(f"{self._prefix}.{name}")

    def sync(self) -> None:
        self._steps.sync()

    def scope(self, prefix: str) -> Steps:
        return _Scope(self, prefix)


@contextmanager
def open_journal(path: Path) -> Iterator[Journal]:
    """Open or make the journal in folder `path` and hold its lock meanwhile; an empty one is removed on the way out.

    Raises:
        OutputError: another process works on it, the folder cannot be made, or it holds what no journal has written.
        CapacityError: the disk is full.
    """
    with hold_lock(path):
        journal = Journal(path, read_key(path))
        if journal.key is None:
            _require_ours(path)
            journal.clear()
        try:
            yield journal
        finally:
            if path.is_dir() and journal.is_empty:
                journal.remove()


def _require_ours(path: Path) -> None:
    """Raise OutputError where a folder that belongs to no job holds something that must not be dropped unasked."""
    names = sorted(entry.name for entry in path.iterdir())
    steps = [name for name in names if name.endswith(SUFFIX)]
    written = (*LOCK_FILES, KEY_FILE, f"{KEY_FILE}.partial")
    others = [name for name in names if not name.removesuffix(".partial").endswith(SUFFIX) and name not in written]
    if others or (steps and KEY_FILE in names):
        raise OutputError(
            str(path),
            expected="nothing but what a job has kept there, with a readable job.json",
            found=others[0] if others else f"{len(steps)} steps and a damaged {KEY_FILE}",
            action="Look at the folder and remove it if you do not need it, or choose another output folder.",
        )


def read_key(path: Path) -> Mapping[str, Any] | None:
    """Return which job the steps in folder `path` belong to; None where there are none."""
    try:
        key = json.loads((path / KEY_FILE).read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return None
    return key if isinstance(key, dict) else None
