"""The table of compiled kernels is that of the kernels as they are."""

from __future__ import annotations

import re
from importlib.metadata import version
from importlib.util import find_spec

import pytest

if find_spec("triton") is None:
    pytest.skip("triton is not installed: there are no wheels but for Linux", allow_module_level=True)

from compiled_kernels import PAGE, page_text, table_row
from measure.compiled import TARGETS, Usage, all_cases, can_compile, compile_case, usage

TARGET = "sm_90"
# Registers that another release of the assembler, or a change elsewhere in the kernel, may cost.
SLACK = 8
SAMPLE = (
    "attention split bf16 D=128 rows=16",
    "attention all bf16 D=128 rows=many",
    "attention all fp16 D=64 rows=many",
    "join segments bf16 D=128",
    "store keys and values bf16 D=128",
    "norm bf16 4096 with residual",
    "rotation bf16",
)


def rows() -> dict[str, list[str]]:
    """Return the cells of the page by the name of the kernel."""
    lines = [line.strip("|").split("|") for line in PAGE.read_text("utf-8").splitlines() if line.startswith("|")]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines[2:]}


def test_it_has_every_kernel_and_no_other():
    assert list(rows()) == [case.name for case in all_cases()], "run `python benchmarks/compiled_kernels.py --write`"


@pytest.mark.skipif(not can_compile(TARGET), reason=f"this build of triton has no compiler for {TARGET}")
@pytest.mark.parametrize("name", SAMPLE)
def test_registers_and_shared_memory_are_those_of_the_kernel(name, tmp_path, monkeypatch):
    if f"with triton {version('triton')}." not in PAGE.read_text("utf-8"):
        pytest.skip("the table was written with another version of triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    case = next(case for case in all_cases() if case.name == name)
    needs = usage(compile_case(case, TARGET), TARGET)
    registers, shared = (int(number) for number in re.findall(r"\d+", rows()[name][list(TARGETS).index(TARGET)]))
    assert abs(needs.registers - registers) <= SLACK, "run `python benchmarks/compiled_kernels.py --write`"
    assert needs.shared == shared


def test_a_page_says_what_was_compiled_and_leaves_out_what_was_not():
    case = all_cases()[0]
    needs = {"sm_90": Usage(registers=64, shared=128, spilled=0)}
    assert table_row(case, needs) == [case.name, "", "64, 128", "", "", ""]
    text = page_text([table_row(case, needs)])
    assert text.splitlines()[-1] == f"| {case.name} |  | 64, 128 |  |  |  |"
    assert version("triton") in text
