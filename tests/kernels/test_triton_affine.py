"""The triton kernels for packed codes: compiled for devices that are not there, and run by the interpreter or a GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from support.source_tree import ROOT

if find_spec("triton") is None:
    pytest.skip("triton is not installed: there are no wheels but for Linux", allow_module_level=True)

from dataclasses import replace

from measure.compiled import CompiledCase, can_compile, compile_case, nvidia_tool, problems
from measure.compiled_affine import cases, matrix_case
from support.packed_affines import affine_weight

from optgptq.kernels.device_kind import DeviceKind, device_kind
from optgptq.kernels.packed_affine import ROWS_PER_BLOCK, pack_affine
from optgptq.kernels.triton_affine import matrix_options, most_step_blocks, split_plan, token_block
from optgptq.kernels.triton_affine_source import dense_rows

CASES = Path(__file__).with_name("triton_affine_cases.py")
CUDA, WAVES_OF_64 = DeviceKind(is_hip=False, wave_size=32), DeviceKind(is_hip=True, wave_size=64)
WAVES_OF_32 = DeviceKind(is_hip=True, wave_size=32)


def test_every_case_passes_in_the_interpreter(tmp_path):
    run_cases(tmp_path, {"TRITON_INTERPRET": "1"})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_every_case_passes_on_the_gpu(tmp_path):
    run_cases(tmp_path, {})


def run_cases(folder: Path, settings: dict[str, str]) -> None:
    """Run the cases in a process of their own: triton reads the variable once, when it is imported."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= settings | {"TRITON_CACHE_DIR": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(CASES)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"^\d+ passed in", result.stdout, flags=re.MULTILINE), result.stdout


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compiled(case: CompiledCase, target: str):
    if not can_compile(target):
        pytest.skip(f"this build of triton has no compiler for {target}")
    return compile_case(case, target)


# All of the others are in the table of `benchmarks/compiled_kernels.py`.
SAMPLE = [
    matrix_case(3, "bf16", 16),
    matrix_case(8, "bf16", 64),
    next(case for case in cases() if case.kernel is dense_rows),
]


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx90a", "gfx942", "gfx1100"])
@pytest.mark.parametrize("case", SAMPLE, ids=lambda case: case.name)
def test_it_compiles_without_spills_and_uses_the_matrix_unit(case, target):
    assert problems(case, target, compiled(case, target)) == []


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("case", [matrix_case(8, "bf16", 16, has_zero_points=False), SAMPLE[2]], ids=("one", "other"))
def test_sizes_of_one_compile_too(case, target):
    """At a launch triton makes a constant of every whole number that is 1; the interpreter does not."""
    of_one = {"num_tokens", "num_steps", "steps_per_group", "steps_per_split", "row_blocks", "zero_point"}
    sizes = of_one | {"out_features", "in_features"}
    ones = {name: 1 for name in case.kernel.arg_names if name in sizes}
    compiled(replace(case, constants={**case.constants, **ones}), target)


@pytest.mark.parametrize(("bits", "kind", "most"), [(2, "fp16", 1.0), (3, "bf16", 2.4), (4, "bf16", 1.0)])
def test_a_pair_takes_a_shift_a_logic_operation_and_a_difference_on_sm_90(bits, kind, most):
    """Pairs of 16-bit floats that the source takes apart must be one register again in the machine code."""
    counts = instructions(matrix_case(bits, kind, 16))
    # Four warps share a step of 64 rows and 128 columns; beside the pairs there are addresses and the loop.
    pairs = ROWS_PER_BLOCK * 128 // 2 // (4 * 32)
    assert counts["LOP3"] <= most * pairs + 12, counts
    assert counts["SHF"] <= most * pairs + 16, counts
    assert counts["HADD2"] + counts["HFMA2"] <= pairs + 8, counts
    assert counts["PRMT"] <= 12, counts


def instructions(case: CompiledCase) -> Counter[str]:
    """Count the instructions of the loop: groups of a step need no division by their size."""
    case = replace(case, constants={**case.constants, "steps_per_group": 1})
    lines = nvidia_tool("nvdisasm", compiled(case, "sm_90").asm["cubin"], "-c").splitlines()
    labels = {line.split(":")[0]: number for number, line in enumerate(lines) if line.startswith(".L_x_")}
    loops = [
        (labels[match[1]], number)
        for number, line in enumerate(lines)
        if (match := re.search(r"BRA.*`\((\.L_x_\d+)\)", line)) and labels.get(match[1], number) < number
    ]
    begin, end = max(loops, key=lambda loop: loop[1] - loop[0])
    names = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z0-9]+)", "\n".join(lines[begin:end]), re.MULTILINE)
    return Counter(names)


@pytest.mark.parametrize(("bits", "sizes"), [(2, {16}), (3, {16, 8}), (4, {16}), (8, {16})])
def test_words_come_in_loads_of_128_bits(bits, sizes):
    """The third bits are so few that a thread takes 64 bits of a step."""
    case = matrix_case(bits, "fp16", 16)
    ptx = compiled(case, "sm_90").asm["ptx"]
    assert {int(size, 16) for size in re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?(0x\w+)", ptx)} == sizes
    # Twice the threads of a program on sm_90 share a step.
    loads = re.findall(r"global_load_(dword\w*)", compiled(case, "gfx942").asm["amdgcn"])
    wanted = {2: {"dwordx2"}, 3: {"dwordx2", "dword"}, 4: set(), 8: set()}[bits]
    assert set(loads) == wanted | {"dwordx4"}


def test_splits_and_blocks_depend_on_shapes_and_the_kind_of_device_only():
    long = pack_affine(affine_weight(64, 4096, bits=2, group_size=128))
    plan = split_plan(long, CUDA)
    assert (plan.step_blocks, plan.num_steps, plan.steps_per_split, plan.num_splits) == (4, 32, 4, 8)
    narrow = split_plan(long, WAVES_OF_32)
    assert (narrow.step_blocks, narrow.num_steps, narrow.steps_per_split, narrow.num_splits) == (2, 64, 8, 8)
    assert split_plan(pack_affine(affine_weight(8, 64, bits=4, group_size=32)), CUDA).num_splits == 1
    assert [token_block(tokens) for tokens in (1, 16, 17, 32, 33, 64, 65)] == [16, 16, 32, 32, 64, 64, 64]
    assert (most_step_blocks(CUDA), most_step_blocks(WAVES_OF_64)) == (4, 4)
    assert [matrix_options(kind, 16)["num_stages"] for kind in (CUDA, WAVES_OF_64, WAVES_OF_32)] == [4, 2, 1]
    assert device_kind(torch.device("cpu")) == CUDA
