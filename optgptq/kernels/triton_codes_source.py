"""How triton kernels read rows of codes from pages, one source for CUDA and HIP. Importing this module imports triton.

The layout of a page is that of `optgptq.kv_cache.page_layout`. A row is read as words of 32 bits; a shift and a mask of
a word make two codes at a time, in its two halves. So the features of a row come in an order of their own, the order of
codes: in a word, bytes 0 and 2 together, then 1 and 3, each part by part. Queries are brought into the same order once,
and sums are brought back once; numbers that are no codes are read in the order of channels.

Shapes: `M` rows of queries, `TILE` keys, `D` features of a head, padded.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

# The bits of 2**23: with a code in its last places it is 2**23 + code.
_FLOAT32 = tl.constexpr(0x4B000000)
# Two halves of 1024 in float16 and of 128 in bfloat16: a code in the last places of each adds to it.
_FLOAT16_PAIR = tl.constexpr(0x64006400)
_BFLOAT16_PAIR = tl.constexpr(0x43004300)


class PageShape(NamedTuple):
    """A page as constants of a kernel, which triton wants hashable and takes no dataclass for.

    Attributes:
        page_bytes, head_bytes: of a page of codes and of one head in it.
        exact_bytes: of a number of an exact side.
    """

    num_kv_heads: int
    head_dim: int
    page_size: int
    page_bytes: int
    head_bytes: int
    exact_bytes: int


class CodeSide(NamedTuple):
    """Keys, or values, of a page as constants of a kernel.

    Attributes:
        bits: of a code; 0: numbers as they are.
        low_bits: of a code in the first plane of a row: 2 where codes have 3, else all.
        is_single: one scale and minimum for each token.
        by_token: groups are along tokens.
        row_bytes: of one token and head.
        codes, parameters: where they begin in a head.
    """

    bits: int
    low_bits: int
    group_size: int
    is_single: bool
    by_token: bool
    row_bytes: int
    codes: int
    parameters: int


@triton.jit
def channels_of_codes(SHAPE: tl.constexpr, SIDE: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return the channel `[D]` of each feature in the order of codes, and whether there is one."""
    feature = tl.arange(0, BLOCK_D)
    if SIDE.bits == 0:
        channel, is_channel = feature, feature < SHAPE.head_dim
    else:
        PARTS: tl.constexpr = 8 // SIDE.low_bits
        WIDTH: tl.constexpr = SHAPE.head_dim // PARTS
        place = feature // (4 * PARTS) * 4 + feature % 2 * 2 + feature // (2 * PARTS) % 2
        channel, is_channel = feature // 2 % PARTS * WIDTH + place, place < WIDTH
    return channel, is_channel


