"""Products with sign planes by triton, on CUDA and HIP devices. Importing this module imports triton.

Shapes: `T` tokens, `O` output rows, `I` input columns.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import torch

from optgptq.kernels.packed_binary import COLUMNS_PER_WORD, PackedBinary
from optgptq.kernels.triton_source import dense_weight, partial_products, sum_of_partials

# From so many tokens on, the planes are unpacked once and a dense product does the rest: a product for each plane would
# take longer. A figure of the model in docs/math/binary-kernels.md, not a measured one.
DENSE_FROM_TOKENS = 64
BLOCK_O = 64
SUM_BLOCK_O = 256
# A device of 100 to 300 processors has a few programs for each. The number does not depend on the device or on the
# tokens: the same inputs give the same sums everywhere, alone or in a batch.
TARGET_PROGRAMS = 512
# A range of fewer steps does not hide the time of its first loads.
MIN_STEPS_PER_SPLIT = 4

# Fusion is named because its default changes between versions of triton.
SMALL_OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
CUDA_OPTIONS = SMALL_OPTIONS | {"num_stages": 3}
HIP_OPTIONS = SMALL_OPTIONS | {"num_stages": 2, "matrix_instr_nonkdim": 16}


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitPlan:
    """How the steps along the columns are divided among programs.

    Attributes:
        num_steps: in all.
        steps_per_split: of one program; the last may have fewer.
        num_splits: programs for one tile of the output.
    """

    num_steps: int
    steps_per_split: int
    num_splits: int


def split_plan(weight: PackedBinary) -> SplitPlan:
    """Return the division; it depends on the weight's shape only."""
    num_steps = weight.planes_WPO.shape[0] // weight.step_words
    wanted = min(TARGET_PROGRAMS // -(-weight.out_features // BLOCK_O), num_steps // MIN_STEPS_PER_SPLIT)
    steps_per_split = -(-num_steps // max(wanted, 1))
    return SplitPlan(num_steps=num_steps, steps_per_split=steps_per_split, num_splits=-(-num_steps // steps_per_split))


def token_block(num_tokens: int) -> int:
    """Return how many tokens a program takes."""
    return 16 if num_tokens <= 16 else 32


def minus_one_pair(dtype: torch.dtype) -> int:
    """Return two -1 of a 16-bit float type as one signed 32-bit number."""
    word = {torch.float16: 0xBC00BC00, torch.bfloat16: 0xBF80BF80}[dtype]
    number: int = struct.unpack("<i", struct.pack("<I", word))[0]
    return number


def binary_matmul(x: torch.Tensor, weight: PackedBinary, *, bias_O: torch.Tensor | None = None) -> torch.Tensor:
    """Return `x @ weight.T + bias`.

    Below `DENSE_FROM_TOKENS` tokens products with signs are exact and all sums are float32; a row of the output does
    not depend on the other rows of `x`. From there on the weight is rounded to the dtype of `x` first.

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
        if x_TI.shape[0] >= DENSE_FROM_TOKENS:
            output_TO = torch.nn.functional.linear(x_TI, dense(weight, x.dtype), bias_O)
        else:
            output_TO = _by_planes(x_TI, weight, bias_O)
    return output_TO.reshape(*x.shape[:-1], weight.out_features)


def dense(weight: PackedBinary, dtype: torch.dtype) -> torch.Tensor:
    """Return the weight `[O, I]`, columns in the order of the planes, summed in float32."""
    dense_OI = torch.empty(weight.out_features, weight.in_features, dtype=dtype, device=weight.planes_WPO.device)
    grid = (-(-weight.out_features // BLOCK_O), -(-weight.in_features // COLUMNS_PER_WORD))
    dense_weight[grid](
        weight.planes_WPO,
        weight.alpha_GPO,
        weight.offset_GO,
        dense_OI,
        weight.out_features,
        weight.in_features,
        weight.group_words,
        PLANES=weight.bits,
        BLOCK_O=BLOCK_O,
        **SMALL_OPTIONS,
    )
    return dense_OI


def _by_planes(x_TI: torch.Tensor, weight: PackedBinary, bias_O: torch.Tensor | None) -> torch.Tensor:
    num_tokens, rows = x_TI.shape[0], weight.out_features
    num_missing = weight.planes_WPO.shape[0] * COLUMNS_PER_WORD - weight.in_features
    output_TO = x_TI.new_empty(num_tokens, rows)
    if num_tokens == 0:
        return output_TO
    plan = split_plan(weight)
    partial = x_TI.new_empty(plan.num_splits, num_tokens, rows, dtype=torch.float32)
    block = token_block(num_tokens)
    # Columns that the last group of the planes has and the weight has not.
    padded = x_TI if num_missing == 0 else torch.nn.functional.pad(x_TI, (0, num_missing))
    partial_products[(-(-rows // BLOCK_O), -(-num_tokens // block), plan.num_splits)](
        padded,
        weight.planes_WPO,
        weight.alpha_GPO,
        weight.offset_GO,
        partial,
        num_tokens,
        rows,
        minus_one_pair(x_TI.dtype),
        weight.group_words // weight.step_words,
        plan.num_steps,
        plan.steps_per_split,
        PLANES=weight.bits,
        STEP_WORDS=weight.step_words,
        BLOCK_O=BLOCK_O,
        BLOCK_T=block,
        **(CUDA_OPTIONS if torch.version.hip is None else HIP_OPTIONS),
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
