"""An output folder that appears complete or not at all.

Everything is written to a hidden sibling of the output; one rename makes it appear. An older output changes places with
it in the same step, where the system can, and is removed last. Where it cannot, the older one is moved aside first; a
process that dies between the two renames leaves a name that tells the next one to put it back.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from optgptq.checkpoint.deferral import deferred_stop
from optgptq.checkpoint.disk import disk_error, force_to_disk, require_disk_space
from optgptq.checkpoint.exchange import exchange
from optgptq.checkpoint.folder import CONFIG_FILE
from optgptq.checkpoint.lock import hold_lock, work_folder
from optgptq.errors import OutputError

__all__ = [
    "Staging",
    "open_staging",
    "partial_folder",
    "recover_output",
    "require_disk_space",
    "require_free",
    "require_place",
    "staging_folder",
]


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

    def sync(self) -> None:
        """Force everything in the folder to disk.

        Raises:
            CapacityError: the disk is full.
            OutputError: it cannot be written.
        """
        try:
            _sync_tree(self.path)
            force_to_disk(self.path.parent)
        except OSError as error:
            raise disk_error(self.output, error) from error

    def publish(self) -> None:
        """Force everything to disk, then let the folder appear under its name by one rename.

        A request to stop waits until that is done.

        Raises:
            OutputError: something appeared under that name in the meantime, or the rename is not allowed.
            CapacityError: the disk is full.
        """
        self.sync()
        with deferred_stop():
            try:
                if os.path.lexists(self.output):
                    self._replace()
                else:
                    os.rename(self.path, self.output)
                    force_to_disk(self.output.parent)
            except OSError as error:
                raise disk_error(self.output, error) from error

    def _replace(self) -> None:
        require_free(self.output, overwrite=self.overwrite)
        old = self.path if exchange(self.path, self.output) else self._replace_in_two_steps()
        # Before the old one goes, a power cut must not be able to bring it back.
        force_to_disk(self.output.parent)
        shutil.rmtree(old, ignore_errors=True)

    def _replace_in_two_steps(self) -> Path:
        aside = _aside(self.output)
        try:
            os.rename(self.output, aside)
            os.rename(self.path, self.output)
        except BaseException:
            # Told by what is on disk, not by a flag: an interrupt can come between the rename and the flag.
            if os.path.lexists(aside) and not os.path.lexists(self.output):
                os.rename(aside, self.output)
            raise
        return aside


@contextmanager
def staging_folder(output: Path, *, overwrite: bool, source: Path | None = None) -> Iterator[Staging]:
    """Make a staging folder for `output`, which no other process works on meanwhile; see `open_staging`.

    Args:
        output: folder that is to appear.
        overwrite: replace an existing output, which must be a checkpoint or empty.
        source: folder that is read meanwhile; the output may not touch it.

    Raises:
        OutputError: before any work, when the output exists, its parent is missing or not writable, source and output
            lie within each other, or another process makes the same output.
    """
    output = require_place(output, source=source)
    with hold_lock(work_folder(output)):
        recover_output(output)
        require_free(output, overwrite=overwrite)
        with open_staging(output, overwrite=overwrite) as staging:
            yield staging


@contextmanager
def open_staging(output: Path, *, overwrite: bool) -> Iterator[Staging]:
    """Make a staging folder for `output`, whose lock is held; it is removed on the way out unless it was published.

    Raises:
        OutputError, CapacityError: it cannot be made.
    """
    path = partial_folder(output)
    try:
        path.mkdir()
    except OSError as error:
        raise disk_error(output, error) from error
    try:
        yield Staging(path, output, overwrite)
    finally:
        # After a rename there is nothing left under this name.
        shutil.rmtree(path, ignore_errors=True)


def recover_output(output: Path) -> None:
    """Put right what a process that died has left beside `output`, whose lock is held.

    Raises:
        OutputError: an older output was moved aside and cannot be put back.
    """
    aside = _aside(output)
    try:
        if os.path.lexists(aside) and not os.path.lexists(output):
            os.rename(aside, output)
            force_to_disk(output.parent)
    except OSError as error:
        raise disk_error(output, error) from error
    for path in (aside, partial_folder(output)):
        shutil.rmtree(path, ignore_errors=True)


def require_place(output: Path, *, source: Path | None = None) -> Path:
    """Return the absolute path of `output`, whose parent can be written and which lies apart from `source`.

    Raises:
        OutputError: it is not so.
    """
    output = Path(os.path.abspath(output))
    if source is not None:
        _require_apart(output, source)
    _require_parent(output.parent, output)
    return output


def _require_apart(output: Path, source: Path) -> None:
    first, second = output.resolve(), source.resolve()
    if first.is_relative_to(second) or second.is_relative_to(first):
        raise OutputError(
            str(output),
            expected="a folder apart from the source",
            found=f"source {source}",
            action="Choose an output folder that is neither inside the source nor around it.",
        )


def _require_parent(parent: Path, output: Path) -> None:
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


def require_free(output: Path, *, overwrite: bool) -> None:
    """Raise OutputError unless there is nothing under the name, or something that may be overwritten."""
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


def partial_folder(output: Path) -> Path:
    """Return the hidden folder in which `output` is made."""
    return output.with_name(f".{output.name}.partial")


def _aside(output: Path) -> Path:
    return output.with_name(f".{output.name}.replaced")


def _sync_tree(folder: Path) -> None:
    for current, _, files in os.walk(folder):
        for name in files:
            force_to_disk(Path(current) / name)
        force_to_disk(Path(current))
