"""Triton kernels that write codes into pages, one source for CUDA and HIP. Importing this module imports triton.

Shapes: `M` tokens, `D` features of a head, padded, in parts: those of a byte are in different parts.
"""

from __future__ import annotations

import triton
import triton.language as tl

from optgptq.kernels.triton_attention_source import last_sequence
from optgptq.kernels.triton_codes_source import channels_of_parts
from optgptq.kernels.triton_fit_source import choose_range, fit, nearest
from optgptq.kernels.triton_quantized_source import load_exact


@triton.jit
def store_fields(
    code, pages, row, is_token, SHAPE: tl.constexpr, PARTS: tl.constexpr, FIELDS: tl.constexpr, BITS: tl.constexpr
):
    """Write bytes of `FIELDS` int32 codes of `BITS` bits each to rows that begin at bytes `row [M]`.

    Features of `code [M, D]` are in `PARTS` parts. Of the parts that share bytes the first has the lowest bits.
    """
    BLOCK_W: tl.constexpr = code.shape[1] // PARTS
    WIDTH: tl.constexpr = SHAPE.head_dim // PARTS
    SHARED: tl.constexpr = code.shape[1] // FIELDS
    fields = tl.reshape(code, [code.shape[0], FIELDS, SHARED]) << (tl.arange(0, FIELDS) * BITS)[None, :, None]
    feature = tl.arange(0, SHARED)
    byte, is_byte = feature // BLOCK_W * WIDTH + feature % BLOCK_W, feature % BLOCK_W < WIDTH
    target = pages + row[:, None] + byte[None, :]
    tl.store(target, tl.sum(fields, 1).to(tl.uint8), mask=is_token[:, None] & is_byte[None, :])


@triton.jit
def store_codes(code, pages, row, is_token, SHAPE: tl.constexpr, SIDE: tl.constexpr, PARTS: tl.constexpr):
    """Write codes `[M, D]`, whose features are in `PARTS` parts, to rows that begin at bytes `row [M]`."""
    code = code.to(tl.int32)
    if SIDE.bits == 3:
        # Two of the parts lie one after the other in the plane of the lower bits.
        SKIPPED: tl.constexpr = (SHAPE.head_dim // 4 + 3) // 4 * 4
        store_fields(code & 3, pages, row, is_token, SHAPE, PARTS, 4, 2)
        store_fields(code >> 2, pages, row + SKIPPED, is_token, SHAPE, PARTS, 8, 1)
    else:
        store_fields(code, pages, row, is_token, SHAPE, PARTS, PARTS, SIDE.bits)


@triton.jit
def store_parameters(scale, minimum, pages, place, is_stored):
    """Write words of scale and minimum, both values of float16, to words `place`."""
    low = scale.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    high = minimum.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) << 16
    tl.store(pages + place, tl.broadcast_to(low | high, is_stored.shape), mask=is_stored)


