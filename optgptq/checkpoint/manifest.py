"""`optgptq_manifest.json`: where a checkpoint came from, and the SHA-256 of every file in it.

It holds no time and no local path, so that two runs of the same job give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optgptq.checkpoint.disk import disk_error
from optgptq.checkpoint.folder import read_json_object
from optgptq.checkpoint.paths import list_files, require_inside

MANIFEST_FILE = "optgptq_manifest.json"


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong in a checkpoint: where, what was expected, what was found."""

    where: str
    expected: str
    found: str


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of the file's content, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def describe_files(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return `{relative name: {"sha256", "bytes"}}` of the named files in `folder`."""
    return {name: {"sha256": sha256_file(folder / name), "bytes": (folder / name).stat().st_size} for name in names}


def _all_files(folder: Path) -> list[str]:
    return [name for name in list_files(folder) if name != MANIFEST_FILE]


def write_manifest(folder: Path, content: Mapping[str, Any]) -> None:
    """Write `content` and, under `files`, all other files of `folder`; the last file to be written.

    Raises:
        CapacityError, OutputError: the file cannot be written.
    """
    manifest = {**content, "files": describe_files(folder, _all_files(folder))}
    text = json.dumps(manifest, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    path = folder / MANIFEST_FILE
    try:
        path.write_bytes(text.encode())
    except OSError as error:
        raise disk_error(path, error) from error


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of `folder`, None where there is none; ModelError when it is not a JSON object."""
    return read_json_object(folder, MANIFEST_FILE) if (folder / MANIFEST_FILE).exists() else None


def check_manifest(folder: Path, manifest: Mapping[str, Any]) -> list[Problem]:
    """Return every file that is missing, changed or not listed, compared with the manifest."""
    listed = manifest.get("files")
    if not isinstance(listed, dict) or not all(isinstance(entry, dict) for entry in listed.values()):
        return [Problem(MANIFEST_FILE, "a table `files`", "none")]
    present = set(_all_files(folder))
    problems = [
        Problem(name, "a file listed in the manifest", "one that is not") for name in sorted(present - set(listed))
    ]
    for name, entry in listed.items():
        if name not in present:
            problems.append(Problem(name, "the file that the manifest lists", "no such file"))
            continue
        found = sha256_file(require_inside(folder, name))
        if found != entry.get("sha256"):
            problems.append(Problem(name, f"SHA-256 {entry.get('sha256')}", found))
    return problems
