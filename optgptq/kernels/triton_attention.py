"""Attention over pages by triton, on CUDA and HIP devices. Importing this module imports triton.

Which sizes are chosen and why a row does not depend on them: docs/math/paged-attention-gpu.md.

Shapes: `T` tokens of a step, `R` sequences, `N` query heads, `K` key/value heads, `D` head dimension, `Z` pages, `Y`
slots of a page, `P` pages of a table's row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from optgptq.kernels.device_kind import DeviceKind, device_kind
from optgptq.kernels.paged_attention import PagedBatch, ScoreRule
from optgptq.kernels.triton_attention_source import attention_of_rows, join_segments
from optgptq.kernels.triton_leaves_source import store_rows

# Keys of a segment. Segments begin at its multiples, whatever the step is: this is part of the arithmetic.
SEGMENT = 256
# A device of 100 to 300 processors has a few programs for each: from here on segments need no programs of their own.
TARGET_PROGRAMS = 1024
# What the segments of a step may take in memory before they are joined.
MOST_PARTIAL_BYTES = 64 << 20
JOINED_TOGETHER = 8
STORED_TOGETHER = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """Sizes of a program, and how it is compiled.

    Attributes:
        keys: of a tile; part of the arithmetic, so the same for every number of rows.
        rows: query heads of tokens that a program takes.
        options: of the compiler.
    """

    keys: int
    rows: int
    options: dict[str, Any]


def choose_tiles(kind: DeviceKind, dtype: torch.dtype, head_dim: int, *, most_rows: int) -> Tiles:
    """Return the sizes for queries of `dtype` where a sequence has up to `most_rows` rows of one key/value head."""
    padded = padded_head_dim(head_dim)
    # What a program holds must fit into its registers.
    is_wide = padded > 128 or padded != head_dim or dtype == torch.float32
    rows = 16 if most_rows <= 16 or padded > 128 or dtype == torch.float32 else 32
    # A product and a sum that a compiler joins in one kernel and not in the other would make rows depend on sizes.
    common = {"num_warps": 4, "enable_fp_fusion": False}
    if not kind.is_hip:
        cuda = {"num_stages": 3 if rows == 16 else 2}
        if rows > 16 and padded != head_dim:
            # Left to itself the compiler for sm_90 keeps registers in memory to make room for one more program.
            cuda |= {"maxnreg": 255}
        return Tiles(keys=32 if is_wide else 64, rows=rows, options=common | cuda)
    hip = common | {"num_stages": 1, "matrix_instr_nonkdim": 16}
    if kind.wave_size == 32:
        # A thread has 256 registers here and no accumulation registers.
        warps = 16 if padded > 128 else 4
        return Tiles(keys=16 if is_wide else 32, rows=16, options=hip | {"num_warps": warps})
    return Tiles(keys=32 if is_wide else 64, rows=rows, options=hip)


def padded_head_dim(head_dim: int) -> int:
    """Return the features that a program works with: a power of two that matrix units take."""
    return max(16, 1 << (head_dim - 1).bit_length())


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchPlan:
    """How a step is divided among programs; it changes no bit of the result.

    Attributes:
        blocks: of rows, for each key/value head; an upper bound that needs nothing from the device.
        segments: that have programs of their own; 1 where a program takes all of them.
        mode: "one", "all" or "split": see `attention_of_rows`.
    """

    blocks: int
    segments: int
    mode: str


def launch_plan(query_TND: torch.Tensor, num_kv_heads: int, batch: PagedBatch, tiles: Tiles) -> LaunchPlan:
    """Return the division of a step, from shapes and the numbers of the batch that the host knows."""
    num_tokens, num_heads, head_dim = query_TND.shape
    blocks = num_tokens * (num_heads // num_kv_heads) // tiles.rows + batch.context_R.shape[0]
    segments = -(-batch.max_context // SEGMENT)
    if segments <= 1:
        return LaunchPlan(blocks=blocks, segments=1, mode="one")
    num_bytes = segments * num_tokens * num_heads * head_dim * 4
    if blocks * num_kv_heads >= TARGET_PROGRAMS or num_bytes > MOST_PARTIAL_BYTES:
        return LaunchPlan(blocks=blocks, segments=1, mode="all")
    return LaunchPlan(blocks=blocks, segments=segments, mode="split")


def store_tokens(
    key_TKD: torch.Tensor,
    value_TKD: torch.Tensor,
    keys_ZKDY: torch.Tensor,
    values_ZKYD: torch.Tensor,
    slot_T: torch.Tensor,
) -> None:
    """Write keys and values of new tokens into their slots, in the dtype of the pages."""
    num_tokens, num_kv_heads, head_dim = key_TKD.shape
    if num_tokens == 0:
        return
    key_TKD, value_TKD = with_whole_tokens(key_TKD), with_whole_tokens(value_TKD)
    assert keys_ZKDY.is_contiguous()
    assert values_ZKYD.is_contiguous()
    with torch.cuda.device(key_TKD.get_device()):
        store_rows[(-(-num_tokens // STORED_TOGETHER), num_kv_heads)](
            key_TKD,
            value_TKD,
            keys_ZKDY,
            values_ZKYD,
            slot_T,
            num_tokens,
            key_TKD.stride(0),
            value_TKD.stride(0),
            NUM_KV_HEADS=num_kv_heads,
            HEAD_DIM=head_dim,
            BLOCK_D=padded_head_dim(head_dim),
            PAGE=keys_ZKDY.shape[3],
            BLOCK_T=STORED_TOGETHER,
            num_warps=4,
        )


def paged_attention(
    query_TND: torch.Tensor, keys_ZKDY: torch.Tensor, values_ZKYD: torch.Tensor, batch: PagedBatch, rule: ScoreRule
) -> torch.Tensor:
    """Return attention `[T, N, D]` in the dtype of the queries: float16, bfloat16 or float32.

    Scores and sums are float32; keys, values and the weights of values are rounded to the dtype of the queries. A row
    has the same bits in every batch and in every cut of its sequence.
    """
    num_tokens, num_heads, head_dim = query_TND.shape
    num_kv_heads = keys_ZKDY.shape[1]
    output_TND = torch.empty(query_TND.shape, dtype=query_TND.dtype, device=query_TND.device)
    if num_tokens == 0:
        return output_TND
    query_TND = with_whole_tokens(query_TND)
    assert keys_ZKDY.is_contiguous()
    assert values_ZKYD.is_contiguous()
    assert batch.page_table_RP.is_contiguous()
    most_rows = batch.max_query * (num_heads // num_kv_heads)
    tiles = choose_tiles(device_kind(query_TND.device), query_TND.dtype, head_dim, most_rows=most_rows)
    plan = launch_plan(query_TND, num_kv_heads, batch, tiles)
    with torch.cuda.device(query_TND.get_device()):
        if plan.mode != "split":
            _attend(query_TND, keys_ZKDY, values_ZKYD, batch, rule, target=(output_TND, None), tiles=tiles, plan=plan)
            return output_TND
        sums = output_TND.new_empty(plan.segments, *query_TND.shape, dtype=torch.float32)
        states = output_TND.new_empty(2, plan.segments, num_tokens, num_heads, dtype=torch.float32)
        _attend(query_TND, keys_ZKDY, values_ZKYD, batch, rule, target=(sums, states), tiles=tiles, plan=plan)
        join(sums, states, batch, rule, output_TND)
    return output_TND


def with_whole_tokens(heads_TND: torch.Tensor) -> torch.Tensor:
    """Return the heads with those of a token one after the other; tokens may be apart, as in a joint projection."""
    _, num_heads, head_dim = heads_TND.shape
    is_whole = heads_TND.stride(2) == 1 and (num_heads == 1 or heads_TND.stride(1) == head_dim)
    return heads_TND if is_whole else heads_TND.contiguous()


def _attend(
    query_TND: torch.Tensor,
    keys_ZKDY: torch.Tensor,
    values_ZKYD: torch.Tensor,
    batch: PagedBatch,
    rule: ScoreRule,
    *,
    target: tuple[torch.Tensor, torch.Tensor | None],
    tiles: Tiles,
    plan: LaunchPlan,
) -> None:
    num_tokens, num_heads, head_dim = query_TND.shape
    num_kv_heads = keys_ZKDY.shape[1]
    # Of a capped score the kernel wants twice its share of the cap: see `tile_scores`.
    scale = rule.scale if rule.softcap is None else 2 * rule.scale / rule.softcap
    attention_of_rows[(plan.blocks, num_kv_heads, plan.segments)](
        query_TND,
        keys_ZKDY,
        values_ZKYD,
        batch.query_start_R1,
        batch.context_R,
        batch.page_table_RP,
        rule.slopes_N,
        rule.sinks_N,
        *target,
        num_tokens,
        batch.context_R.shape[0],
        query_TND.stride(0),
        batch.page_table_RP.shape[1],
        rule.window,
        scale * math.log2(math.e),
        None if rule.softcap is None else rule.softcap * math.log2(math.e),
        rule.alibi_scale * math.log2(math.e),
        NUM_HEADS=num_heads,
        GROUP=num_heads // num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_D=padded_head_dim(head_dim),
        PAGE=keys_ZKDY.shape[3],
        TILE=tiles.keys,
        SEGMENT=SEGMENT,
        BLOCK_M=tiles.rows,
        MODE=plan.mode,
        ROUND_ALIBI=rule.round_alibi,
        **tiles.options,
    )


def join(
    sums_STND: torch.Tensor, states: torch.Tensor, batch: PagedBatch, rule: ScoreRule, output_TND: torch.Tensor
) -> None:
    """Write the output of segments that were attended to one by one: their sums, highest scores and totals."""
    num_segments, num_tokens, num_heads, head_dim = sums_STND.shape
    join_segments[(num_tokens, num_heads)](
        sums_STND,
        states,
        batch.query_start_R1,
        batch.context_R,
        rule.slopes_N,
        rule.sinks_N,
        output_TND,
        num_tokens,
        batch.context_R.shape[0],
        num_segments,
        rule.window,
        rule.alibi_scale * math.log2(math.e),
        NUM_HEADS=num_heads,
        HEAD_DIM=head_dim,
        BLOCK_D=padded_head_dim(head_dim),
        SEGMENT=SEGMENT,
        TOGETHER=JOINED_TOGETHER,
        ROUND_ALIBI=rule.round_alibi,
        num_warps=1,
        enable_fp_fusion=False,
    )
