"""Seconds until `optgptq --help` has answered."""

from __future__ import annotations

import statistics
import sys

from measure.process import run_measured
from measure.report import Report, finish, median_and_spread, new_parser
from measure.tools import optgptq_command

TARGET_SECONDS = 0.5
COMMANDS = (("--help",), ("--version",), ("recipes",))
MEBIBYTE = 2**20


def main() -> int:
    """Time commands that need no model."""
    parser = new_parser(__doc__)
    parser.add_argument("--repetitions", type=int, default=10)
    arguments = parser.parse_args()
    report = Report(
        name="startup",
        title="Time until the command line answers",
        columns=("command", "seconds", "peak MiB"),
        notes=[
            f"`optgptq --help` under {TARGET_SECONDS:g} s is the aim; the first run of each, which reads files from "
            "disk, is not counted."
        ],
    )
    for words in COMMANDS:
        log = arguments.work / "startup" / f"{words[0].strip('-')}.log"
        runs = [run_measured([*optgptq_command(), *words], log) for _ in range(arguments.repetitions + 1)][1:]
        seconds = [run.seconds for run in runs]
        name = " ".join(("optgptq", *words))
        peaks = [run.peak_bytes / MEBIBYTE for run in runs]
        report.rows.append([name, median_and_spread(seconds), median_and_spread(peaks, digits=0)])
        report.details.append({"command": name, "seconds": seconds})
        if words == COMMANDS[0] and statistics.median(seconds) > TARGET_SECONDS:
            report.missed.append(f"{name}: {statistics.median(seconds):.2f} s; the aim is {TARGET_SECONDS:g} s.")
    return finish(report, arguments)


if __name__ == "__main__":
    sys.exit(main())
