"""The triton kernels between products: run by the interpreter or a GPU, and compiled for devices that are not there."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from support.triton_runs import run_cases

if find_spec("triton") is None:
    pytest.skip("triton is not installed: there are no wheels but for Linux", allow_module_level=True)

from measure.compiled import TARGETS, can_compile, compile_case, problems
from measure.compiled_leaves import cases, gated_case, norm_case, rotation_case

from optgptq.kernels.triton_leaves import norm_sizes

CASES = Path(__file__).with_name("triton_leaves_cases.py")


def test_every_case_passes_in_the_interpreter(tmp_path):
    run_cases(CASES, tmp_path, {"TRITON_INTERPRET": "1"})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_every_case_passes_on_the_gpu(tmp_path):
    run_cases(CASES, tmp_path, {})


@pytest.fixture(params=list(TARGETS))
def target(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A device to compile for; what is compiled goes to a cache of the test's own."""
    if not can_compile(request.param):
        pytest.skip(f"this build of triton has no compiler for {request.param}")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return str(request.param)


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_they_compile_without_spills(target, case):
    assert problems(case, target, compile_case(case, target)) == []


@pytest.mark.parametrize(
    ("case", "names"),
    [
        (norm_case("fp16", 64, residual=False), ("row_stride",)),
        (rotation_case("fp16"), ("query_token_stride", "key_token_stride")),
        (gated_case("fp16", "silu"), ("gate_stride", "up_stride")),
    ],
    ids=["norm", "rotation", "gated"],
)
def test_strides_of_one_compile_too(case, names, target):
    """At a launch triton makes a constant of every whole number that is 1; the interpreter does not."""
    compile_case(replace(case, constants={**case.constants, **dict.fromkeys(names, 1)}, multiples=()), target)


@pytest.mark.parametrize(
    ("size", "expected"),
    [(1, (1, 1024, 2)), (128, (128, 8, 2)), (4096, (4096, 1, 8)), (5120, (8192, 1, 16)), (20000, (32768, 1, 16))],
)
def test_sizes_of_the_norm(size, expected):
    assert norm_sizes(size) == expected
