"""What a figure depends on beside the code: machine, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import optgptq
from measure.cases import REPOSITORY
from measure.process import BenchmarkError

PEER_PACKAGES = ("llmcompressor", "compressed-tensors", "gptqmodel", "transformers", "torch")


def processor_name() -> str:
    """Return the processor's name as the system spells it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text("utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def num_cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def commit() -> str:
    """Return the short commit, with a remark where files differ from it."""
    try:
        head = _git("rev-parse", "--short", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return "unknown (no git repository)"
    return f"{head} with local changes" if changed else head


def our_versions() -> str:
    """Return the versions that our own figures depend on."""
    return f"optgptq {optgptq.__version__}, torch {version('torch')}, Python {platform.python_version()}"


def peer_versions(peers_folder: Path, names: list[str]) -> list[str]:
    """Return one line per peer environment with the packages that decide its figures."""
    lines = []
    for name in names:
        found = {}
        for path in sorted((peers_folder / name).glob("lib/python*/site-packages/*.dist-info")):
            package, _, number = path.name.removesuffix(".dist-info").partition("-")
            found[package.lower().replace("_", "-")] = number
        if not found:
            raise BenchmarkError(f"no packages in {peers_folder / name}")
        known = [f"{package} {found[package]}" for package in PEER_PACKAGES if package in found]
        lines.append(f"{name}: {', '.join(known)}")
    return lines


def _git(*arguments: str) -> str:
    result = subprocess.run(["git", *arguments], cwd=REPOSITORY, check=True, capture_output=True, text=True)
    return result.stdout.strip()
