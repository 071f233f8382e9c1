"""Triton kernels compiled for devices that are not here: what they need of registers and shared memory.

A kernel is a `CompiledCase`: its function, the kinds of its pointers, its constants, and for each target the options it
is started with and the matrix instruction that must be in the machine code. `compile_case` compiles one, `usage` reads
what it needs, `problems` says what a device would not run or would run badly. Compilers object to none of that.

Modules with cases define `cases() -> list[CompiledCase]` and are named in `CASE_MODULES` below: add a line for yours.
The table of all of them is docs/benchmarks/compiled-kernels.md; `benchmarks/compiled_kernels.py --write` writes it.
Importing this module imports triton.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import triton
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CASE_MODULES = (
    "measure.compiled_attention",
    "measure.compiled_quantized",
    "measure.compiled_leaves",
    "measure.compiled_affine",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A device to compile for, and the bytes of shared memory that one program may have there."""

    device: GPUTarget
    shared_limit: int


TARGETS: Mapping[str, Target] = {
    "sm_80": Target(device=GPUTarget("cuda", 80, 32), shared_limit=163 * 1024),
    "sm_90": Target(device=GPUTarget("cuda", 90, 32), shared_limit=227 * 1024),
    "gfx90a": Target(device=GPUTarget("hip", "gfx90a", 64), shared_limit=64 * 1024),
    "gfx942": Target(device=GPUTarget("hip", "gfx942", 64), shared_limit=64 * 1024),
    "gfx1100": Target(device=GPUTarget("hip", "gfx1100", 32), shared_limit=64 * 1024),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledCase:
    """A kernel as it is started for one kind of input.

    Attributes:
        name: of the case, the same in every table and no other case's.
        kernel: the function that `triton.jit` made.
        signature: kinds of the arguments that are no constants and no whole numbers: `"*fp16"` for a pointer, `"fp32"`
            for a float. Arguments that it does not name are `"i32"`.
        constants: by name: a mapping for all targets, or one for each target where `constants_of` has it.
        constants_of: constants of single targets, by target and name; they come before `constants`.
        options: by target: `num_warps`, `num_stages` and the like. Targets that are missing are not compiled for.
        instruction: by target: a regular expression of the matrix instruction that the text must have (PTX for CUDA,
            AMDGCN for HIP); nothing where the kernel multiplies no matrices.
        multiples: whole numbers that are multiples of 16, as triton finds at a launch; pointers always are.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    constants_of: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    options: Mapping[str, Mapping[str, Any]]
    instruction: Mapping[str, str] = field(default_factory=dict)
    multiples: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What one program of a compiled kernel needs.

    Attributes:
        registers: of 32 bits for each thread; on HIP the vector registers, accumulation registers included.
        shared: bytes of shared memory.
        spilled: registers on HIP, bytes of stack on CUDA, that do not fit and are kept in memory.
    """

    registers: int
    shared: int
    spilled: int


def all_cases() -> list[CompiledCase]:
    """Return the cases of every module in `CASE_MODULES`, in order."""
    return [case for name in CASE_MODULES for case in import_module(name).cases()]


def can_compile(target: str) -> bool:
    """Say whether this build of triton has a compiler for a target."""
    return any(backend.compiler.supports_target(TARGETS[target].device) for backend in backends.values())


def compile_case(case: CompiledCase, target: str) -> Any:
    """Return triton's compiled kernel; its texts are in `asm`, and `TRITON_CACHE_DIR` keeps it."""
    constants = {**case.constants, **case.constants_of.get(target, {})}
    names = case.kernel.arg_names
    kinds = {name: "constexpr" if name in constants else case.signature.get(name, "i32") for name in names}
    source = ASTSource(
        fn=case.kernel,
        signature=kinds,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        # Tensors of torch begin at multiples of 16 bytes.
        attrs={
            (place,): [["tt.divisibility", 16]]
            for place, (name, kind) in enumerate(kinds.items())
            if kind[0] == "*" or name in case.multiples
        },
    )
    return triton.compile(source, target=TARGETS[target].device, options=dict(case.options[target]))


def usage(kernel: Any, target: str) -> Usage:
    """Return what a compiled kernel needs."""
    shared = int(kernel.metadata.shared)
    if TARGETS[target].device.backend == "hip":
        text = kernel.asm["amdgcn"]
        spilled = _number(r"\.vgpr_spill_count:\s+(\d+)", text)
        # Scalar registers that do not fit are kept in lanes of vector registers as long as there are any.
        if _number(r"\.private_segment_fixed_size:\s+(\d+)", text):
            spilled += _number(r"\.sgpr_spill_count:\s+(\d+)", text)
        return Usage(registers=_number(r"\.vgpr_count:\s+(\d+)", text), shared=shared, spilled=spilled)
    text = nvidia_tool("cuobjdump", kernel.asm["cubin"], "-res-usage")
    return Usage(registers=_number(r"REG:(\d+)", text), shared=shared, spilled=_number(r"STACK:(\d+)", text))


def problems(case: CompiledCase, target: str, kernel: Any) -> list[str]:
    """Return one sentence for everything that a device would refuse or that would make the kernel slow there."""
    needs, limit = usage(kernel, target), TARGETS[target].shared_limit
    is_hip = TARGETS[target].device.backend == "hip"
    found = []
    if kernel.asm["hsaco" if is_hip else "cubin"][:4] != b"\x7fELF":
        found.append("The result is no machine code.")
    if needs.spilled:
        found.append(f"{needs.spilled} registers or bytes of registers are kept in memory.")
    if needs.shared > limit:
        found.append(f"{needs.shared} bytes of shared memory are needed, and the device has {limit}.")
    wanted = case.instruction.get(target)
    if wanted is not None and re.search(wanted, kernel.asm["amdgcn" if is_hip else "ptx"]) is None:
        found.append(f"No instruction matches {wanted}.")
    return [f"{case.name} for {target}: {sentence}" for sentence in found]


def nvidia_tool(name: str, cubin: bytes, *options: str) -> str:
    """Run one of the programs that come with triton on machine code and return what it prints."""
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        result = subprocess.run([program, *options, file.name], capture_output=True, text=True, check=True)
    return result.stdout + result.stderr


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    assert match is not None, pattern
    return int(match[1])
