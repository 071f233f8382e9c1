"""A quantized KV cache by triton, on CUDA and HIP devices. Importing this module imports triton.

Which sizes are chosen and why a row does not depend on them: docs/math/paged-attention-gpu.md.

Shapes: `T` tokens of a step, `N` query heads, `K` key/value heads, `D` head dimension, `Z` pages, `Y` slots of a page.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import Any

import torch

from optgptq.kernels import triton_attention
from optgptq.kernels.device_kind import DeviceKind, device_kind
from optgptq.kernels.paged_attention import ScoreRule
from optgptq.kernels.quantized_attention import CacheBatch, CacheStorage
from optgptq.kernels.triton_attention import LaunchPlan, Tiles, padded_head_dim
from optgptq.kernels.triton_codes_source import CodeSide, PageShape
from optgptq.kernels.triton_quantized_source import quantized_attention_of_rows
from optgptq.kernels.triton_store_codes import store_side
from optgptq.kv_cache.page_layout import PageLayout
from optgptq.kv_cache.page_planes import Side, side_scheme


@cache
def page_shape(layout: PageLayout) -> PageShape:
    """Return a page as constants of a kernel."""
    return PageShape(
        num_kv_heads=layout.num_kv_heads,
        head_dim=layout.head_dim,
        page_size=layout.page_size,
        page_bytes=layout.page_bytes,
        head_bytes=layout.head_bytes,
        exact_bytes=layout.exact_bytes,
    )


@cache
def code_side(layout: PageLayout, side: Side) -> CodeSide:
    """Return keys or values of a page as constants of a kernel."""
    scheme, is_key = side_scheme(layout, side), side == "keys"
    return CodeSide(
        bits=0 if scheme.is_exact else scheme.bits,
        low_bits=2 if scheme.bits == 3 else min(scheme.bits, 8),
        group_size=layout.head_dim if scheme.is_exact else scheme.group_size,
        is_single=not scheme.is_exact and scheme.axis == "channel" and scheme.group_size == layout.head_dim,
        by_token=not scheme.is_exact and scheme.axis == "token",
        row_bytes=layout.key_row_bytes if is_key else layout.value_row_bytes,
        codes=0 if is_key else layout.value_codes,
        parameters=layout.key_parameters if is_key else layout.value_parameters,
    )


def choose_tiles(kind: DeviceKind, dtype: torch.dtype, layout: PageLayout, *, most_rows: int) -> Tiles:
    """Return the sizes for queries of `dtype` where a sequence has up to `most_rows` rows of one key/value head."""
    padded = padded_head_dim(layout.head_dim)
    # Codes take registers while they become numbers: fewer keys at once, and fewer rows where features are filled up.
    most_rows = most_rows if padded == layout.head_dim else min(most_rows, 16)
    tiles = triton_attention.choose_tiles(kind, dtype, layout.head_dim, most_rows=most_rows)
    keys, options = 16 if padded > 128 or dtype == torch.float32 else min(tiles.keys, 32), tiles.options
    if not kind.is_hip:
        # Left to itself the compiler keeps registers in memory to make room for one more program.
        options = options | {"maxnreg": 255}
    elif kind.wave_size == 32:
        # A thread has 256 registers here, and the matrix unit wants operands twice.
        keys, options = 16, options | {"num_warps": max(8, options["num_warps"])}
    return replace(tiles, keys=keys, options=options)


def launch_options(
    kind: DeviceKind, dtype: torch.dtype, layout: PageLayout, *, tiles: Tiles, mode: str
) -> dict[str, Any]:
    """Return the options of the compiler; those of `tiles`, and room for three programs where they fit."""
    is_narrow = padded_head_dim(layout.head_dim) <= 128 and dtype != torch.float32
    if kind.is_hip or mode != "split" or tiles.rows > 16 or not is_narrow:
        return tiles.options
    return tiles.options | {"maxnreg": 168}


def store(key_TKD: torch.Tensor, value_TKD: torch.Tensor, storage: CacheStorage, batch: CacheBatch) -> None:
    """Write codes of the new tokens, and their numbers into exact pages. To be called before `attend`.

    With groups along tokens: the groups whose last token is new, their earlier tokens from exact pages.
    """
    if not len(key_TKD):
        return
    if batch.exact is not None:
        assert storage.exact_keys_ZKDY is not None
        assert storage.exact_values_ZKYD is not None
        exact = (storage.exact_keys_ZKDY, storage.exact_values_ZKYD)
        triton_attention.store_tokens(key_TKD, value_TKD, *exact, batch.exact.slot_T)
    sides: tuple[tuple[Side, torch.Tensor], ...] = (("keys", key_TKD), ("values", value_TKD))
    for side, x_TKD in sides:
        store_side(
            triton_attention.with_whole_tokens(x_TKD),
            storage,
            batch,
            side=side,
            shape=page_shape(storage.layout),
            constants=code_side(storage.layout, side),
        )


def attend(
    query_TND: torch.Tensor,
    key_TKD: torch.Tensor,
    value_TKD: torch.Tensor,
    storage: CacheStorage,
    batch: CacheBatch,
    rule: ScoreRule,
) -> torch.Tensor:
    """Return attention `[T, N, D]` in the dtype of the queries: float16, bfloat16 or float32.

    Scores and sums are float32. Codes are exact where a token has one scale and one minimum, and their weights times
    the scale are bfloat16 for 16-bit queries; other numbers and weights are rounded to the dtype of the queries. A row
    has the same bits in every batch and in every cut of its sequence, as long as it reads the same keys exactly.
    """
    layout, pages = storage.layout, batch.pages
    num_tokens, num_heads = query_TND.shape[:2]
    output_TND = torch.empty(query_TND.shape, dtype=query_TND.dtype, device=query_TND.device)
    if num_tokens == 0:
        return output_TND
    assert storage.pages_ZB.is_contiguous()
    assert pages.page_table_RP.is_contiguous()
    assert batch.exact is None or batch.exact.page_table_RP.is_contiguous()
    step = [triton_attention.with_whole_tokens(heads) for heads in (query_TND, key_TKD, value_TKD)]
    most_rows = pages.max_query * (num_heads // layout.num_kv_heads)
    kind = device_kind(query_TND.device)
    tiles = choose_tiles(kind, query_TND.dtype, layout, most_rows=most_rows)
    plan = triton_attention.launch_plan(step[0], layout.num_kv_heads, pages, tiles)
    # A program that takes all segments takes the only one too.
    plan = replace(plan, mode="all") if plan.mode == "one" else plan
    tiles = replace(tiles, options=launch_options(kind, query_TND.dtype, layout, tiles=tiles, mode=plan.mode))
    with torch.cuda.device(query_TND.get_device()):
        if plan.mode != "split":
            _launch(step, storage, batch, rule, target=(output_TND, None), tiles=tiles, plan=plan)
            return output_TND
        sums = output_TND.new_empty(plan.segments, *query_TND.shape, dtype=torch.float32)
        states = output_TND.new_empty(2, plan.segments, num_tokens, num_heads, dtype=torch.float32)
        _launch(step, storage, batch, rule, target=(sums, states), tiles=tiles, plan=plan)
        triton_attention.join(sums, states, pages, rule, output_TND)
    return output_TND


def _launch(
    step: list[torch.Tensor],
    storage: CacheStorage,
    batch: CacheBatch,
    rule: ScoreRule,
    *,
    target: tuple[torch.Tensor, torch.Tensor | None],
    tiles: Tiles,
    plan: LaunchPlan,
) -> None:
    layout, pages, exact = storage.layout, batch.pages, batch.exact
    num_tokens, num_heads, head_dim = step[0].shape
    # Of a capped score the kernel wants twice its share of the cap: see `ruled`.
    scale = rule.scale if rule.softcap is None else 2 * rule.scale / rule.softcap
    quantized_attention_of_rows[(plan.blocks, layout.num_kv_heads, plan.segments)](
        *step,
        storage.pages_ZB.view(torch.int32),
        storage.pages_ZB.view(step[1].dtype) if layout.scheme.keys.is_exact or layout.scheme.values.is_exact else None,
        None if exact is None else storage.exact_keys_ZKDY,
        None if exact is None else storage.exact_values_ZKYD,
        pages.query_start_R1,
        pages.context_R,
        pages.page_table_RP,
        None if exact is None else exact.page_table_RP,
        batch.first_exact_T,
        rule.slopes_N,
        rule.sinks_N,
        *target,
        num_tokens,
        pages.context_R.shape[0],
        *(heads.stride(0) for heads in step),
        pages.page_table_RP.shape[1],
        0 if exact is None else exact.page_table_RP.shape[1],
        batch.num_sinks,
        rule.window,
        scale * math.log2(math.e),
        None if rule.softcap is None else rule.softcap * math.log2(math.e),
        rule.alibi_scale * math.log2(math.e),
        SHAPE=page_shape(layout),
        KEYS=code_side(layout, "keys"),
        VALUES=code_side(layout, "values"),
        NUM_HEADS=num_heads,
        BLOCK_D=padded_head_dim(head_dim),
        TILE=tiles.keys,
        SEGMENT=triton_attention.SEGMENT,
        BLOCK_M=tiles.rows,
        MODE=plan.mode,
        ROUND_ALIBI=rule.round_alibi,
        **tiles.options,
    )
