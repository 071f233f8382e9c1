"""Starts the cases of triton kernels: in a process of their own, since triton reads `TRITON_INTERPRET` once."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from support.source_tree import ROOT


def run_cases(cases: Path, cache: Path, settings: Mapping[str, str]) -> None:
    """Run the file `cases` with pytest and `settings` in the environment; triton keeps what it compiles in `cache`."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {**settings, "TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(cases)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"^\d+ passed in", result.stdout, flags=re.MULTILINE), result.stdout