@triton.jit
def channels_of_parts(SHAPE: tl.constexpr, PARTS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return the channel `[D]` of each feature of `PARTS` parts, each filled up, and whether there is one."""
    feature = tl.arange(0, BLOCK_D)
    WIDTH: tl.constexpr = SHAPE.head_dim // PARTS
    place = feature % (BLOCK_D // PARTS)
    return feature // (BLOCK_D // PARTS) * WIDTH + place, place < WIDTH


@triton.jit
def channels_in_order(SHAPE: tl.constexpr, SIDE: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return the channel `[D]` of each feature once `in_order` moved it, and whether there is one; channels rise."""
    PARTS: tl.constexpr = 1 if SIDE.bits == 0 else 8 // SIDE.low_bits
    return channels_of_parts(SHAPE, PARTS, BLOCK_D)


@triton.jit
def in_order(sums, SIDE: tl.constexpr):
    """Return sums `[M, D]` with their features, which are in the order of codes, in that of channels."""
    if SIDE.bits != 0:
        PARTS: tl.constexpr = 8 // SIDE.low_bits
        parts = tl.reshape(sums, [sums.shape[0], sums.shape[1] // (4 * PARTS), 2, PARTS, 2])
        sums = tl.reshape(tl.permute(parts, (0, 3, 1, 4, 2)), sums.shape)
    return sums


@triton.jit
def third_bits(pages, row, is_seen, SHAPE: tl.constexpr, SIDE: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return the third bits of codes of 3 bits, at the third place of each half: `[TILE, words, codes of a half]`.

    Source: a channel `c` has its bit in byte `c % (D / 8)` of the second plane, at place `c // (D / 8)`.
    """
    BYTES: tl.constexpr = SHAPE.head_dim // 8
    SKIPPED: tl.constexpr = (SHAPE.head_dim // 4 + 3) // 4
    word, step = tl.arange(0, BLOCK_D // 16), tl.arange(0, 8)
    is_word = is_seen[:, None, None] & (word < SKIPPED)[None, :, None]
    base = pages + (row // 4 + SKIPPED)[:, None, None]
    if BYTES % 4 == 0:
        # The four bytes of a word of the first plane have theirs in one word too.
        WORDS: tl.constexpr = BYTES // 4
        words = tl.load(base + (word % WORDS)[None, :, None], mask=is_word, other=0)
        shift = (step // 4 * 8 + step % 4 * 2)[None, None, :] + (word // WORDS)[None, :, None]
        bits = ((words >> shift) & 0x00010001) << 2
    else:
        bits = tl.zeros([row.shape[0], BLOCK_D // 16, 8], tl.int32)
        for half in tl.static_range(2):
            channel = (step % 4 * (2 * BYTES) + half * 2 + step // 4)[None, None, :] + (word * 4)[None, :, None]
            byte = channel % BYTES
            words = tl.load(base + byte // 4, mask=is_word, other=0)
            bits |= ((words >> (byte % 4 * 8 + channel // BYTES)) & 1) << (16 * half + 2)
    return bits


@triton.jit
def load_codes(
    pages, row, is_seen, SHAPE: tl.constexpr, SIDE: tl.constexpr, BLOCK_D: tl.constexpr, dtype: tl.constexpr
):
    """Return codes `[TILE, D]` in the order of codes, as numbers; 0 for tokens that are not seen.

    `pages` is a pointer to words, `row [TILE]` where a token's row begins, in bytes.
    """
    LOW: tl.constexpr = SIDE.low_bits
    word, step = tl.arange(0, BLOCK_D * LOW // 32), tl.arange(0, 16 // LOW)
    is_word = is_seen[:, None] & (word < (SHAPE.head_dim * LOW + 31) // 32)[None, :]
    words = tl.load(pages + (row // 4)[:, None] + word[None, :], mask=is_word, other=0)
    pairs = (words[:, :, None] >> (step * LOW)[None, None, :]) & (((1 << LOW) - 1) * 0x00010001)
    if SIDE.bits == 3:
        pairs |= third_bits(pages, row, is_seen, SHAPE, SIDE, BLOCK_D)
    if (dtype == tl.float32) | ((dtype == tl.bfloat16) & (SIDE.bits == 8)):
        first = ((pairs & 0xFFFF) | _FLOAT32).to(tl.float32, bitcast=True) - 8388608.0
        second = (((pairs >> 16) & 0xFFFF) | _FLOAT32).to(tl.float32, bitcast=True) - 8388608.0
        first, second = first.to(dtype), second.to(dtype)
    else:
        pairs |= _FLOAT16_PAIR if dtype == tl.float16 else _BFLOAT16_PAIR
        centre = tl.full([1, 1, 1], 1024.0 if dtype == tl.float16 else 128.0, tl.float32).to(dtype)
        first = pairs.to(tl.int16).to(dtype, bitcast=True) - centre
        second = (pairs >> 16).to(tl.int16).to(dtype, bitcast=True) - centre
    return tl.reshape(tl.join(first, second), [row.shape[0], BLOCK_D])


@triton.jit
def split_parameters(words):
    """Return scales and minimums, float32, from words of two float16."""
    scale = words.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return scale, (words >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def load_parameters(pages, head, slot, is_seen, SIDE: tl.constexpr):
    """Return scale and minimum `[TILE]` of tokens that have one each; 0 for those that are not seen.

    `head [TILE]` is where the head's part of each token's page begins, in bytes.
    """
    return split_parameters(tl.load(pages + (head + SIDE.parameters) // 4 + slot, mask=is_seen, other=0))


@triton.jit
def codes_times_parameters(codes, pages, head, slot, is_seen, SHAPE: tl.constexpr, SIDE: tl.constexpr):
    """Return the numbers `[TILE, D]` that codes stand for, by the scale and minimum of each one's group."""
    BLOCK_D: tl.constexpr = codes.shape[1]
    PARTS: tl.constexpr = 8 // SIDE.low_bits
    WIDTH: tl.constexpr = SHAPE.head_dim // PARTS
    NUM_WORDS: tl.constexpr = BLOCK_D // (4 * PARTS)
    base = pages + (head + SIDE.parameters) // 4
    if SIDE.by_token or SIDE.group_size % 4 != 0 or WIDTH % 4 != 0:
        channel, is_channel = channels_of_codes(SHAPE, SIDE, BLOCK_D)
        if SIDE.by_token:
            base, index = base + slot // SIDE.group_size * SHAPE.head_dim, channel
        else:
            base, index = base + slot * (SHAPE.head_dim // SIDE.group_size), channel // SIDE.group_size
        words = tl.load(base[:, None] + index[None, :], mask=is_seen[:, None] & is_channel[None, :], other=0)
        scale, minimum = split_parameters(words)
        numbers = codes * scale + minimum
    else:
        # The places of a part that share a word share a group; where groups are whole parts, so do all of a part.
        word = tl.arange(0, 1 if SIDE.group_size % WIDTH == 0 else NUM_WORDS)
        index = (tl.arange(0, PARTS)[None, :] * WIDTH + word[:, None] * 4) // SIDE.group_size
        base += slot * (SHAPE.head_dim // SIDE.group_size)
        is_word = is_seen[:, None, None] & (word * 4 < WIDTH)[None, :, None]
        scale, minimum = split_parameters(tl.load(base[:, None, None] + index[None, :, :], mask=is_word, other=0))
        parts = tl.reshape(codes, [codes.shape[0], NUM_WORDS, 2, PARTS, 2])
        parts = parts * scale[:, :, None, :, None] + minimum[:, :, None, :, None]
        numbers = tl.reshape(parts, codes.shape)
    return numbers


@triton.jit
def load_numbers(
    pages,
    raw,
    head,
    slot,
    is_seen,
    SHAPE: tl.constexpr,
    SIDE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    dtype: tl.constexpr,
):
    """Return numbers `[TILE, D]` in the order of codes: codes themselves where a token has one scale and minimum.

    `raw` is a pointer to pages as numbers of the dtype that exact sides have.
    """
    row = head + SIDE.codes + slot * SIDE.row_bytes
    if SIDE.bits == 0:
        feature = tl.arange(0, BLOCK_D)
        is_entry = is_seen[:, None] & (feature < SHAPE.head_dim)[None, :]
        place = raw + (row // SHAPE.exact_bytes)[:, None] + feature[None, :]
        numbers = tl.load(place, mask=is_entry, other=0.0).to(dtype)
    elif SIDE.is_single:
        numbers = load_codes(pages, row, is_seen, SHAPE, SIDE, BLOCK_D, dtype)
    else:
        codes = load_codes(pages, row, is_seen, SHAPE, SIDE, BLOCK_D, tl.float32)
        numbers = codes_times_parameters(codes, pages, head, slot, is_seen, SHAPE, SIDE).to(dtype)
    return numbers
