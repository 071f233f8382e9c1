"""Damaged input at every boundary of the toolkit: counts how each input ends, and lists what should not have happened.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/fuzz.py --inputs 100000 --seed 1

An input may be taken, or refused with one of the exit codes 2 to 6 and all four parts of a message. Everything else is
a fault: another exception, more than five seconds, a file outside the given folder, a gigabyte of memory. Input number
N of a boundary depends on the seed and N alone: `--boundary NAME --first N --inputs 1` shows one again.
"""

from __future__ import annotations

import argparse
import faulthandler
import math
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1] / "tests"


def main() -> int:
    arguments = _arguments()
    sys.path.insert(0, str(TESTS))
    from support.fuzzing.all_boundaries import every_boundary, quiet, run_boundary
    from support.fuzzing.guard import start_watch

    # A loop in compiled code hears no alarm: in the end the process says where it hangs and stops.
    watch = start_watch()
    with tempfile.TemporaryDirectory() as home:
        with quiet():
            boundaries = every_boundary(Path(home))
        if arguments.boundary:
            boundaries = [boundary for boundary in boundaries if boundary.name in arguments.boundary]
        shares = sum(boundary.share for boundary in boundaries)
        print("| boundary | inputs | taken | refused | faults | ms each | slowest |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        faults = []
        totals = [0, 0, 0, 0]
        for boundary in boundaries:
            each = math.ceil(arguments.inputs * boundary.share / shares)
            faulthandler.dump_traceback_later(300 + each, exit=True)
            tally = run_boundary(boundary, seed=arguments.seed, num_inputs=each, watch=watch, first=arguments.first)
            faulthandler.cancel_dump_traceback_later()
            num_faults = sum(map(len, tally.faults.values()))
            row = (each, tally.counts["done"], tally.counts["refused"], num_faults)
            totals = [total + count for total, count in zip(totals, row, strict=True)]
            cells = " | ".join(f"{count:,}" for count in row)
            mean = tally.seconds / each * 1e3
            print(f"| {boundary.name} | {cells} | {mean:.1f} | {tally.slowest_seconds:.2f} s |", flush=True)
            faults += [(boundary.name, fault, tally.details[fault], numbers) for fault, numbers in tally.faults.items()]
        print(f"| all | {' | '.join(f'{total:,}' for total in totals)} | | |")
    for name, (kind, place, _), detail, numbers in faults:
        print(f"{name}: {kind} at {place}: {detail}; {len(numbers)} inputs, first {numbers[0]}")
    return 1 if faults else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=10_000, help="in all, shared out among the boundaries")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first input of each boundary")
    parser.add_argument("--boundary", action="append", help="only this one; can be repeated")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
