"""Triton kernels for sign planes, one source for CUDA and HIP. Importing this module imports triton.

The kernels use what the interpreter and the compilers of triton 3.6 to 3.9 share, and no inline assembly. Source of the
formulation: see docs/math/binary-kernels.md.
"""

from __future__ import annotations

import triton
import triton.language as tl

# The two sign bits of a pair of 16-bit floats, as a signed number.
_SIGN_BITS = tl.constexpr(0x80008000 - (1 << 32))


@triton.jit
def plane_signs(words, minus_ones, dtype: tl.constexpr, BLOCK_O: tl.constexpr, STEP_WORDS: tl.constexpr):
    """Turn words `[BLOCK_O, STEP_WORDS]` into +1 and -1 `[BLOCK_O, 32 STEP_WORDS]`, columns in order.

    One shift and one three-input logic operation make two signs. `minus_ones` is a pair of -1 in `dtype` as an int32:
    an argument, since the compiler for sm_90 joins the two logic operations only where one operand is no constant.
    """
    shifts = 15 - tl.arange(0, 16)
    pairs = ((words[:, :, None] << shifts[None, None, :]) & _SIGN_BITS) ^ minus_ones
    low = pairs.to(tl.int16).to(dtype, bitcast=True)
    high = (pairs >> 16).to(tl.int16).to(dtype, bitcast=True)
    return tl.reshape(tl.join(low, high), [BLOCK_O, STEP_WORDS * 32])


@triton.jit
def partial_products(
    x,
    planes,
    alpha,
    offset,
    partial,
    num_tokens,
    out_features,
    minus_ones,
    steps_per_group,
    num_steps,
    steps_per_split,
    PLANES: tl.constexpr,
    STEP_WORDS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Write to `partial [splits, T, O]` the products of one range of steps: grid `(rows, tokens, splits)`.

    Inputs `x` are filled up with zeros to whole steps, so that loads need no mask along the columns and are aligned.
    Weights are the left operand: on sm_90 decoded signs go from registers to the matrix unit, and tokens are padded to
    16 only. Signs are exact; coefficients multiply float32 sums.
    """
    rows = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    tokens = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    split = tl.program_id(2)
    is_row = rows < out_features
    is_token = tokens < num_tokens
    word_of_step = tl.arange(0, STEP_WORDS)
    column_of_step = tl.arange(0, STEP_WORDS * 32)
    total = tl.zeros([BLOCK_O, BLOCK_T], tl.float32)
    first = split * steps_per_split
    for step in range(first, tl.minimum(first + steps_per_split, num_steps)):
        group = step // steps_per_group
        columns = step * STEP_WORDS * 32 + column_of_step
        inputs = tl.load(
            x + tokens[None, :] * (num_steps * STEP_WORDS * 32) + columns[:, None],
            mask=is_token[None, :],
            other=0.0,
            eviction_policy="evict_last",
        )
        first_word = (step * STEP_WORDS + word_of_step) * PLANES
        for plane in tl.static_range(PLANES):
            words = tl.load(
                planes + (first_word + plane)[None, :] * out_features + rows[:, None],
                mask=is_row[:, None],
                other=0,
                eviction_policy="evict_first",
            )
            signs = plane_signs(words, minus_ones, x.dtype.element_ty, BLOCK_O, STEP_WORDS)
            coefficient = tl.load(alpha + (group * PLANES + plane) * out_features + rows, mask=is_row, other=0.0)
            total += coefficient.to(tl.float32)[:, None] * tl.dot(signs, inputs)
        constant = tl.load(offset + group * out_features + rows, mask=is_row, other=0.0)
        total += constant.to(tl.float32)[:, None] * tl.sum(inputs.to(tl.float32), 0)[None, :]
    target = partial + (split * num_tokens + tokens)[None, :] * out_features + rows[:, None]
    tl.store(target, total, mask=is_row[:, None] & is_token[None, :])


@triton.jit
def sum_of_partials(
    partial,
    bias,
    output,
    num_tokens,
    out_features,
    num_splits,
    HAS_BIAS: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """Write to `output [T, O]` the sum of `partial [splits, T, O]`, always in the same order: grid `(rows, tokens)`."""
    rows = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    token = tl.program_id(1)
    is_row = rows < out_features
    total = tl.zeros([BLOCK_O], tl.float32)
    for split in range(num_splits):
        total += tl.load(partial + (split * num_tokens + token) * out_features + rows, mask=is_row, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + rows, mask=is_row, other=0.0).to(tl.float32)
    tl.store(output + token * out_features + rows, total.to(output.dtype.element_ty), mask=is_row)


@triton.jit
def dense_weight(
    planes,
    alpha,
    offset,
    dense,
    out_features,
    in_features,
    group_words,
    PLANES: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """Write to `dense [O, I]` what the planes stand for, summed in float32: grid `(rows, words)`."""
    rows = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    word = tl.program_id(1)
    group = word // group_words
    is_row = rows < out_features
    lane = tl.arange(0, 32)
    bit = (lane >> 1) + 16 * (lane & 1)
    constant = tl.load(offset + group * out_features + rows, mask=is_row, other=0.0)
    total = tl.zeros([BLOCK_O, 32], tl.float32) + constant.to(tl.float32)[:, None]
    for plane in tl.static_range(PLANES):
        words = tl.load(planes + (word * PLANES + plane) * out_features + rows, mask=is_row, other=0)
        coefficient = tl.load(alpha + (group * PLANES + plane) * out_features + rows, mask=is_row, other=0.0)
        value = coefficient.to(tl.float32)[:, None]
        total += tl.where(((words[:, None] >> bit[None, :]) & 1) != 0, value, -value)
    columns = word * 32 + lane
    target = dense + rows.to(tl.int64)[:, None] * in_features + columns[None, :]
    tl.store(target, total.to(dense.dtype.element_ty), mask=is_row[:, None] & (columns < in_features)[None, :])
