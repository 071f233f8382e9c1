"""A folder of files that is damaged and mended again, and what an input boundary is."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from support.fuzzing.guard import Outcome, Watch, run_guarded


class CaseFolder:
    """A folder with known files: each can be replaced for one input, and all come back before the next.

    Attributes:
        path: the folder; nothing else may be in it.
        files: content by name, as it is when nothing is damaged.
    """

    def __init__(self, path: Path, files: Mapping[str, bytes]) -> None:
        self.path = path
        self.files = dict(files)
        self._changed: set[str] = set()
        path.mkdir(parents=True)
        for name, data in self.files.items():
            (path / name).parent.mkdir(exist_ok=True)
            (path / name).write_bytes(data)

    @classmethod
    def of(cls, path: Path, source: Path) -> CaseFolder:
        """Return a folder with copies of all files of `source`."""
        files = sorted(file for file in source.rglob("*") if file.is_file())
        return cls(path, {file.relative_to(source).as_posix(): file.read_bytes() for file in files})

    def put(self, name: str, data: bytes) -> Path:
        """Replace or add a file until `mend`."""
        self._changed.add(name)
        path = self.path / name
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_bytes(data)
        return path

    def drop(self, name: str) -> None:
        """Take a file away until `mend`."""
        self._changed.add(name)
        (self.path / name).unlink(missing_ok=True)

    def link(self, name: str, target: str) -> None:
        """Put a symbolic link in the place of a file until `mend`."""
        self.drop(name)
        (self.path / name).symlink_to(target)

    def mend(self) -> None:
        """Undo every change."""
        for name in self._changed:
            (self.path / name).unlink(missing_ok=True)
            if name in self.files:
                (self.path / name).parent.mkdir(exist_ok=True)
                (self.path / name).write_bytes(self.files[name])
        self._changed.clear()


@dataclass(frozen=True, slots=True, kw_only=True)
class Boundary:
    """A place where the toolkit takes what others wrote.

    Attributes:
        name: short and unique.
        folder: the files that may be read.
        damage: changes files of the folder and returns what reads them, to be called once.
        share: of the inputs, where one of them takes long.
    """

    name: str
    folder: CaseFolder
    damage: Callable[[random.Random], Callable[[], object]]
    share: float = 1.0

    def run(self, seed: int, number: int, watch: Watch) -> Outcome:
        """Run input `number` of `seed`; the two decide the input."""
        try:
            call = self.damage(random.Random(f"{self.name} {seed} {number}"))
            return run_guarded(call, self.folder.path, watch)
        finally:
            self.folder.mend()
