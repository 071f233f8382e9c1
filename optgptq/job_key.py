"""What decides the bytes of a job: compared before steps of an older run are used, so that two jobs never mix."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

import optgptq
from optgptq.checkpoint.folder import CONFIG_FILE, CheckpointFolder
from optgptq.checkpoint.manifest import sha256_file
from optgptq.errors import ModelError, OutputError
from optgptq.journal.store import Journal
from optgptq.layer_steps import has_more_than_text, num_layer_steps
from optgptq.recipe.loading import recipe_for_record
from optgptq.recipe.records import Recipe

# Of a recipe, what decides no byte of the result.
_WITHOUT_EFFECT = ("name", "description", "gates")
_DIFFERENCES_TOLD = 5
# By these a file is known again that was hashed before.
_MARKS = ("bytes", "mtime_ns", "inode")

SourceFiles = Mapping[str, Mapping[str, Any]]
"""`{relative name: {"sha256", "bytes", "mtime_ns", "inode"}}` of the files of the source."""


def describe_source(folder: CheckpointFolder, journal: Journal) -> SourceFiles:
    """Return the files that a job reads; those that the journal knows by size, time and inode are not hashed again.

    Raises:
        ModelError: a file cannot be read.
    """
    known = _part(journal, "files")
    names = sorted({CONFIG_FILE, *folder.weight_files, *folder.side_files})
    return {name: _describe(folder.path / name, known.get(name)) for name in names}


def without_marks(files: SourceFiles) -> dict[str, dict[str, Any]]:
    """Return hash and size of each file: what a manifest holds."""
    return {name: {"sha256": entry["sha256"], "bytes": entry["bytes"]} for name, entry in files.items()}


def require_unchanged(folder: CheckpointFolder, files: SourceFiles) -> None:
    """Raise ModelError where a file of the source has other content than when it was hashed."""
    for name, entry in files.items():
        path = folder.path / name
        # A file that was copied or touched looks changed; its hash decides.
        if (
            _marks(path) != {mark: entry[mark] for mark in _MARKS}
            and _describe(path, None)["sha256"] != entry["sha256"]
        ):
            raise ModelError(
                str(path),
                expected="a file that stays as it is while the job runs",
                found="one with other content",
                action="Put the old file back and run the same command again: what was computed is kept. With the new "
                "model, pass --restart.",
            )


def job_key(
    files: SourceFiles, recipe: Recipe, *, tokens_sha256: str | None, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Return what decides the bytes of the result; `tokens_sha256` is None for text that the model writes itself."""
    asked = {name: value for name, value in recipe_for_record(recipe).items() if name not in _WITHOUT_EFFECT}
    # A limit for what was computed; work that missed it can be used under another one.
    asked["gqa"] = {name: value for name, value in asked["gqa"].items() if name != "max_perplexity_ratio"}
    return {
        "optgptq": optgptq.__version__,
        "torch": str(torch.__version__),
        "model": without_marks(files),
        "recipe": asked,
        "tokens_sha256": tokens_sha256,
        "device": device.type,
        "compute_dtype": str(dtype).removeprefix("torch."),
    }


def begin_or_go_on(
    journal: Journal, key: Mapping[str, Any], files: SourceFiles, *, num_layers: int, restart: bool, is_done: bool
) -> None:
    """Make the journal that of the job with this key: as it stands where it is, empty where there is nothing to lose.

    Args:
        journal: to go on with.
        key: of this job.
        files: of its source.
        num_layers: decoder layers that it will finish.
        restart: drop what another job, or this one, has kept.
        is_done: the job that has kept steps there has published its output.

    Raises:
        OutputError: another job has kept steps there.
        CapacityError: the disk is full.
    """
    content = {"key": key, "files": files, "num_decoder_layers": num_layers}
    older = _part(journal, "key")
    if restart or journal.key is None or journal.is_empty or not older:
        journal.begin(content)
        return
    found = list(differences(older, key))
    if not found:
        if files != _part(journal, "files"):
            # The same files with other marks: they are not hashed again next time.
            journal.restate(content)
        return
    if is_done or not has_more_than_text(journal):
        journal.begin(content)
        return
    more = f"; and {len(found) - _DIFFERENCES_TOLD} more" if len(found) > _DIFFERENCES_TOLD else ""
    kept = num_layer_steps(journal)
    raise OutputError(
        str(journal.path),
        expected="the job that was interrupted there, or none",
        found=f"another one: {'; '.join(found[:_DIFFERENCES_TOLD])}{more}",
        action=f"Run the old command again to go on with it, pass --restart to drop {_layers(kept)}, or choose another "
        "output folder.",
    )


def _layers(count: int) -> str:
    if count == 0:
        return "what it has kept"
    return "its finished decoder layer" if count == 1 else f"its {count} finished decoder layers"


def differences(older: object, newer: object, place: str = "") -> Iterator[str]:
    """Yield every value in which two trees of plain values differ, with its place: `recipe.seed was 4, is 3`."""
    if isinstance(older, Mapping) and isinstance(newer, Mapping):
        for name in sorted(older.keys() | newer.keys()):
            below = f"{place}.{name}" if place else str(name)
            if name not in older or name not in newer:
                yield f"{below} {'is new' if name in newer else 'is gone'}"
            else:
                yield from differences(older[name], newer[name], below)
    elif isinstance(older, (list, tuple)) and isinstance(newer, (list, tuple)) and len(older) == len(newer):
        for number, (first, second) in enumerate(zip(older, newer, strict=True)):
            yield from differences(first, second, f"{place}.{number}")
    elif not (isinstance(older, (list, tuple)) and older == newer) and older != newer:
        yield f"{place} was {_short(older)}, is {_short(newer)}"


def _describe(path: Path, known: object) -> dict[str, Any]:
    marks = _marks(path)
    if isinstance(known, Mapping) and "sha256" in known and {mark: known.get(mark) for mark in _MARKS} == marks:
        return {"sha256": known["sha256"], **marks}
    try:
        return {"sha256": sha256_file(path), **marks}
    except OSError as error:
        raise _unreadable(path, error) from error


def _marks(path: Path) -> dict[str, Any]:
    try:
        status = path.stat()
    except OSError as error:
        raise _unreadable(path, error) from error
    return {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns, "inode": status.st_ino}


def _unreadable(path: Path, error: OSError) -> ModelError:
    return ModelError(
        str(path), expected="a file that can be read", found=str(error), action="Change its permissions or copy it."
    )


def _part(journal: Journal, name: str) -> Mapping[str, Any]:
    part = None if journal.key is None else journal.key.get(name)
    return part if isinstance(part, dict) else {}


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:16]}..."
