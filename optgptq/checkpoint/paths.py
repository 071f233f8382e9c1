"""Which files of a checkpoint folder may be touched: nothing outside it, nothing but regular files."""

from __future__ import annotations

import os
import stat
from pathlib import Path, PurePosixPath

from optgptq.errors import ModelError

# Pickles run code when they are loaded; the others are weights of other engines, which would be stale beside ours.
LEFT_OUT_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".npz")
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


def require_plain_name(name: object, *, where: str) -> str:
    """Return `name` if it names a file directly in its folder, else raise ModelError."""
    parts = PurePosixPath(name).parts if isinstance(name, str) else ()
    if len(parts) != 1 or parts[0] != name or name in (".", "..") or "\\" in name or "\0" in name:
        raise ModelError(
            where,
            expected="the name of a file in the same folder",
            found=repr(name),
            action="Do not use this checkpoint, its index points outside its folder; get it from a source you trust.",
        )
    return name


def require_inside(folder: Path, name: str) -> Path:
    """Return the path of the regular file `name` in `folder`, symlinks checked.

    A symlink may lead to another file of the folder, or, in a snapshot of the Hugging Face cache, to the blobs of the
    same repository.

    Raises:
        ModelError: missing, not a regular file, or a symlink that leads elsewhere.
    """
    path = folder / name
    root = folder.resolve()
    try:
        target = path.resolve(strict=True)
        mode = target.stat().st_mode
    except (OSError, RuntimeError, ValueError) as error:  # the last for a name that no file can have
        raise ModelError(
            str(path), expected="a file", found=str(error), action="Download or export the checkpoint again, complete."
        ) from error
    if not any(target.is_relative_to(allowed) for allowed in (root, *_blob_folders(root))):
        raise ModelError(
            str(path),
            expected="a file inside the checkpoint folder",
            found=f"a symlink to {target}",
            action="Replace the symlink by a copy of the file, if you trust it.",
        )
    if not stat.S_ISREG(mode):
        raise ModelError(
            str(path), expected="a regular file", found="something else", action="Remove it from the folder."
        )
    return path


def list_files(folder: Path) -> list[str]:
    """Return the relative names of all files in `folder` and its sub-folders, sorted, hidden ones left out.

    Raises:
        ModelError: a sub-folder is a symlink, or cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise ModelError(
            str(error.filename),
            expected="a folder that can be read",
            found=str(error),
            action="Change its permissions.",
        ) from error

    names = []
    for current, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in folders:
            if os.path.islink(os.path.join(current, name)):
                raise ModelError(
                    os.path.join(current, name),
                    expected="a folder",
                    found="a symlink to a folder",
                    action="Replace the symlink by a copy of the folder, if you trust it.",
                )
        relative = Path(current).relative_to(folder)
        names += [(relative / name).as_posix() for name in files if not name.startswith(".")]
    return sorted(names)


def is_left_out(name: str) -> bool:
    """True for weights that are not ours to read or to copy: pickles, other engines' files, stray safetensors."""
    lower = name.lower()
    return lower.endswith((*LEFT_OUT_SUFFIXES, ".safetensors")) or (
        lower.endswith(".index.json")
        and lower.removesuffix(".index.json").endswith((*LEFT_OUT_SUFFIXES, ".safetensors"))
    )


def _blob_folders(root: Path) -> list[Path]:
    """Blobs that a hub snapshot `models--X/snapshots/REVISION` may link to: those of the same repository."""
    is_snapshot = root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--")
    return [root.parent.parent / "blobs"] if is_snapshot else []
