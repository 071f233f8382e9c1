"""Triton kernel for attention over codes in pages, one source for CUDA and HIP. Importing this module imports triton.

Names and formulas: docs/math/paged-attention-gpu.md. Rows, blocks, segments and states are those of
`triton_attention_source`. Of a segment a program takes the tiles that hold codes of any of its rows first, then those
that hold exact keys; both loops mask each row by itself, so that no row sees which other rows there are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from optgptq.kernels.triton_attention_source import (
    block_place,
    finished,
    joined,
    key_range,
    ruled,
    store_state,
)
from optgptq.kernels.triton_codes_source import (
    channels_in_order,
    channels_of_codes,
    in_order,
    load_numbers,
    load_parameters,
)


@triton.jit
def visible_scores(scores, visible, key, position, slope, rule, ROUND_ALIBI: tl.constexpr):
    """Return scores `[M, TILE]` by the rule, minus infinity where a row does not read a key from here."""
    window, scale, softcap, alibi_scale = rule
    scores = ruled(scores * scale, key, position, slope, softcap, alibi_scale, ROUND_ALIBI)
    visible &= key[None, :] <= position[:, None]
    if window is not None:
        visible &= key[None, :] > position[:, None] - window
    return tl.where(visible, scores, float("-inf"))


@triton.jit
def next_weights(scores, highest, total):
    """Return the weights of a tile, the factor of what was summed before, and the new highest scores and totals."""
    new = tl.maximum(highest, tl.max(scores, 1))
    shift = tl.where(new == float("-inf"), 0.0, new)
    weights = tl.exp2(scores - shift[:, None])
    change = tl.exp2(highest - shift)
    return weights, change, new, total * change + tl.sum(weights, 1)


@triton.jit
def page_places(table, key, is_seen, PAGE: tl.constexpr, TILE: tl.constexpr):
    """Return the page of each key, int64; page 0 for those that are not seen."""
    # Said where the compiler for HIP does not see it: slots of a page are neighbours, for loads of many at once.
    NEIGHBOURS: tl.constexpr = PAGE & -PAGE if (PAGE & -PAGE) < TILE else TILE
    page = tl.load(table + key // PAGE, mask=is_seen, other=0).to(tl.int64)
    return tl.max_constancy(page, [NEIGHBOURS])


@triton.jit
def attend_codes(
    q, pages, raw, table, kv_head, position, first_exact, slope, first, end, tiles, num_sinks, rule,
    SHAPE: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, TILE: tl.constexpr, ROUND_ALIBI: tl.constexpr,
):  # fmt: skip
    """Return the softmax state `[M], [M], [M, D]` over codes at positions `first .. end - 1`, features in order.

    `q` has its features in the order of the keys' codes. With one scale `s` and minimum `m` of a token, a score is
    `s (q . codes) + m sum(q)`, and weights are multiplied by `s` for the sums, `m` being added to all channels alike.
    """
    BLOCK_M: tl.constexpr = q.shape[0]
    BLOCK_D: tl.constexpr = q.shape[1]
    # Products of weights and scales are as small as float16 has no numbers.
    WIDE: tl.constexpr = tl.float32 if q.dtype == tl.float32 else tl.bfloat16
    VALUE: tl.constexpr = WIDE if VALUES.is_single else q.dtype
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total, minimums = tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M], tl.float32)
    sums = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if KEYS.is_single:
        # By the matrix unit too: the order of a sum over a layout could depend on the number of rows.
        q_sum = tl.max(tl.dot(q, tl.full([BLOCK_D, 16], 1.0, tl.float32).to(q.dtype), input_precision="ieee"), 1)
    for tile in range(tiles[0], tiles[1]):
        key = tile * TILE + tl.arange(0, TILE)
        is_seen = (key >= first) & (key < end)
        page = page_places(table, key, is_seen, SHAPE.page_size, TILE)
        head, slot = page * SHAPE.page_bytes + kv_head * SHAPE.head_bytes, key % SHAPE.page_size
        k = load_numbers(pages, raw, head, slot, is_seen, SHAPE, KEYS, BLOCK_D, q.dtype)
        v = load_numbers(pages, raw, head, slot, is_seen, SHAPE, VALUES, BLOCK_D, VALUE)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if KEYS.is_single:
            scale, minimum = load_parameters(pages, head, slot, is_seen, KEYS)
            scores = scores * scale[None, :] + q_sum[:, None] * minimum[None, :]
        visible = (key >= num_sinks)[None, :] & (key[None, :] < first_exact[:, None])
        scores = visible_scores(scores, visible, key, position, slope, rule, ROUND_ALIBI)
        weights, change, highest, total = next_weights(scores, highest, total)
        if VALUES.is_single:
            scale, minimum = load_parameters(pages, head, slot, is_seen, VALUES)
            minimums = minimums * change + tl.sum(weights * minimum[None, :], 1)
            weights *= scale[None, :]
        sums = tl.dot(weights.to(VALUE), v, sums * change[:, None], input_precision="ieee")
    return highest, total, in_order(sums + minimums[:, None], VALUES)


@triton.jit
def load_exact(
    own, pages, table, key, is_seen, first_new, own_place, stride, kv_head, channel, is_channel,
    SHAPE: tl.constexpr, TRANSPOSED: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Return exact numbers `[TILE, D]`; those of the step itself from `own`, earlier ones from pages, if there are any.

    `own_place` is where position 0 of the sequence would be in `own`. Keys lie `TRANSPOSED` in pages.
    """
    is_entry = is_seen[:, None] & is_channel[None, :]
    is_new = (key >= first_new)[:, None]
    place = own + (own_place + key).to(tl.int64)[:, None] * stride + kv_head * SHAPE.head_dim + channel[None, :]
    numbers = tl.load(place, mask=is_entry & is_new, other=0.0).to(dtype)
    if pages is not None:
        PAGE: tl.constexpr = SHAPE.page_size
        is_kept = is_seen & (key < first_new)
        page = page_places(table, key, is_kept, PAGE, key.shape[0])
        head = pages + (page * SHAPE.num_kv_heads + kv_head) * (SHAPE.head_dim * PAGE)
        if TRANSPOSED:
            place = head[None, :] + (key % PAGE)[None, :] + channel[:, None] * PAGE
            kept = tl.trans(tl.load(place, mask=is_kept[None, :] & is_channel[:, None], other=0.0))
        else:
            place = head[:, None] + (key % PAGE * SHAPE.head_dim)[:, None] + channel[None, :]
            kept = tl.load(place, mask=is_kept[:, None] & is_channel[None, :], other=0.0)
        numbers = tl.where(is_new, numbers, kept.to(dtype))
    return numbers


