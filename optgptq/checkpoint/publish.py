"""An output folder that appears complete or not at all.

Everything is written to a hidden sibling of the output; one rename makes it appear. An older output is moved aside
only then, put back if the rename fails, and removed last.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from optgptq.checkpoint.disk import disk_error, require_disk_space
from optgptq.checkpoint.folder import CONFIG_FILE
from optgptq.errors import OutputError

__all__ = ["Staging", "require_disk_space", "staging_folder"]


@dataclass(frozen=True, slots=True)
class Staging:
    """A folder in the making.

    Attributes:
        path: where to write; a hidden sibling of `output`.
        output: the name under which it will appear.
        overwrite: an older output may be replaced.
    """

    path: Path
    output: Path
    overwrite: bool

    def publish(self) -> None:
        """Force everything to disk, then let the folder appear under its name by one rename.

        Raises:
            OutputError: something appeared under that name in the meantime, or the rename is not allowed.
            CapacityError: the disk is full.
        """
        try:
            _sync_tree(self.path)
            if os.path.lexists(self.output):
                self._replace()
            else:
                os.rename(self.path, self.output)
            _sync(self.output.parent)
        except OSError as error:
            raise disk_error(self.output, error) from error

    def _replace(self) -> None:
        if not self.overwrite:
            raise _exists(self.output)
        aside = _hidden_sibling(self.output, "replaced")
        try:
            os.rename(self.output, aside)
            os.rename(self.path, self.output)
        except BaseException:
            # Told by what is on disk, not by a flag: an interrupt can come between the rename and the flag.
            if os.path.lexists(aside) and not os.path.lexists(self.output):
                os.rename(aside, self.output)
            raise
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def staging_folder(output: Path, *, overwrite: bool, source: Path | None = None) -> Iterator[Staging]:
    """Make a staging folder for `output`; it is removed on the way out unless it was published.

    Args:
        output: folder that is to appear.
        overwrite: replace an existing output, which must be a checkpoint or empty.
        source: folder that is read meanwhile; the output may not touch it.

    Raises:
        OutputError: before any work, when the output exists, its parent is missing or not writable, or source and
            output lie within each other.
    """
    output = Path(os.path.abspath(output))
    if source is not None:
        _require_apart(output, source)
    _require_free(output, overwrite)
    path = _hidden_sibling(output, "partial")
    try:
        path.mkdir()
    except OSError as error:
        raise disk_error(output, error) from error
    try:
        yield Staging(path, output, overwrite)
    finally:
        # After a rename there is nothing left under this name.
        shutil.rmtree(path, ignore_errors=True)


def _require_apart(output: Path, source: Path) -> None:
    first, second = output.resolve(), source.resolve()
    if first.is_relative_to(second) or second.is_relative_to(first):
        raise OutputError(
            str(output),
            expected="a folder apart from the source",
            found=f"source {source}",
            action="Choose an output folder that is neither inside the source nor around it.",
        )


def _require_free(output: Path, overwrite: bool) -> None:
    parent = output.parent
    if not parent.is_dir():
        raise OutputError(
            str(output),
            expected=f"an existing folder {parent}",
            found="none",
            action="Create it first, then run again.",
        )
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(
            str(output),
            expected=f"a folder {parent} that can be written",
            found="no permission",
            action="Change its permissions or choose another output folder.",
        )
    if not os.path.lexists(output):
        return
    if not overwrite:
        raise _exists(output)
    is_folder = output.is_dir() and not output.is_symlink()
    if not is_folder or (any(output.iterdir()) and not (output / CONFIG_FILE).is_file()):
        raise OutputError(
            str(output),
            expected=f"an older checkpoint (a folder with {CONFIG_FILE}) to overwrite",
            found="something else",
            action="Remove it yourself if you do not need it, or choose another output folder.",
        )


def _exists(output: Path) -> OutputError:
    return OutputError(
        str(output),
        expected="no folder of that name",
        found="one that exists",
        action="Choose another output folder, or pass --overwrite to replace this one.",
    )


def _hidden_sibling(output: Path, kind: str) -> Path:
    return output.with_name(f".{output.name}.{kind}-{secrets.token_hex(4)}")


def _sync_tree(folder: Path) -> None:
    for current, _, files in os.walk(folder):
        for name in files:
            _sync(Path(current) / name)
        _sync(Path(current))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
