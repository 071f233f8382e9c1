"""Runs benchmarks one after the other, each in a process of its own: `python benchmarks/run.py startup packing`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from measure.report import add_peer_options, new_parser

HERE = Path(__file__).resolve().parent
# Quick ones first: what is broken shows early.
ALONE = ("startup", "packing", "determinism", "memory")
WITH_PEERS = ("speed", "quality")


def main() -> int:
    """Run what is named, or all; return 1 where any missed a figure or failed."""
    parser = new_parser(__doc__)
    add_peer_options(parser)
    parser.add_argument("names", nargs="*", help=f"of {', '.join((*ALONE, *WITH_PEERS))}; default: all")
    arguments = parser.parse_args()
    names = arguments.names or [*ALONE, *WITH_PEERS]
    unknown = sorted(set(names) - {*ALONE, *WITH_PEERS})
    if unknown:
        parser.error(f"unknown benchmark {', '.join(unknown)}; known are {', '.join((*ALONE, *WITH_PEERS))}")
    common = ["--work", str(arguments.work)]
    common += ["--quick"] if arguments.quick else []
    common += ["--write"] if arguments.write else []
    with_peers = ["--peers", str(arguments.peers)]
    with_peers += ["--tools", *arguments.tools] if arguments.tools else []
    for setting in arguments.settings:
        with_peers += ["--set", setting]
    failed = []
    for name in names:
        command = [sys.executable, str(HERE / f"{name}.py"), *common, *(with_peers if name in WITH_PEERS else ())]
        if subprocess.run(command, check=False).returncode != 0:
            failed.append(name)
    if failed:
        print(f"missed a figure or failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