@triton.jit
def attend_exact(
    q, state, own_key, own_value, exact_keys, exact_values, table, kv_head, position, first_exact, slope, begin, end,
    least, places, strides, tiles, num_sinks, rule,
    SHAPE: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, TILE: tl.constexpr, ROUND_ALIBI: tl.constexpr,
):  # fmt: skip
    """Return the softmax state `[M], [M], [M, D]` with exact keys joined to it: first tokens, and from `least` on.

    `tiles` are two ranges one after the other. `places` are the first new position and where position 0 would be in the
    step's own tokens.
    """
    BLOCK_D: tl.constexpr = q.shape[1]
    highest, total, sums = state
    key_channel, is_key_channel = channels_in_order(SHAPE, KEYS, BLOCK_D)
    value_channel, is_value_channel = channels_in_order(SHAPE, VALUES, BLOCK_D)
    first_sink, num_sink_tiles, first_late, num_tiles = tiles
    for index in range(num_tiles):
        tile = tl.where(index < num_sink_tiles, first_sink + index, first_late + index - num_sink_tiles)
        key = tile * TILE + tl.arange(0, TILE)
        is_seen = (key >= begin) & (key < end) & ((key < num_sinks) | (key >= least))
        k = load_exact(
            own_key, exact_keys, table, key, is_seen, places[0], places[1], strides[0], kv_head,
            key_channel, is_key_channel, SHAPE, True, q.dtype,
        )  # fmt: skip
        v = load_exact(
            own_value, exact_values, table, key, is_seen, places[0], places[1], strides[1], kv_head,
            value_channel, is_value_channel, SHAPE, False, q.dtype,
        )  # fmt: skip
        visible = (key < num_sinks)[None, :] | (key[None, :] >= first_exact[:, None])
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        scores = visible_scores(scores, visible, key, position, slope, rule, ROUND_ALIBI)
        weights, change, highest, total = next_weights(scores, highest, total)
        sums = tl.dot(weights.to(q.dtype), v, sums * change[:, None], input_precision="ieee")
    return highest, total, sums