# The lines of a function are counted, and these arguments would be half of them.
@triton.jit(do_not_specialize=["num_tokens", "num_ranges"])
def store_tokens_of_side(
    x, pages, words, raw, slots, ranges, metrics, feedbacks, num_tokens, num_ranges, token_stride,
    SHAPE: tl.constexpr, SIDE: tl.constexpr, PARTS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
    SEARCHED: tl.constexpr, REFITS: tl.constexpr,
):  # fmt: skip
    """Write keys, or values, `[T, K, D]` of new tokens to their slots: grid `(blocks of tokens, kv heads)`.

    `pages`, `words` and `raw` are the same pages as bytes, as words of 32 bits and as numbers of an exact side. Codes
    are fitted where there are `metrics [K, D, D]`.
    """
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    kv_head = tl.program_id(1)
    is_token = tokens < num_tokens
    channel, is_channel = channels_of_parts(SHAPE, PARTS, BLOCK_D)
    is_entry = is_token[:, None] & is_channel[None, :]
    source = x + tokens.to(tl.int64)[:, None] * token_stride + kv_head * SHAPE.head_dim + channel[None, :]
    numbers = tl.load(source, mask=is_entry, other=0.0)
    slot = tl.load(slots + tokens, mask=is_token, other=0)
    head = slot // SHAPE.page_size * SHAPE.page_bytes + kv_head * SHAPE.head_bytes
    place = slot % SHAPE.page_size
    row = head + SIDE.codes + place * SIDE.row_bytes
    if SIDE.bits == 0:
        tl.store(raw + (row // SHAPE.exact_bytes)[:, None] + channel[None, :], numbers, mask=is_entry)
    else:
        LIMIT: tl.constexpr = (1 << SIDE.bits) - 1
        GROUPS: tl.constexpr = SHAPE.head_dim // SIDE.group_size
        numbers, group = numbers.to(tl.float32), channel // SIDE.group_size
        is_member = tl.broadcast_to(is_channel[None, :], numbers.shape)
        own = kv_head * (SHAPE.head_dim * SHAPE.head_dim)
        weight = None
        if metrics is not None:
            # Only the choice among ranges asks for it.
            diagonal = metrics + own + channel * (SHAPE.head_dim + 1)
            weight = tl.load(diagonal, mask=is_channel, other=0.0)[None, :]
        scale, minimum = choose_range(
            numbers, is_entry, is_member, group, weight, ranges, num_ranges, LIMIT, GROUPS, SEARCHED
        )
        if metrics is None:
            code = nearest(numbers, scale, minimum, LIMIT)
        else:
            code, scale, minimum = fit(
                numbers, scale, minimum, metrics + own, feedbacks + own, tl.where(is_channel, channel, -1), is_channel,
                group, LIMIT, GROUPS, SHAPE.head_dim, REFITS,
            )  # fmt: skip
        store_codes(tl.where(is_channel[None, :], code, 0.0), pages, row, is_token, SHAPE, SIDE, PARTS)
        first = (head + SIDE.parameters) // 4 + place * GROUPS
        is_stored = is_entry & (channel % SIDE.group_size == 0)[None, :]
        store_parameters(scale, minimum, words, first[:, None] + group[None, :], is_stored)


# The lines of a function are counted, and these arguments would be half of them.
@triton.jit(do_not_specialize=["num_tokens", "num_sequences", "num_ranges", "exact_width"])
def store_groups_of_side(
    x, exact_pages, exact_table, pages, words, slots, query_start, context_lengths, ranges, num_sequences, num_ranges,
    token_stride, exact_width,
    SHAPE: tl.constexpr, SIDE: tl.constexpr, PARTS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
    SEARCHED: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Write the groups along tokens whose last token is new, of keys or values: grid `(tokens, kv heads)`.

    A program of another token does nothing. `TRANSPOSED`: exact pages are those of keys.
    """
    token, kv_head = tl.program_id(0), tl.program_id(1)
    sequence = last_sequence(query_start, num_sequences, token, 1, 0)
    start = tl.load(query_start + sequence)
    end, context = tl.load(query_start + sequence + 1), tl.load(context_lengths + sequence)
    position = context - (end - token)
    if (position + 1) % SIDE.group_size != 0:
        return
    member = tl.arange(0, BLOCK_T)
    is_token = member < SIDE.group_size
    channel, is_channel = channels_of_parts(SHAPE, PARTS, BLOCK_D)
    first_new = context - (end - start)
    table = None if exact_table is None else exact_table + sequence.to(tl.int64) * exact_width
    numbers = load_exact(
        x, exact_pages, table, position + 1 - SIDE.group_size + member, is_token, first_new, start - first_new,
        token_stride, kv_head, channel, is_channel, SHAPE, TRANSPOSED, tl.float32,
    )  # fmt: skip
    LIMIT: tl.constexpr = (1 << SIDE.bits) - 1
    is_entry = is_token[:, None] & is_channel[None, :]
    is_member = tl.broadcast_to(is_token[:, None], numbers.shape)
    scale, minimum = choose_range(
        numbers, is_entry, is_member, channel, None, ranges, num_ranges, LIMIT, 0, SEARCHED
    )  # fmt: skip
    code = tl.where(is_entry, nearest(numbers, scale, minimum, LIMIT), 0.0)
    # A group lies in one page.
    slot = tl.load(slots + token) + 1 - SIDE.group_size
    head = slot // SHAPE.page_size * SHAPE.page_bytes + kv_head * SHAPE.head_bytes
    place = slot % SHAPE.page_size
    row = head + SIDE.codes + (place + member) * SIDE.row_bytes
    store_codes(code, pages, row, is_token, SHAPE, SIDE, PARTS)
    first = (head + SIDE.parameters) // 4 + place // SIDE.group_size * SHAPE.head_dim
    store_parameters(scale, minimum, words, (first + channel)[None, :], is_channel[None, :])
