"""Whole processes, measured from start to end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

LAUNCHER = Path(__file__).with_name("launch.py")
SHOWN_LOG_CHARACTERS = 4000


class BenchmarkError(Exception):
    """A benchmark cannot give a figure, or a figure that must not be trusted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What one run of a command took.

    Attributes:
        seconds: wall time from start to exit.
        processor_seconds: user and system time.
        peak_bytes: highest resident memory of the process (of the largest one, where it starts others).
    """

    seconds: float
    processor_seconds: float
    peak_bytes: int


def run_measured(command: Sequence[str], log: Path, *, environment: Mapping[str, str] | None = None) -> Measurement:
    """Run `command` (absolute paths), its output into `log`; BenchmarkError with the end of the log when it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    result_path = log.with_suffix(".measured.json")
    # -I -S: no site packages, so that the process in between stays small.
    launcher = [sys.executable, "-I", "-S", str(LAUNCHER), str(result_path), str(log), *command]
    # In the log's folder: some tools leave files where they are started.
    subprocess.run(launcher, check=True, cwd=log.parent, env={**os.environ, **(environment or {})})
    result = json.loads(result_path.read_text("utf-8"))
    result_path.unlink()
    if result.pop("exit_status") != 0:
        tail = log.read_text("utf-8", errors="replace")[-SHOWN_LOG_CHARACTERS:]
        raise BenchmarkError(f"{' '.join(command)}\nfailed; the end of {log}:\n{tail}")
    return Measurement(**result)
