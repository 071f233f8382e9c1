"""Triton kernels between the products of a layer, one source for CUDA and HIP. Importing this module imports triton.

They compute in float32 and round once. Each replaces several launches of single operations.
"""

from __future__ import annotations

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["num_rows"])
def norm_rows(
    x, weight, residual, output, num_rows, row_stride, eps,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Write to `output [rows, SIZE]` the rows of `x` over their root mean square, times `weight` where there is one.

    Where there is a residual, `x` is added to it first: the sum is rounded, written over the residual and normed.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    is_column = (column < SIZE)[None, :]
    is_entry = (row < num_rows)[:, None] & is_column
    numbers = tl.load(x + row[:, None] * row_stride + column[None, :], mask=is_entry, other=0.0).to(tl.float32)
    place = row[:, None] * SIZE + column[None, :]
    if residual is not None:
        total = numbers + tl.load(residual + place, mask=is_entry, other=0.0).to(tl.float32)
        rounded = total.to(residual.dtype.element_ty)
        tl.store(residual + place, rounded, mask=is_entry)
        numbers = rounded.to(tl.float32)
    mean = tl.sum(numbers * numbers, 1) / SIZE
    numbers = numbers * tl.rsqrt(mean + eps)[:, None]
    if weight is not None:
        numbers *= tl.load(weight + column[None, :], mask=is_column, other=0.0).to(tl.float32)
    tl.store(output + place, numbers.to(output.dtype.element_ty), mask=is_entry)


@triton.jit
def rotate_heads(
    heads, cosine, sine, token, first_head, num_heads, token_stride,
    HEAD_DIM: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Rotate features `i` and `HALF + i` of some heads of one token by its angle, in place."""
    head = first_head + tl.arange(0, BLOCK_H)
    feature = tl.arange(0, BLOCK_HALF)
    is_feature = feature < HALF
    is_entry = (head < num_heads)[:, None] & is_feature[None, :]
    cosines = tl.load(cosine + token * HALF + feature, mask=is_feature, other=0.0).to(tl.float32)[None, :]
    sines = tl.load(sine + token * HALF + feature, mask=is_feature, other=0.0).to(tl.float32)[None, :]
    place = heads + token * token_stride + head[:, None] * HEAD_DIM + feature[None, :]
    first = tl.load(place, mask=is_entry, other=0.0).to(tl.float32)
    second = tl.load(place + HALF, mask=is_entry, other=0.0).to(tl.float32)
    dtype: tl.constexpr = heads.dtype.element_ty
    tl.store(place, (first * cosines - second * sines).to(dtype), mask=is_entry)
    tl.store(place + HALF, (second * cosines + first * sines).to(dtype), mask=is_entry)


@triton.jit
def rotate_query_and_key(
    query, key, cosine, sine, query_token_stride, key_token_stride,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Rotate heads `[T, N, D]` and `[T, K, D]` in place: grid `(tokens, blocks of query heads and of key heads)`."""
    token, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    QUERY_BLOCKS: tl.constexpr = (NUM_HEADS + BLOCK_H - 1) // BLOCK_H
    if block < QUERY_BLOCKS:
        rotate_heads(
            query, cosine, sine, token, block * BLOCK_H, NUM_HEADS, query_token_stride, HEAD_DIM, HALF, BLOCK_HALF,
            BLOCK_H,
        )  # fmt: skip
    else:
        rotate_heads(
            key, cosine, sine, token, (block - QUERY_BLOCKS) * BLOCK_H, NUM_KV_HEADS, key_token_stride, HEAD_DIM, HALF,
            BLOCK_HALF, BLOCK_H,
        )  # fmt: skip


@triton.jit
def sigmoid(x):
    """Return `1 / (1 + exp(-x))`."""
    return 1.0 / (1.0 + tl.exp2(-x * _LOG2_E))


@triton.jit
def activated(x, KIND: tl.constexpr):
    """Return the activation of float32 numbers."""
    if KIND == "silu":
        result = x * sigmoid(x)
    elif KIND == "quick_gelu":
        result = x * sigmoid(1.702 * x)
    elif KIND == "relu":
        result = tl.maximum(x, 0.0)
    elif KIND == "gelu":
        result = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        tl.static_assert(KIND == "gelu_tanh")
        # 1/2 (1 + tanh(y)) is the sigmoid of 2 y.
        result = x * sigmoid(2.0 * 0.7978845608028654 * (x + 0.044715 * x * x * x))
    return result


@triton.jit(do_not_specialize=["num_rows"])
def gated_rows(
    gate, up, output, num_rows, gate_stride, up_stride, SIZE: tl.constexpr, BLOCK: tl.constexpr, KIND: tl.constexpr
):
    """Write to `output [rows, SIZE]` the activation of `gate` times `up`: grid `(rows, blocks of columns)`."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_column = column < SIZE
    gates = tl.load(gate + row * gate_stride + column, mask=is_column, other=0.0).to(tl.float32)
    ups = tl.load(up + row * up_stride + column, mask=is_column, other=0.0).to(tl.float32)
    result = activated(gates, KIND) * ups
    tl.store(output + row * SIZE + column, result.to(output.dtype.element_ty), mask=is_column)


@triton.jit(do_not_specialize=["num_tokens"])
def store_rows(
    key, value, keys, values, slots, num_tokens, key_token_stride, value_token_stride,
    NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Write keys and values `[T, K, D]` of new tokens to their slots: grid `(blocks of tokens, kv heads)`.

    Neighbouring lanes write neighbouring tokens of a key's feature, and neighbouring features of a value.
    """
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    kv_head = tl.program_id(1)
    is_token = tokens < num_tokens
    feature = tl.arange(0, BLOCK_D)
    is_feature = feature < HEAD_DIM
    slot = tl.load(slots + tokens, mask=is_token, other=0)
    page = (slot // PAGE * NUM_KV_HEADS + kv_head) * (HEAD_DIM * PAGE)
    token = tokens.to(tl.int64)
    is_key = is_feature[:, None] & is_token[None, :]
    source = key + feature[:, None] + (token * key_token_stride + kv_head * HEAD_DIM)[None, :]
    target = keys + feature[:, None] * PAGE + (page + slot % PAGE)[None, :]
    tl.store(target, tl.load(source, mask=is_key, other=0.0).to(keys.dtype.element_ty), mask=is_key)
    is_value = is_token[:, None] & is_feature[None, :]
    source = value + (token * value_token_stride + kv_head * HEAD_DIM)[:, None] + feature[None, :]
    target = values + (page + slot % PAGE * HEAD_DIM)[:, None] + feature[None, :]
    tl.store(target, tl.load(source, mask=is_value, other=0.0).to(values.dtype.element_ty), mask=is_value)
