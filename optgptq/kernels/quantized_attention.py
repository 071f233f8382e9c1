"""Attention over a quantized KV cache: the records, the definition in float64, and the implementation in torch.

A query reads some keys and values as they were computed and the others from codes; which, is in `CacheBatch`. Formulas
and layout are in `docs/math/kv-cache-pages.md`.

Shapes: `T` tokens of a step, `R` sequences, `N` query heads, `K` key/value heads, `D` head dimension, `Z` pages,
`Y` slots of a page, `B` bytes of a page of codes, `L` positions of a text, `C` pages of a text.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from optgptq.kernels.paged_attention import PagedBatch, ScoreRule, literal_head, store_tokens
from optgptq.kernels.paged_pieces import attend_piece, step_pieces
from optgptq.kernels.quantized_columns import StepCache, completed_groups, exact_vectors, gather_columns
from optgptq.kv_cache.codec import SideCodec
from optgptq.kv_cache.page_layout import PageLayout
from optgptq.kv_cache.page_planes import SIDES, Side, read_vectors, write_vectors


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class CacheStorage:
    """What one decoder layer keeps. Bytes and numbers that were never written may be anything.

    Attributes:
        layout: of a page of codes.
        pages_ZB: uint8 `[Z, layout.page_bytes]`, contiguous, at an address that 16 divides.
        key_codec, value_codec: None for an exact side, whose numbers lie in the rows of codes, in the keys' dtype.
        exact_keys_ZKDY, exact_values_ZKYD: pages of first tokens and of a window in full precision, another pool with
            its own numbers; None where neither is kept.
    """

    layout: PageLayout
    pages_ZB: torch.Tensor
    key_codec: SideCodec | None
    value_codec: SideCodec | None
    exact_keys_ZKDY: torch.Tensor | None
    exact_values_ZKYD: torch.Tensor | None


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class CacheBatch:
    """The sequences of one step in one group of layers.

    A query at position `i` reads exact keys at positions below `num_sinks` and from `first_exact` to `i`, and codes
    between, all of it cut by the window of its layer. Exact keys of the step's own tokens are those that `attend` is
    given; earlier ones lie in exact pages.

    Attributes:
        pages: pages of codes. Every new token has its slot.
        exact: exact pages, of the same size; None where there are none. Its table is 0 where nothing is kept; tokens
            that are not kept have slots of page 0, which nothing reads. `query_start_R1` and `context_R` as in `pages`.
        first_exact_T: int32, for each new token; its position + 1 where it reads even its own key from codes.
        num_sinks: first tokens of a text that every query reads exactly.
        granule: tokens that become codes together; divides `first_exact_T`.
    """

    pages: PagedBatch
    exact: PagedBatch | None
    first_exact_T: torch.Tensor
    num_sinks: int
    granule: int = 1


def store(key_TKD: torch.Tensor, value_TKD: torch.Tensor, storage: CacheStorage, batch: CacheBatch) -> None:
    """Write codes of the new tokens, and their numbers into exact pages. To be called before `attend`.

    With groups along tokens: the groups whose last token is new, their earlier tokens from exact pages.
    """
    if not len(key_TKD):
        return
    if batch.exact is not None:
        assert storage.exact_keys_ZKDY is not None
        assert storage.exact_values_ZKYD is not None
        store_tokens(key_TKD, value_TKD, storage.exact_keys_ZKDY, storage.exact_values_ZKYD, batch.exact.slot_T)
    cache = StepCache(key_TKD=key_TKD, value_TKD=value_TKD, storage=storage, batch=batch)
    _store_side(cache, "keys", key_TKD, storage.key_codec)
    _store_side(cache, "values", value_TKD, storage.value_codec)


def _store_side(cache: StepCache, side: Side, x_TKD: torch.Tensor, codec: SideCodec | None) -> None:
    storage, pages = cache.storage, cache.batch.pages
    slot_T = pages.slot_T
    if codec is not None and codec.scheme.axis == "token":
        sequence_T, position_T = completed_groups(cache.batch, codec.scheme.group_size)
        if not len(position_T):
            return
        page_size = storage.layout.page_size
        page_T = pages.page_table_RP[sequence_T, position_T // page_size].long()
        x_TKD, slot_T = exact_vectors(cache, side, sequence_T, position_T), page_T * page_size + position_T % page_size
    write_vectors(x_TKD, storage.pages_ZB, slot_T, layout=storage.layout, side=side, codec=codec)


def attend(
    query_TND: torch.Tensor,
    key_TKD: torch.Tensor,
    value_TKD: torch.Tensor,
    storage: CacheStorage,
    batch: CacheBatch,
    rule: ScoreRule,
) -> torch.Tensor:
    """Return attention `[T, N, D]` in the dtype of the queries; computed in float32, in float64 for float64 queries.

    Runs on any device. The order of sums is the library's, so a row may differ by rounding from that of another batch.

    Args:
        key_TKD, value_TKD: of the step's own tokens.
    """
    output_TND = torch.empty_like(query_TND)
    cache = StepCache(key_TKD=key_TKD, value_TKD=value_TKD, storage=storage, batch=batch)
    for piece in step_pieces(batch.pages, rule, storage.layout.page_size):
        rows = piece.rows(query_TND.device)
        columns = gather_columns(cache, piece, rule)
        output_TND[rows] = attend_piece(query_TND[rows], columns, piece, rule).to(query_TND.dtype)
    return output_TND


def attend_literal(
    query_TND: torch.Tensor,
    key_TKD: torch.Tensor,
    value_TKD: torch.Tensor,
    storage: CacheStorage,
    batch: CacheBatch,
    rule: ScoreRule,
) -> torch.Tensor:
    """Return the definition, float64 `[T, N, D]`: one query and head at a time, each key and value by its position."""
    group_size = query_TND.shape[1] // key_TKD.shape[1]
    output_TND = torch.zeros(query_TND.shape, dtype=torch.float64, device=query_TND.device)
    cache = StepCache(key_TKD=key_TKD, value_TKD=value_TKD, storage=storage, batch=batch)
    starts, contexts = batch.pages.query_start_R1.tolist(), batch.pages.context_R.tolist()
    for sequence, context in enumerate(contexts):
        position_L = torch.arange(context, device=query_TND.device)
        exact_LKD, code_LKD = zip(*(_literal_vectors(cache, side, sequence, position_L) for side in SIDES), strict=True)
        for token in range(starts[sequence], starts[sequence + 1]):
            position = context - (starts[sequence + 1] - token)
            is_exact_L = (position_L < batch.num_sinks) | (position_L >= batch.first_exact_T[token])
            key_LKD, value_LKD = (
                torch.where(is_exact_L[:, None, None], exact, code)
                for exact, code in zip(exact_LKD, code_LKD, strict=True)
            )
            seen_T = position_L[rule.first_key(position) : position + 1]
            for head in range(query_TND.shape[1]):
                key_TD, value_TD = key_LKD[seen_T, head // group_size], value_LKD[seen_T, head // group_size]
                output_TND[token, head] = literal_head(
                    query_TND[token, head], key_TD, value_TD, seen_T, head, rule=rule
                )
    return output_TND


def _literal_vectors(
    cache: StepCache, side: Side, sequence: int, position_L: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return exact vectors and those of codes of a text, float64 `[L, K, D]`; anything where there are none."""
    layout, table_RP = cache.storage.layout, cache.batch.pages.page_table_RP
    exact_LKD = exact_vectors(cache, side, torch.full_like(position_L, sequence), position_L)
    page_C = table_RP[sequence, : -(-len(position_L) // layout.page_size)].long()
    code_LKD = read_vectors(cache.storage.pages_ZB[page_C], layout=layout, side=side, exact_dtype=cache.key_TKD.dtype)
    return exact_LKD.double(), code_LKD[: len(position_L)].double()
