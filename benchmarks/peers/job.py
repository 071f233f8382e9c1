"""The command line that both peer drivers read. Runs inside a peer's environment: nothing of optgptq is imported."""

from __future__ import annotations

import argparse
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerJob:
    """One quantization; `windows` is a .npy file of token ids `[windows, positions]`."""

    model: str
    windows: str
    output: str
    bits: int
    group_size: int
    symmetric: bool


def read_job(description: str | None) -> PeerJob:
    """Return the job that the command line asks for."""
    parser = argparse.ArgumentParser(description=description)
    for name in ("model", "windows", "output"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group-size", type=int, required=True)
    parser.add_argument("--asymmetric", action="store_true")
    arguments = parser.parse_args()
    return PeerJob(
        model=arguments.model,
        windows=arguments.windows,
        output=arguments.output,
        bits=arguments.bits,
        group_size=arguments.group_size,
        symmetric=not arguments.asymmetric,
    )
