"""Calibration windows, cut once by our own code and written for every tool."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from measure.process import BenchmarkError
from optgptq.checkpoint.manifest import MANIFEST_FILE
from optgptq.data.corpora import TextSource, load_documents
from optgptq.data.tokenizer import load_tokenizer
from optgptq.data.windows import WindowSettings, build_windows


def write_windows(model: Path, text: str, settings: WindowSettings, folder: Path) -> tuple[Path, str]:
    """Return the .npy file with the windows, int64 `[windows, positions]`, and their hash as a manifest states it."""
    windows = build_windows(load_documents(TextSource(source=text)), load_tokenizer(model), settings)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{windows.sha256[:16]}.npy"
    np.save(path, windows.tokens_WS.numpy())
    return path, windows.sha256


def require_same_windows(output: Path, sha256: str) -> None:
    """Check that our command calibrated on the windows that the peers were given."""
    manifest = json.loads((output / MANIFEST_FILE).read_text("utf-8"))
    found = manifest["calibration"]["tokens_sha256"]
    if found != sha256:
        raise BenchmarkError(f"{output}: calibrated on tokens {found}, but the peers were given {sha256}")
