"""What an interrupted job has kept beside its output, in words."""

from __future__ import annotations

from pathlib import Path

from optgptq.checkpoint.lock import work_folder
from optgptq.journal.store import Journal, read_key
from optgptq.layer_steps import num_layer_steps


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
    finished = num_layer_steps(journal)
    if finished >= num_layers:
        return "Everything that was computed is kept. Run the same command again: it goes on with writing."
    kept = f"{finished} finished decoder layers are kept" if finished != 1 else "1 finished decoder layer is kept"
    return f"{kept}. Run the same command again: it goes on at decoder layer {finished + 1} of {num_layers}."
