"""The triton kernel for sign planes: compiled for devices that are not there, and run by the interpreter or a GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from support.source_tree import ROOT

if find_spec("triton") is None:
    pytest.skip("triton is not installed: there are no wheels but for Linux", allow_module_level=True)

import triton
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from optgptq.kernels import triton_source
from optgptq.kernels.triton_binary import BLOCK_O, CUDA_OPTIONS, HIP_OPTIONS, SMALL_OPTIONS, SUM_BLOCK_O

CASES = Path(__file__).with_name("triton_cases.py")
# Bytes of shared memory that one program may have.
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * 1024),
    "gfx90a": (GPUTarget("hip", "gfx90a", 64), 64 * 1024),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * 1024),
}
WAVE_OF_32 = GPUTarget("hip", "gfx1100", 32)
POINTERS = {
    "planes": "*i32",
    "alpha": "*fp16",
    "offset": "*fp16",
    "partial": "*fp32",
    "output": "*bf16",
    "bias": "*bf16",
    "dense": "*fp16",
}


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


@pytest.fixture(params=list(TARGETS))
def target(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> GPUTarget:
    """A device to compile for; what is compiled goes to a cache of the test's own."""
    wanted, _ = TARGETS[request.param]
    if not any(backend.compiler.supports_target(wanted) for backend in backends.values()):
        pytest.skip(f"this build of triton has no compiler for {wanted.backend} devices")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return wanted


@pytest.mark.parametrize(("bits", "tokens", "dtype"), [(2, 16, "*fp16"), (3, 16, "*bf16"), (4, 32, "*fp16")])
def test_the_product_compiles_without_spills_and_uses_the_matrix_unit(target, bits, tokens, dtype):
    constants = {"PLANES": bits, "BLOCK_T": tokens, "STEP_WORDS": 4, "BLOCK_O": BLOCK_O}
    kernel = compiled("partial_products", target, constants, x=dtype)
    require_fits(kernel, target)
    if target.backend == "hip":
        assert "v_mfma_f32_16x16x16" in kernel.asm["amdgcn"]
    elif target.arch == 90:
        # The left operand of wgmma in registers: signs do not go through shared memory.
        assert re.search(
            rf"wgmma\.mma_async\.sync\.aligned\.m64n{tokens}k16\.\S+ {{[^}}]+}}, {{[^}}]+}},", kernel.asm["ptx"]
        )
    else:
        assert "mma.sync.aligned.m16n8k16" in kernel.asm["ptx"]


def test_a_hip_device_with_waves_of_32_is_compiled_for(tmp_path, monkeypatch):
    """For up to 16 tokens; blocks of 32 compile too, but spill where there are four planes."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {"PLANES": 3, "BLOCK_T": 16, "STEP_WORDS": 4, "BLOCK_O": BLOCK_O}
    kernel = compiled("partial_products", WAVE_OF_32, constants, x="*fp16")
    require_fits(kernel, WAVE_OF_32)
    assert "v_wmma_f32_16x16x16" in kernel.asm["amdgcn"]


def test_one_shift_and_one_logic_operation_make_two_signs_on_sm_90(tmp_path, monkeypatch):
    """The pair of 16-bit floats that the source takes apart must be one register again in the machine code."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {"PLANES": 3, "BLOCK_T": 16, "STEP_WORDS": 4, "BLOCK_O": BLOCK_O}
    kernel = compiled("partial_products", TARGETS["sm_90"][0], constants, x="*fp16")
    machine_code = nvidia_tool("nvdisasm", kernel.asm["cubin"], "-c")
    counts = [len(re.findall(rf"\b{name}\b", machine_code)) for name in ("SHF", "LOP3", "PRMT")]
    # Four warps share a step of 64 rows, 128 columns and 3 planes; a pair takes a thread one operation of each kind.
    pairs = BLOCK_O * 128 * 3 // 2 // (4 * 32)
    assert all(count <= 1.6 * pairs for count in counts[:2]), (counts, pairs)
    assert counts[2] <= 0.5 * pairs


@pytest.mark.parametrize(
    ("name", "constants"),
    [
        ("sum_of_partials", {"HAS_BIAS": True, "BLOCK_O": SUM_BLOCK_O}),
        ("dense_weight", {"PLANES": 3, "BLOCK_O": BLOCK_O}),
    ],
)
def test_the_other_kernels_compile_without_spills(target, name, constants):
    require_fits(compiled(name, target, constants), target)


@pytest.mark.parametrize(
    ("name", "constants"),
    [
        ("partial_products", {"PLANES": 1, "STEP_WORDS": 1, "BLOCK_O": BLOCK_O, "BLOCK_T": 16}),
        ("sum_of_partials", {"HAS_BIAS": False, "BLOCK_O": SUM_BLOCK_O}),
        ("dense_weight", {"PLANES": 1, "BLOCK_O": BLOCK_O}),
    ],
)
def test_sizes_of_one_compile_too(target, name, constants):
    """At a launch triton makes a constant of every whole number that is 1; the interpreter does not."""
    sizes = {each for each in getattr(triton_source, name).arg_names if each.startswith(("num_", "steps_", "group_"))}
    compiled(name, target, constants | dict.fromkeys([*sizes, "out_features"], 1), x="*bf16")


def compiled(name: str, target: GPUTarget, constants: dict[str, Any], **pointers: str) -> Any:
    """Compile a kernel with the options that `triton_binary` starts it with."""
    kernel = getattr(triton_source, name)
    kinds = POINTERS | pointers
    signature = {each: "constexpr" if each in constants else kinds.get(each, "i32") for each in kernel.arg_names}
    place = kernel.arg_names.index
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(place(each),): value for each, value in constants.items()},
        # Tensors of torch begin at multiples of 16 bytes.
        attrs={(place(each),): [["tt.divisibility", 16]] for each, kind in signature.items() if kind[0] == "*"},
    )
    options = CUDA_OPTIONS if target.backend == "cuda" else HIP_OPTIONS
    return triton.compile(source, target=target, options=options if name == "partial_products" else SMALL_OPTIONS)


def require_fits(kernel: Any, target: GPUTarget) -> None:
    """Registers are not spilled to memory, and shared memory is within the device's limit: compilers check neither."""
    limits = [limit for known, limit in TARGETS.values() if known == target]
    assert kernel.metadata.shared <= (limits[0] if limits else 64 * 1024)
    if target.backend == "hip":
        assert kernel.asm["hsaco"][:4] == b"\x7fELF"
        assert re.search(r"\.vgpr_spill_count:\s+(\d+)", kernel.asm["amdgcn"])[1] == "0"
        assert re.search(r"\.sgpr_spill_count:\s+(\d+)", kernel.asm["amdgcn"])[1] == "0"
    else:
        usage = nvidia_tool("cuobjdump", kernel.asm["cubin"], "-res-usage")
        assert re.search(r"STACK:(\d+)", usage)[1] == "0", usage


def nvidia_tool(name: str, cubin: bytes, *options: str) -> str:
    """Run one of the programs that come with triton on machine code."""
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        result = subprocess.run([program, *options, file.name], capture_output=True, text=True, check=True)
    return result.stdout + result.stderr
