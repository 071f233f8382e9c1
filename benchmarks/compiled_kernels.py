"""Registers and shared memory of every triton kernel for devices that are not here: the table of compiled kernels."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version

from measure.cases import REPOSITORY
from measure.compiled import TARGETS, CompiledCase, Usage, all_cases, can_compile, compile_case, problems, usage

PAGE = REPOSITORY / "docs" / "benchmarks" / "compiled-kernels.md"
INTRODUCTION = """# Triton kernels as compiled

Written by `python benchmarks/compiled_kernels.py --write`, with triton {version}. Every kernel is compiled for every
target with the sizes and options that it is started with; `sm_` is CUDA, `gfx` is HIP. A cell is the 32-bit registers
of a thread (on HIP with accumulation registers) and the bytes of shared memory of a program; it is empty where the
kernel runs, but keeps registers in memory. Nothing is timed here, and none of the HIP kernels ran on a device.

The program fails where registers are kept in memory, where shared memory is beyond the device's, and where the wanted
matrix instruction is missing. Names say mode, dtype, head dimension D, and rows of a sequence.
"""


def main() -> int:
    """Compile everything, print the table and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.relative_to(REPOSITORY)}")
    arguments = parser.parse_args()
    targets = [target for target in TARGETS if can_compile(target)]
    if targets != list(TARGETS):
        parser.error(f"this build of triton has compilers only for {', '.join(targets)}")
    rows, found = [], []
    for case in all_cases():
        print(case.name, file=sys.stderr, flush=True)
        needs: dict[str, Usage] = {}
        for target in case.options:
            kernel = compile_case(case, target)
            needs[target] = usage(kernel, target)
            found += problems(case, target, kernel)
        rows.append(table_row(case, needs))
    page = page_text(rows)
    print(page)
    if arguments.write:
        PAGE.write_text(page, "utf-8")
    for sentence in found:
        print(sentence, file=sys.stderr)
    return 1 if found else 0


def table_row(case: CompiledCase, needs: dict[str, Usage]) -> list[str]:
    """Return the cells of one kernel."""
    cells = [f"{needs[target].registers}, {needs[target].shared}" if target in needs else "" for target in TARGETS]
    return [case.name, *cells]


def page_text(rows: Sequence[Sequence[str]]) -> str:
    """Return the page with these rows."""
    lines = [["kernel", *TARGETS], ["---"] * (1 + len(TARGETS)), *rows]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return f"{INTRODUCTION.format(version=version('triton'))}\n{table}\n"


if __name__ == "__main__":
    sys.exit(main())
