"""Cases of the kernels for packed codes, with the sizes and options that they are started with."""

from __future__ import annotations

from measure.compiled import TARGETS, CompiledCase
from optgptq.kernels.device_kind import DeviceKind
from optgptq.kernels.packed_affine import ROWS_PER_BLOCK
from optgptq.kernels.triton_affine import DENSE_OPTIONS, DENSE_STEP_BLOCKS, matrix_options, most_step_blocks
from optgptq.kernels.triton_affine_source import dense_rows, matrix_partials

POINTERS = {"low_words": "*i32", "high_words": "*i32", "scale": "*fp16", "partial": "*fp32"}


def cases() -> list[CompiledCase]:
    """Return what is compiled for the table: every width, zero points of every kind, every block of tokens."""
    products = [(bits, kind, 16) for bits in (2, 3, 4, 8) for kind in ("fp16", "bf16")]
    wider = [(bits, "bf16", tokens) for bits in (3, 4, 8) for tokens in (32, 64)]
    return [
        *(matrix_case(bits, kind, tokens) for bits, kind, tokens in [*products, *wider]),
        matrix_case(4, "fp16", 16, has_zero_points=False),
        matrix_case(4, "bf16", 16, step_blocks=1),
        *(_dense_case(bits, "bf16") for bits in (3, 4, 8)),
    ]


def matrix_case(
    bits: int, kind: str, tokens: int, *, has_zero_points: bool = True, step_blocks: int | None = None
) -> CompiledCase:
    """Return a case of `matrix_partials` with blocks of `tokens` tokens; groups of 128 columns, or smaller ones."""
    kinds = {name: _device_kind(name) for name in TARGETS}
    constants = {"BITS": bits, "HAS_ZERO_POINTS": has_zero_points, "BLOCK_O": ROWS_PER_BLOCK, "BLOCK_T": tokens}
    steps = {name: {"STEP_BLOCKS": step_blocks or most_step_blocks(each)} for name, each in kinds.items()}
    zero_points = "own" if has_zero_points else "common"
    label = "" if step_blocks is None else f", steps of {32 * step_blocks} columns"
    return CompiledCase(
        name=f"codes x inputs, {bits} bits, {kind}, {tokens} tokens, {zero_points} zero points{label}",
        kernel=matrix_partials,
        signature=_pointers(bits) | {"x": f"*{kind}"},
        constants=constants,
        constants_of=steps,
        options={name: matrix_options(each, tokens) for name, each in kinds.items()},
        instruction={
            "sm_80": r"mma\.sync\.aligned\.m16n8k16",
            # The left operand of wgmma in registers: codes do not go through shared memory once they are numbers.
            "sm_90": rf"wgmma\.mma_async\.sync\.aligned\.m64n{tokens}k16\.\S+ {{[^}}]+}}, {{[^}}]+}},",
            "gfx90a": r"v_mfma_f32_16x16x16",
            "gfx942": r"v_mfma_f32_16x16x16",
            "gfx1100": r"v_wmma_f32_16x16x16",
        },
    )


def _dense_case(bits: int, kind: str) -> CompiledCase:
    return CompiledCase(
        name=f"codes to numbers, {bits} bits, {kind}",
        kernel=dense_rows,
        signature=_pointers(bits) | {"dense": f"*{kind}"},
        constants={
            "BITS": bits,
            "HAS_ZERO_POINTS": True,
            "STEP_BLOCKS": DENSE_STEP_BLOCKS,
            "BLOCK_O": ROWS_PER_BLOCK,
        },
        options=dict.fromkeys(TARGETS, DENSE_OPTIONS),
    )


def _pointers(bits: int) -> dict[str, str]:
    return POINTERS | {"zero_points": "*i16" if bits == 8 else "*u8"}


def _device_kind(target: str) -> DeviceKind:
    device = TARGETS[target].device
    return DeviceKind(is_hip=device.backend == "hip", wave_size=device.warp_size)
