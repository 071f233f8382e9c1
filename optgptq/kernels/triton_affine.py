"""Products with codes of 2, 3, 4 and 8 bits by triton, on CUDA and HIP devices. Importing this module imports triton.

Shapes: `T` tokens, `O` output rows, `I` input columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from optgptq.kernels.device_kind import DeviceKind, device_kind
from optgptq.kernels.packed_affine import BLOCKS_PER_STEP, COLUMNS_PER_BLOCK, ROWS_PER_BLOCK, PackedAffine
from optgptq.kernels.triton_affine_source import dense_rows, matrix_partials
from optgptq.kernels.triton_source import sum_of_partials

# Up to so many tokens the words are multiplied; beyond, the weight is made dense once for a library's product. About
# where a product with 4-bit weights stops being limited by bytes on an H200: a figure of the model in
# docs/math/affine-kernels.md, not a measured one.
MOST_MATRIX_TOKENS = 64
# What the matrix unit takes at least. A product in blocks of so many tokens gives a row the same bits in every batch.
LEAST_BLOCK_T = 16
SUM_BLOCK_O = 256
# A device of 100 to 300 processors has a few programs for each. The number does not depend on the device or on the
# tokens: the same inputs give the same sums, alone or in a batch.
TARGET_PROGRAMS = 512
# A range of fewer columns does not hide the time of its first loads.
MIN_BLOCKS_PER_SPLIT = 16

# Fusion is named because its default changes between versions of triton.
SMALL_OPTIONS: Mapping[str, object] = {"num_warps": 4, "enable_fp_fusion": True}
# Numbers of a dense weight are many registers: more threads, and no more than 64 columns.
DENSE_OPTIONS: Mapping[str, object] = {"num_warps": 8, "enable_fp_fusion": True}
DENSE_STEP_BLOCKS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitPlan:
    """How the steps along the columns are divided among programs.

    Attributes:
        step_blocks: blocks of 32 columns in a step.
        num_steps: in all.
        steps_per_split: of one program; the last may have fewer.
        num_splits: programs for one tile of the output.
    """

    step_blocks: int
    num_steps: int
    steps_per_split: int
    num_splits: int


def split_plan(weight: PackedAffine, kind: DeviceKind) -> SplitPlan:
    """Return the division; it depends on the weight's shape and the kind of device, never on the tokens."""
    step_blocks = weight.step_blocks(most_step_blocks(kind))
    num_steps = weight.num_blocks // step_blocks
    wanted = min(TARGET_PROGRAMS // weight.row_blocks, weight.num_blocks // MIN_BLOCKS_PER_SPLIT)
    steps_per_split = -(-num_steps // max(wanted, 1))
    num_splits = -(-num_steps // steps_per_split)
    return SplitPlan(
        step_blocks=step_blocks, num_steps=num_steps, steps_per_split=steps_per_split, num_splits=num_splits
    )


def most_step_blocks(kind: DeviceKind) -> int:
    """Return the most blocks of a step: HIP devices with waves of 32 run out of registers with four."""
    return 2 if kind.is_hip and kind.wave_size == 32 else BLOCKS_PER_STEP


def matrix_options(kind: DeviceKind, block_t: int) -> dict[str, object]:
    """Return what `matrix_partials` is started with for a block of tokens."""
    if not kind.is_hip:
        # A step of few tokens moves few bytes, so that more steps must be under way.
        return {**SMALL_OPTIONS, "num_stages": 4 if block_t == LEAST_BLOCK_T else 3}
    return {**SMALL_OPTIONS, "num_stages": 1 if kind.wave_size == 32 else 2, "matrix_instr_nonkdim": 16}


def token_block(num_tokens: int) -> int:
    """Return how many tokens a program takes: 16, 32 or 64, so that up to 64 the words are read once."""
    return next(size for size in (LEAST_BLOCK_T, 32, 64) if num_tokens <= size or size == 64)


def ones_of(dtype: torch.dtype) -> int:
    """Return two 1024 of float16, or two 128 of bfloat16, as one number of 32 bits."""
    return {torch.float16: 0x64006400, torch.bfloat16: 0x43004300}[dtype]


def affine_matmul(x: torch.Tensor, weight: PackedAffine, *, bias_O: torch.Tensor | None = None) -> torch.Tensor:
    """Return `x @ weight.T + bias`.

    Up to `MOST_MATRIX_TOKENS` tokens products of codes and inputs are exact and all sums and scales float32; the
    division of the sums does not depend on the tokens. Beyond, the weight is rounded to the dtype of `x` first.

    Args:
        x: `[..., I]`, float16 or bfloat16.
        weight: on the device of `x`.
        bias_O: `[O]` or None.

    Returns:
        `[..., O]` in the dtype of `x`.
    """
    x_TI = weight.ordered(x).reshape(-1, weight.in_features).contiguous()
    # A model on several devices calls this for each of them; triton starts kernels on the current one.
    with torch.cuda.device(x.get_device()):
        if x_TI.shape[0] > MOST_MATRIX_TOKENS:
            output_TO = torch.nn.functional.linear(x_TI, dense(weight, x.dtype), bias_O)
        else:
            output_TO = _by_words(x_TI, weight, bias_O, token_block(x_TI.shape[0]))
    return output_TO.reshape(*x.shape[:-1], weight.out_features)


def dense(weight: PackedAffine, dtype: torch.dtype) -> torch.Tensor:
    """Return the weight `[O, I]`, columns in the order of the words, to the bit as `AffineWeight.dequantize` has it."""
    dense_OI = torch.empty(weight.out_features, weight.in_features, dtype=dtype, device=weight.low_BOW.device)
    step_blocks = weight.step_blocks(DENSE_STEP_BLOCKS)
    dense_rows[(weight.row_blocks, -(-weight.in_features // (step_blocks * COLUMNS_PER_BLOCK)))](
        *_tensors(weight),
        dense_OI,
        weight.out_features,
        weight.in_features,
        weight.row_blocks,
        weight.zero_point,
        ones_of(dtype),
        weight.group_blocks // step_blocks,
        BITS=weight.bits,
        HAS_ZERO_POINTS=weight.zero_point_GO is not None,
        STEP_BLOCKS=step_blocks,
        BLOCK_O=ROWS_PER_BLOCK,
        **DENSE_OPTIONS,
    )
    return dense_OI


def _by_words(x_TI: torch.Tensor, weight: PackedAffine, bias_O: torch.Tensor | None, block_t: int) -> torch.Tensor:
    num_tokens, rows = x_TI.shape[0], weight.out_features
    output_TO = x_TI.new_empty(num_tokens, rows)
    if num_tokens == 0:
        return output_TO
    kind = device_kind(x_TI.device)
    plan = split_plan(weight, kind)
    partial = x_TI.new_empty(plan.num_splits, num_tokens, rows, dtype=torch.float32)
    num_missing = weight.num_blocks * COLUMNS_PER_BLOCK - weight.in_features
    # Columns that the last group of the words has and the weight has not.
    padded = x_TI if num_missing == 0 else torch.nn.functional.pad(x_TI, (0, num_missing))
    matrix_partials[(weight.row_blocks, -(-num_tokens // block_t), plan.num_splits)](
        padded,
        *_tensors(weight),
        partial,
        num_tokens,
        rows,
        weight.row_blocks,
        weight.zero_point,
        ones_of(x_TI.dtype),
        weight.group_blocks // plan.step_blocks,
        plan.num_steps,
        plan.steps_per_split,
        BITS=weight.bits,
        HAS_ZERO_POINTS=weight.zero_point_GO is not None,
        STEP_BLOCKS=plan.step_blocks,
        BLOCK_O=ROWS_PER_BLOCK,
        BLOCK_T=block_t,
        **matrix_options(kind, block_t),
    )
    sum_of_partials[(-(-rows // SUM_BLOCK_O), num_tokens)](
        partial,
        output_TO if bias_O is None else bias_O,
        output_TO,
        num_tokens,
        rows,
        plan.num_splits,
        HAS_BIAS=bias_O is not None,
        BLOCK_O=SUM_BLOCK_O,
        **SMALL_OPTIONS,
    )
    return output_TO


def _tensors(weight: PackedAffine) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return words, third bits, scales and zero points; what the weight has not is another tensor, never read."""
    high = weight.low_BOW if weight.high_BO is None else weight.high_BO
    zero_points = weight.scale_GO if weight.zero_point_GO is None else weight.zero_point_GO
    return weight.low_BOW, high, weight.scale_GO, zero_points
