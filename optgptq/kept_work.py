"""What an interrupted job has kept beside its output, in words."""

from __future__ import annotations

import os
from pathlib import Path

from optgptq.checkpoint.lock import work_folder
from optgptq.checkpoint.manifest import MANIFEST_FILE
from optgptq.journal.entry import SUFFIX
from optgptq.journal.store import Journal, read_key
from optgptq.layer_steps import num_layer_steps

# Kept right before the output appears under its name.
PUBLISHED_STEP = "published"


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
    if journal.names(PUBLISHED_STEP) and (output / MANIFEST_FILE).is_file():
        return f"{output.name} is complete. Run the same command again: gates and the run record are what is left."
    finished = num_layer_steps(journal)
    if finished >= num_layers:
        return "All decoder layers are kept. Run the same command again: it goes on behind them."
    kept = f"{finished} finished decoder layers are kept" if finished != 1 else "1 finished decoder layer is kept"
    return f"{kept}. Run the same command again: it goes on at decoder layer {finished + 1} of {num_layers}."


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
