"""Triton kernels for attention over pages, one source for CUDA and HIP. Importing this module imports triton.

Names and formulas: docs/math/paged-attention-gpu.md. Scores are in units of log2, so that exp2 is the exponential.
The kernels use what the interpreter and the compilers of triton 3.6 to 3.9 share: no inline assembly, no atomics.

A row is one query head of one token. The order of its sums is fixed by its own position: tiles of keys and segments
begin at absolute key positions, and a tile that a row does not see changes none of its bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)
# Sequences that one step of the search looks at.
_SEARCHED = tl.constexpr(128)


@triton.jit
def last_sequence(query_start, num_sequences, wanted, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """Return the last sequence whose first block of rows is `wanted` or before; with `BLOCK_M` 0, its first token.

    Blocks are numbered so that sequence `r` begins at `query_start[r] * GROUP // BLOCK_M + r`: an upper bound that
    needs no sum over sequences. All sequences are compared at once: a binary search waits for memory at each step.
    """
    count = 0
    for begin in range(0, num_sequences, _SEARCHED):
        index = begin + tl.arange(0, _SEARCHED)
        first = tl.load(query_start + index, mask=index < num_sequences, other=0)
        if BLOCK_M > 0:
            first = first * GROUP // BLOCK_M + index
        count += tl.sum(((first <= wanted) & (index < num_sequences)).to(tl.int32), 0)
    return count - 1


@triton.jit
def joined(highest, total, sums, other_highest, other_total, other_sums):
    """Return the softmax state `[M], [M], [M, D]` of two sets of keys; a state without keys has minus infinity."""
    new = tl.maximum(highest, other_highest)
    shift = tl.where(new == float("-inf"), 0.0, new)
    mine, other = tl.exp2(highest - shift), tl.exp2(other_highest - shift)
    return new, total * mine + other_total * other, sums * mine[:, None] + other_sums * other[:, None]


@triton.jit
def rounded_alibi(slope, position):
    """Return slope times position, both and the product rounded to bfloat16, as float32."""
    factor = slope.to(tl.bfloat16).to(tl.float32)
    place = position.to(tl.float32).to(tl.bfloat16).to(tl.float32)
    return (factor * place).to(tl.bfloat16).to(tl.float32)


@triton.jit
def finished(highest, total, sums, position, head, is_row, slopes, sinks, alibi_scale, ROUND_ALIBI: tl.constexpr):
    """Return the output `[M, D]` of rows in float32: a sink is one more key without a value."""
    if sinks is not None:
        sink = tl.load(sinks + head, mask=is_row, other=0.0) * _LOG2_E
        if slopes is not None:
            # Scores with ALiBi are relative to the query's own position.
            slope = tl.load(slopes + head, mask=is_row, other=0.0)
            if ROUND_ALIBI:
                sink -= rounded_alibi(slope, position) * alibi_scale
            else:
                sink -= slope * alibi_scale * position.to(tl.float32)
        one = tl.full(sink.shape, 1.0, tl.float32)
        highest, total, sums = joined(highest, total, sums, sink, one, tl.zeros_like(sums))
    return sums / tl.where(total == 0.0, 1.0, total)[:, None]


@triton.jit
def load_tile(
    keys,
    values,
    table,
    tile,
    begin,
    end,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Return positions `[TILE]`, keys `[D, TILE]` and values `[TILE, D]` of one tile, of one head.

    Keys are masked by whole pages, so that loads stay wide: what was never stored may be NaN, and `tile_scores` takes
    its scores out. Values are zero where no row sees them.
    """
    PAGE_STRIDE: tl.constexpr = NUM_KV_HEADS * HEAD_DIM * PAGE
    key = tile * TILE + tl.arange(0, TILE)
    feature = tl.arange(0, BLOCK_D)
    is_feature = feature < HEAD_DIM
    page_begin = key // PAGE * PAGE
    is_live = (page_begin < end) & (page_begin + PAGE > begin)
    # Said where the compiler for HIP does not see it: slots of a page are neighbours, for loads of many at once.
    NEIGHBOURS: tl.constexpr = PAGE & -PAGE if (PAGE & -PAGE) < TILE else TILE
    place = tl.load(table + key // PAGE, mask=is_live, other=0).to(tl.int64) * PAGE_STRIDE
    place = tl.max_constancy(place, [NEIGHBOURS])
    slot = key % PAGE
    k = tl.load(
        keys + place[None, :] + feature[:, None] * PAGE + slot[None, :],
        mask=is_live[None, :] & is_feature[:, None],
        other=0.0,
    )
    is_seen = (key >= begin) & (key < end)
    v = tl.load(
        values + place[:, None] + slot[:, None] * HEAD_DIM + feature[None, :],
        mask=is_seen[:, None] & is_feature[None, :],
        other=0.0,
    )
    return key, k, v


@triton.jit
def ruled(scores, key, position, slope, softcap, alibi_scale, ROUND_ALIBI: tl.constexpr):
    """Return scaled scores `[M, TILE]` with softcap and ALiBi."""
    if softcap is not None:
        # tanh of half the score: the scale holds 2 / softcap, and `softcap` the unit.
        scores = softcap * (1.0 - 2.0 / (tl.exp2(scores) + 1.0))
    if slope is not None:
        if ROUND_ALIBI:
            own = rounded_alibi(slope, position)
            scores += (rounded_alibi(slope[:, None], key[None, :]) - own[:, None]) * alibi_scale
        else:
            scores += (slope * alibi_scale)[:, None] * (key[None, :] - position[:, None]).to(tl.float32)
    return scores


@triton.jit
def tile_scores(q, k, key, position, slope, window, scale, softcap, alibi_scale, ROUND_ALIBI: tl.constexpr):
    """Return scores `[M, TILE]` of queries `[M, D]` and keys `[D, TILE]`, minus infinity where a key is not seen."""
    scores = tl.dot(q, k, input_precision="ieee") * scale
    scores = ruled(scores, key, position, slope, softcap, alibi_scale, ROUND_ALIBI)
    visible = key[None, :] <= position[:, None]
    if window is not None:
        visible &= key[None, :] > position[:, None] - window
    return tl.where(visible, scores, float("-inf"))


@triton.jit
def attend(
    q,
    keys,
    values,
    table,
    position,
    slope,
    begin,
    end,
    first_tile,
    last_tile,
    window,
    scale,
    softcap,
    alibi_scale,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    TILES_OF_SEGMENT: tl.constexpr,
    ROUND_ALIBI: tl.constexpr,
):
    """Return the softmax state `[M], [M], [M, D]` of rows over a range of tiles.

    Where `TILES_OF_SEGMENT` is not 0, the state of each segment is made from nothing and joined to those before it.
    """
    BLOCK_M: tl.constexpr = q.shape[0]
    BLOCK_D: tl.constexpr = q.shape[1]
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    sums = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    all_highest, all_total, all_sums = highest, total, sums
    for tile in range(first_tile, last_tile):
        key, k, v = load_tile(keys, values, table, tile, begin, end, NUM_KV_HEADS, HEAD_DIM, BLOCK_D, PAGE, TILE)
        scores = tile_scores(q, k.to(q.dtype), key, position, slope, window, scale, softcap, alibi_scale, ROUND_ALIBI)
        new = tl.maximum(highest, tl.max(scores, 1))
        shift = tl.where(new == float("-inf"), 0.0, new)
        weights = tl.exp2(scores - shift[:, None])
        change = tl.exp2(highest - shift)
        highest = new
        total = total * change + tl.sum(weights, 1)
        sums = tl.dot(weights.to(q.dtype), v.to(q.dtype), sums * change[:, None], input_precision="ieee")
        # Apart: the compiler evaluates both sides of an `and`.
        if TILES_OF_SEGMENT > 0:  # noqa: SIM102
            if (tile + 1) % TILES_OF_SEGMENT == 0:
                all_highest, all_total, all_sums = joined(all_highest, all_total, all_sums, highest, total, sums)
                highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
                total = tl.zeros([BLOCK_M], tl.float32)
                sums = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if TILES_OF_SEGMENT > 0:
        highest, total, sums = joined(all_highest, all_total, all_sums, highest, total, sums)
    return highest, total, sums


@triton.jit
def block_place(query_start, num_sequences, block, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """Return a block's sequence, that one's first token and number of new tokens, and the block's first row in it."""
    sequence = last_sequence(query_start, num_sequences, block, GROUP, BLOCK_M)
    start = tl.load(query_start + sequence)
    num_new = tl.load(query_start + sequence + 1) - start
    return sequence, start, num_new, (block - (start * GROUP // BLOCK_M + sequence)) * BLOCK_M


@triton.jit
def key_range(first_position, num_new, first_row, window, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """Return the first key that a block of rows sees, and the end of its keys."""
    begin = 0
    if window is not None:
        begin = tl.maximum(first_position + first_row // GROUP - window + 1, 0)
    return begin, first_position + tl.minimum((first_row + BLOCK_M - 1) // GROUP, num_new - 1) + 1


@triton.jit
def store_state(states, row, num_rows, highest, total, is_row):
    """Write the highest scores and the totals of rows to `states [2, rows]`."""
    tl.store(states + row, highest, mask=is_row)
    tl.store(states + num_rows + row, total, mask=is_row)


# The lines of a function are counted, and these arguments would be half of them.
@triton.jit(do_not_specialize=["num_tokens", "num_sequences", "table_width"])
def attention_of_rows(
    query, keys, values, query_start, context_lengths, page_table, slopes, sinks, output, states,
    num_tokens, num_sequences, query_token_stride, table_width, window, scale, softcap, alibi_scale,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr,
    TILE: tl.constexpr, SEGMENT: tl.constexpr, BLOCK_M: tl.constexpr, MODE: tl.constexpr, ROUND_ALIBI: tl.constexpr,
):  # fmt: skip
    """Attention of a block of rows of one key/value head: grid `(blocks, kv heads, segments or 1)`.

    `MODE` "one": no context is longer than a segment. "all": segments are joined as they come. Both write `output`
    `[T, N, D]`. "split": one segment; its sums `[S, T, N, D]` go to `output`, its highest scores and totals to `states`
    `[2, S, T, N]`, for `join_segments`. The three give the same bits.
    """
    NUM_KV_HEADS: tl.constexpr = NUM_HEADS // GROUP
    PER_SEGMENT: tl.constexpr = SEGMENT // TILE
    kv_head, segment = tl.program_id(1), tl.program_id(2)
    sequence, start, num_new, first_row = block_place(query_start, num_sequences, tl.program_id(0), GROUP, BLOCK_M)
    if first_row >= num_new * GROUP:
        return
    first_position = tl.load(context_lengths + sequence) - num_new
    begin, end = key_range(first_position, num_new, first_row, window, GROUP, BLOCK_M)
    first_tile, end_tile = begin // TILE, tl.cdiv(end, TILE)
    if MODE == "split":
        first_tile = tl.maximum(first_tile, segment * PER_SEGMENT)
        end_tile = tl.minimum(end_tile, (segment + 1) * PER_SEGMENT)
        if first_tile >= end_tile:
            return
    rows = first_row + tl.arange(0, BLOCK_M)
    is_row = rows < num_new * GROUP
    head = kv_head * GROUP + rows % GROUP
    # Rows beyond the last see what that one sees, and nothing that was never stored.
    offset = tl.minimum(rows // GROUP, num_new - 1)
    token, position = (start + offset).to(tl.int64), first_position + offset
    feature = tl.arange(0, BLOCK_D)
    is_entry = is_row[:, None] & (feature < HEAD_DIM)[None, :]
    q = tl.load(query + (token * query_token_stride + head * HEAD_DIM)[:, None] + feature[None, :], is_entry, other=0.0)
    slope = None if slopes is None else tl.load(slopes + head, mask=is_row, other=0.0)
    highest, total, sums = attend(
        q, keys + kv_head * (HEAD_DIM * PAGE), values + kv_head * (HEAD_DIM * PAGE),
        page_table + sequence.to(tl.int64) * table_width, position, slope, begin, end, first_tile, end_tile,
        window, scale, softcap, alibi_scale, NUM_KV_HEADS, HEAD_DIM, PAGE, TILE,
        PER_SEGMENT if MODE == "all" else 0, ROUND_ALIBI,
    )  # fmt: skip
    row = token * NUM_HEADS + head
    if MODE == "split":
        num_rows = num_tokens.to(tl.int64) * NUM_HEADS
        row += segment * num_rows
        store_state(states, row, tl.num_programs(2) * num_rows, highest, total, is_row)
    else:
        sums = finished(highest, total, sums, position, head, is_row, slopes, sinks, alibi_scale, ROUND_ALIBI)
    tl.store(output + row[:, None] * HEAD_DIM + feature[None, :], sums.to(output.dtype.element_ty), mask=is_entry)


# The lines of a function are counted, and these arguments would be half of them.
@triton.jit(do_not_specialize=["num_tokens", "num_sequences", "num_segments"])
def join_segments(
    sums, states, query_start, context_lengths, slopes, sinks, output, num_tokens, num_sequences, num_segments,
    window, alibi_scale, NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, SEGMENT: tl.constexpr,
    TOGETHER: tl.constexpr, ROUND_ALIBI: tl.constexpr,
):  # fmt: skip
    """Write `output [T, N, D]` from `sums [S, T, N, D]` and `states [2, S, T, N]`: grid `(tokens, heads)`.

    The segments of a row are those that it sees keys of, joined one after the other from the first. `TOGETHER` of them
    are read at once.
    """
    token, head = tl.program_id(0), tl.program_id(1) + tl.arange(0, 1)
    sequence = last_sequence(query_start, num_sequences, token, 1, 0)
    new_after = tl.load(query_start + sequence + 1) - token
    position = tl.load(context_lengths + sequence) - new_after
    feature = tl.arange(0, BLOCK_D)
    is_feature = (feature < HEAD_DIM)[None, :]
    num_rows = num_tokens.to(tl.int64) * NUM_HEADS
    row = token * NUM_HEADS + head
    first = 0
    if window is not None:
        first = tl.maximum(position - window + 1, 0) // SEGMENT
    end = position // SEGMENT + 1
    highest = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    joined_sums = tl.zeros([1, BLOCK_D], tl.float32)
    for begin in range(first, end, TOGETHER):
        for step in tl.static_range(TOGETHER):
            place = (begin + step) * num_rows + row
            is_there = (begin + step < end) & (head < NUM_HEADS)
            new_highest = tl.load(states + place, mask=is_there, other=float("-inf"))
            new_total = tl.load(states + num_segments * num_rows + place, mask=is_there, other=0.0)
            target = sums + place[:, None] * HEAD_DIM + feature[None, :]
            new_sums = tl.load(target, mask=is_there[:, None] & is_feature, other=0.0)
            highest, total, joined_sums = joined(highest, total, joined_sums, new_highest, new_total, new_sums)
    is_row = head < NUM_HEADS
    result = finished(highest, total, joined_sums, position, head, is_row, slopes, sinks, alibi_scale, ROUND_ALIBI)
    target = output + row.to(tl.int64)[:, None] * HEAD_DIM + feature[None, :]
    tl.store(target, result.to(output.dtype.element_ty), mask=is_feature)