@triton.jit
def exact_ranges(begin, end, least, num_sinks, low, high, TILE: tl.constexpr):
    """Return of the tiles `low .. high - 1` the first with first tokens, their number, the first late one, and all."""
    sink_end = tl.minimum(num_sinks, end)
    first_sink = tl.maximum(begin // TILE, low)
    end_sink = tl.where(begin < sink_end, tl.minimum(tl.cdiv(sink_end, TILE), high), first_sink)
    num_sink_tiles = tl.maximum(end_sink - first_sink, 0)
    late = tl.maximum(begin, least)
    # A tile of both kinds is one of the first.
    first_late = tl.maximum(tl.maximum(late // TILE, low), first_sink + num_sink_tiles)
    end_late = tl.where(late < end, tl.minimum(tl.cdiv(end, TILE), high), first_late)
    return first_sink, num_sink_tiles, first_late, num_sink_tiles + tl.maximum(end_late - first_late, 0)


@triton.jit
def load_rows(query, place, is_row, channel, is_channel):
    """Return queries `[M, D]` with these channels, zeros where there is none."""
    return tl.load(query + place[:, None] + channel[None, :], mask=is_row[:, None] & is_channel[None, :], other=0.0)


@triton.jit
def attend_segment(
    query, place, is_row, sources, kv_head, position, first_exact, slope, span, new, strides, low, num_sinks, rule,
    SHAPE: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr,
    NUM_TILES: tl.constexpr, ROUND_ALIBI: tl.constexpr,
):  # fmt: skip
    """Return the softmax state of rows over the tiles from `low` on: codes, then exact keys.

    `span` is the range of keys that any row sees; `new` the first new position, and where position 0 would be in the
    step's own tokens.
    """
    pages, raw, table, own_key, own_value, exact_keys, exact_values, exact_table, exact_row = sources
    kept_table = None if exact_table is None else exact_table + exact_row
    begin, end = span
    least, high = tl.min(first_exact, 0), low + NUM_TILES
    first_code, end_code = tl.maximum(begin, num_sinks), tl.minimum(tl.max(first_exact, 0), end)
    first_tile = tl.maximum(first_code // TILE, low)
    end_tile = tl.where(first_code < end_code, tl.minimum(tl.cdiv(end_code, TILE), high), first_tile)
    channel, is_channel = channels_of_codes(SHAPE, KEYS, BLOCK_D)
    state = attend_codes(
        load_rows(query, place, is_row, channel, is_channel), pages, raw, table, kv_head, position, first_exact, slope,
        first_code, end_code, (first_tile, end_tile), num_sinks, rule, SHAPE, KEYS, VALUES, TILE, ROUND_ALIBI,
    )  # fmt: skip
    channel, is_channel = channels_in_order(SHAPE, KEYS, BLOCK_D)
    return attend_exact(
        load_rows(query, place, is_row, channel, is_channel), state, own_key, own_value, exact_keys, exact_values,
        kept_table, kv_head, position, first_exact, slope, begin, end, least, new, strides,
        exact_ranges(begin, end, least, num_sinks, low, high, TILE), num_sinks, rule, SHAPE, KEYS, VALUES, TILE,
        ROUND_ALIBI,
    )  # fmt: skip


# The lines of a function are counted, and these arguments would be half of them.
@triton.jit(do_not_specialize=["num_tokens", "num_sequences", "table_width", "exact_width", "num_sinks"])
def quantized_attention_of_rows(
    query, own_key, own_value, pages, raw, exact_keys, exact_values, query_start, context_lengths, page_table,
    exact_table, first_exact_of, slopes, sinks, output, states, num_tokens, num_sequences, query_stride, key_stride,
    value_stride, table_width, exact_width, num_sinks, window, scale, softcap, alibi_scale,
    SHAPE: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, NUM_HEADS: tl.constexpr, BLOCK_D: tl.constexpr,
    TILE: tl.constexpr, SEGMENT: tl.constexpr, BLOCK_M: tl.constexpr, MODE: tl.constexpr, ROUND_ALIBI: tl.constexpr,
):  # fmt: skip
    """Attention of a block of rows of one key/value head: grid `(blocks, kv heads, segments or 1)`.

    `MODE` "all" joins the segments as they come and writes `output [T, N, D]`. "split" takes one; its sums
    `[S, T, N, D]` go to `output`, its highest scores and totals to `states [2, S, T, N]`, for `join_segments`.
    """
    GROUP: tl.constexpr = NUM_HEADS // SHAPE.num_kv_heads
    PER_SEGMENT: tl.constexpr = SEGMENT // TILE
    kv_head, segment = tl.program_id(1), tl.program_id(2)
    sequence, start, num_new, first_row = block_place(query_start, num_sequences, tl.program_id(0), GROUP, BLOCK_M)
    if first_row >= num_new * GROUP:
        return
    first_new = tl.load(context_lengths + sequence) - num_new
    begin, end = key_range(first_new, num_new, first_row, window, GROUP, BLOCK_M)
    first_segment, end_segment = begin // SEGMENT, tl.cdiv(end, SEGMENT)
    if MODE == "split":
        first_segment, end_segment = tl.maximum(first_segment, segment), tl.minimum(end_segment, segment + 1)
        if first_segment >= end_segment:
            return
    rows = first_row + tl.arange(0, BLOCK_M)
    is_row = rows < num_new * GROUP
    head = kv_head * GROUP + rows % GROUP
    # Rows beyond the last see what that one sees, and nothing that was never stored.
    offset = tl.minimum(rows // GROUP, num_new - 1)
    token, position = (start + offset).to(tl.int64), first_new + offset
    first_exact = tl.load(first_exact_of + token)
    slope = None if slopes is None else tl.load(slopes + head, mask=is_row, other=0.0)
    place = token * query_stride + head * SHAPE.head_dim
    table = page_table + sequence.to(tl.int64) * table_width
    exact_row = sequence.to(tl.int64) * exact_width
    rule = (window, scale, softcap, alibi_scale)
    sources = (pages, raw, table, own_key, own_value, exact_keys, exact_values, exact_table, exact_row)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total, sums = tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for part in range(first_segment, end_segment):
        state = attend_segment(
            query, place, is_row, sources, kv_head, position, first_exact, slope, (begin, end),
            (first_new, start - first_new), (key_stride, value_stride), part * PER_SEGMENT, num_sinks, rule,
            SHAPE, KEYS, VALUES, BLOCK_D, TILE, PER_SEGMENT, ROUND_ALIBI,
        )  # fmt: skip
        if MODE == "split":
            highest, total, sums = state
        else:
            highest, total, sums = joined(highest, total, sums, state[0], state[1], state[2])
    row = token * NUM_HEADS + head
    if MODE == "split":
        num_rows = num_tokens.to(tl.int64) * NUM_HEADS
        row += segment * num_rows
        store_state(states, row, tl.num_programs(2) * num_rows, highest, total, is_row)
    else:
        sums = finished(highest, total, sums, position, head, is_row, slopes, sinks, alibi_scale, ROUND_ALIBI)
    channel, is_channel = channels_in_order(SHAPE, VALUES, BLOCK_D)
    target = output + row[:, None] * SHAPE.head_dim + channel[None, :]
    tl.store(target, sums.to(output.dtype.element_ty), mask=is_row[:, None] & is_channel[None, :])
