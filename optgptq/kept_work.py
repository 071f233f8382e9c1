"""What an interrupted job has kept beside its output, in words."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optgptq.checkpoint.lock import work_folder
from optgptq.checkpoint.manifest import MANIFEST_FILE, sha256_file
from optgptq.journal.entry import SUFFIX
from optgptq.journal.store import Journal, read_key
from optgptq.layer_steps import has_more_than_text, num_layer_steps

# Kept right before the output appears under its name.
PUBLISHED_STEP = "published"
# What the key of a job calls itself that makes fewer key/value heads and quantizes nothing.
GROUPING_JOB = "gqa"


def kept_work(output: Path) -> str | None:
    """Return what is kept of a job that was to make `output`, and how to go on; None where nothing is."""
    path = work_folder(output.absolute())
    key = read_key(path)
    if key is None:
        return None
    journal = Journal(path, key)
    num_layers = key.get("num_decoder_layers")
    if journal.is_empty or not isinstance(num_layers, int):
        return None
    asked = key.get("key")
    is_grouping = isinstance(asked, Mapping) and asked.get("job") == GROUPING_JOB
    if journal.names(PUBLISHED_STEP) and (output / MANIFEST_FILE).is_file():
        left = "it ends at once" if is_grouping else "gates and the run record are what is left"
        return f"{output.name} is complete. Run the same command again: {left}."
    if not has_more_than_text(journal):
        return "Calibration text that the model has written is kept. Run the same command again: it goes on there."
    finished = num_layer_steps(journal, prefix="heads." if is_grouping else "")
    if finished >= num_layers:
        return "All decoder layers are kept. Run the same command again: it goes on behind them."
    kept = f"{finished} finished decoder layers are kept" if finished != 1 else "1 finished decoder layer is kept"
    return f"{kept}. Run the same command again: it goes on at decoder layer {finished + 1} of {num_layers}."


def keep_published(journal: Journal, manifest: Path, record: Mapping[str, Any]) -> None:
    """Keep, right before the output appears, the hash of its manifest and what is told of the job."""
    journal.put(PUBLISHED_STEP, {}, {"manifest_sha256": sha256_file(manifest), "record": record})
    journal.sync()


def published_record(journal: Journal, output: Path) -> dict[str, Any] | None:
    """Return what `keep_published` kept if that output stands there already, else None."""
    entry = journal.get(PUBLISHED_STEP)
    manifest = output / MANIFEST_FILE
    if entry is None or not manifest.is_file() or sha256_file(manifest) != entry.facts["manifest_sha256"]:
        return None
    record: dict[str, Any] = entry.facts["record"]
    return record


def kept_bytes(output: Path) -> int:
    """Return what a job that was to make `output` holds on the disk already: its journal, and an output of its own."""
    output = output.absolute()
    journal = work_folder(output)
    folders = [journal, output] if (journal / f"{PUBLISHED_STEP}{SUFFIX}").is_file() else [journal]
    return sum(
        os.stat(os.path.join(current, name)).st_size
        for folder in folders
        for current, _, names in os.walk(folder)
        for name in names
    )
