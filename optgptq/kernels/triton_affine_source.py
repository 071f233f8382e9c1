"""Triton kernels for codes of 2, 3, 4 and 8 bits, one source for CUDA and HIP. Importing this module imports triton.

The kernels use what the interpreter and the compilers of triton 3.6 to 3.9 share, and no inline assembly. How words are
arranged and why: `optgptq/kernels/packed_affine.py` and docs/math/affine-kernels.md.
"""

from __future__ import annotations

import triton
import triton.language as tl

# The bits of 2**23: with a code in its last places it is 2**23 + code.
_FLOAT32 = tl.constexpr(0x4B000000)


@triton.jit
def code_pairs(low, high, ones, BITS: tl.constexpr, BLOCK_O: tl.constexpr, STEP_BLOCKS: tl.constexpr):
    """Return int32 `[BLOCK_O, STEP_BLOCKS, 16]`: codes of columns `2 p` and `2 p + 1` in the halves of `ones`.

    `low` is `[STEP_BLOCKS, BLOCK_O * words of a block]`; `high`, read for 3 bits only, `[STEP_BLOCKS, BLOCK_O]`.
    """
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    words = tl.permute(tl.reshape(low, [STEP_BLOCKS, BLOCK_O, WIDTH]), (1, 0, 2))
    shifts = tl.arange(0, 16 // WIDTH) * WIDTH
    pairs = ((words[:, :, None, :] >> shifts[None, None, :, None]) & (((1 << WIDTH) - 1) * 0x00010001)) | ones
    pairs = tl.reshape(pairs, [BLOCK_O, STEP_BLOCKS, 16])
    if BITS == 3:
        # A rotation, one instruction: the word is stored turned so that no pair needs a turn by 0 or 32.
        turn = tl.arange(0, 16)[None, None, :] + 1
        bits = tl.permute(high, (1, 0)).to(tl.uint32, bitcast=True)[:, :, None]
        turned = ((bits >> turn) | (bits << (32 - turn))).to(tl.int32, bitcast=True)
        # Exclusive, so that the compiler does not take the three operands in another order, with one operation more.
        pairs = (turned & 0x00040004) ^ pairs
    return pairs


@triton.jit
def centred_codes(
    low,
    high,
    zero_point,
    ones,
    dtype: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    STEP_BLOCKS: tl.constexpr,
):
    """Return codes less `zero_point`, which broadcasts to `[BLOCK_O, STEP_BLOCKS, 16]`, as `[BLOCK_O, columns]`.

    `ones` is a pair of 1024 in float16 or of 128 in bfloat16 as an int32: with a code in the last places of each it is
    1024 + code or 128 + code. An argument, since the compiler for sm_90 joins two logic operations only where one
    operand is no constant. All is exact: whole numbers from -256 to 255 are numbers of either type.
    """
    if (BITS == 8) & (dtype == tl.bfloat16):
        # 128 + code does not fit: by way of float32.
        pairs = code_pairs(low, high, 0, BITS, BLOCK_O, STEP_BLOCKS)
        centre = (zero_point + 8388608).to(tl.float32)
        second = (((pairs >> 16) | _FLOAT32).to(tl.float32, bitcast=True) - centre).to(dtype)
        first = (((pairs & 0xFF) | _FLOAT32).to(tl.float32, bitcast=True) - centre).to(dtype)
    else:
        pairs = code_pairs(low, high, ones, BITS, BLOCK_O, STEP_BLOCKS)
        centre = (zero_point + (1024 if dtype == tl.float16 else 128)).to(tl.float32).to(dtype)
        # The second of a pair comes first: in the other order the compiler for sm_90 swaps each pair twice.
        second = (pairs >> 16).to(tl.int16).to(dtype, bitcast=True) - centre
        first = pairs.to(tl.int16).to(dtype, bitcast=True) - centre
    return tl.reshape(tl.join(first, second), [BLOCK_O, STEP_BLOCKS * 32])


@triton.jit
def codes_of_step(
    low_words,
    high_words,
    zero_points,
    step,
    group,
    row_blocks,
    zero_point,
    ones,
    dtype: tl.constexpr,
    BITS: tl.constexpr,
    HAS_ZERO_POINTS: tl.constexpr,
    STEP_BLOCKS: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """Return codes less zero points `[BLOCK_O, columns of a step]` for the rows of this program, read only once."""
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    first_row = tl.program_id(0) * BLOCK_O
    rows = first_row + tl.arange(0, BLOCK_O)
    blocks = (step * STEP_BLOCKS + tl.arange(0, STEP_BLOCKS))[:, None] * (row_blocks * BLOCK_O)
    words = first_row * WIDTH + tl.arange(0, BLOCK_O * WIDTH)
    low = tl.load(low_words + blocks * WIDTH + words[None, :], eviction_policy="evict_first")
    high = low
    if BITS == 3:
        high = tl.load(high_words + blocks + rows[None, :], eviction_policy="evict_first")
    # A zero point of 1 is a constant here, and constants have no dtype.
    centre = tl.zeros([1, 1, 1], tl.int32) + zero_point
    if HAS_ZERO_POINTS:
        centre = tl.load(zero_points + group * (row_blocks * BLOCK_O) + rows).to(tl.int32)[:, None, None]
    return centred_codes(low, high, centre, ones, dtype, BITS, BLOCK_O, STEP_BLOCKS)


@triton.jit
def inputs_of_step(x, tokens, is_token, step, num_steps, COLUMNS: tl.constexpr):
    """Return the inputs `[COLUMNS, tokens]` of one step, zero where there is no token."""
    columns = step * COLUMNS + tl.arange(0, COLUMNS)
    places = x + tokens[None, :] * (num_steps * COLUMNS) + columns[:, None]
    return tl.load(places, mask=is_token[None, :], other=0.0, eviction_policy="evict_last")


@triton.jit
def matrix_partials(
    x,
    low_words,
    high_words,
    scale,
    zero_points,
    partial,
    num_tokens,
    out_features,
    row_blocks,
    zero_point,
    ones,
    steps_per_group,
    num_steps,
    steps_per_split,
    BITS: tl.constexpr,
    HAS_ZERO_POINTS: tl.constexpr,
    STEP_BLOCKS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Write to `partial [splits, T, O]` the products of one range of steps: grid `(rows, tokens, splits)`.

    Rows of the weight are filled up to whole blocks, and inputs to whole steps: loads need no mask and are aligned.
    Weights are the left operand: on sm_90 they go from registers to the matrix unit, and tokens are filled up to 16
    only. A step lies in one group, so that a scale multiplies float32 sums of exact products.
    """
    num_rows = row_blocks * BLOCK_O
    rows = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    tokens = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    split = tl.program_id(2)
    is_token = tokens < num_tokens
    total = tl.zeros([BLOCK_O, BLOCK_T], tl.float32)
    first = split * steps_per_split
    for step in range(first, tl.minimum(first + steps_per_split, num_steps)):
        group = step // steps_per_group
        step_size = tl.load(scale + group * num_rows + rows).to(tl.float32)
        inputs = inputs_of_step(x, tokens, is_token, step, num_steps, STEP_BLOCKS * 32)
        codes = codes_of_step(
            low_words,
            high_words,
            zero_points,
            step,
            group,
            row_blocks,
            zero_point,
            ones,
            x.dtype.element_ty,
            BITS,
            HAS_ZERO_POINTS,
            STEP_BLOCKS,
            BLOCK_O,
        )
        total += step_size[:, None] * tl.dot(codes, inputs)
    target = partial + (split * num_tokens + tokens)[None, :] * out_features + rows[:, None]
    tl.store(target, total, mask=(rows < out_features)[:, None] & is_token[None, :])


@triton.jit
def dense_rows(
    low_words,
    high_words,
    scale,
    zero_points,
    dense,
    out_features,
    in_features,
    row_blocks,
    zero_point,
    ones,
    steps_per_group,
    BITS: tl.constexpr,
    HAS_ZERO_POINTS: tl.constexpr,
    STEP_BLOCKS: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """Write to `dense [O, I]` the weight, multiplied in float32 and then rounded: grid `(rows, steps)`."""
    num_rows = row_blocks * BLOCK_O
    rows = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    step = tl.program_id(1)
    group = step // steps_per_group
    codes = codes_of_step(
        low_words,
        high_words,
        zero_points,
        step,
        group,
        row_blocks,
        zero_point,
        ones,
        dense.dtype.element_ty,
        BITS,
        HAS_ZERO_POINTS,
        STEP_BLOCKS,
        BLOCK_O,
    )
    step_size = tl.load(scale + group * num_rows + rows).to(tl.float32)
    columns = step * STEP_BLOCKS * 32 + tl.arange(0, STEP_BLOCKS * 32)
    target = dense + rows.to(tl.int64)[:, None] * in_features + columns[None, :]
    is_there = (rows < out_features)[:, None] & (columns < in_features)[None, :]
    tl.store(target, (codes.to(tl.float32) * step_size[:, None]).to(dense.dtype.element_ty), mask=is_there)
