"""Attention over keys and values in pages: the records, the definition in float64, and the implementation in torch.

Formulas and layout are in `docs/math/paged-attention.md`.

Shapes: `T` tokens of a step, `R` sequences, `N` query heads, `K` key/value heads, `D` head dimension, `Z` pages,
`Y` slots of a page, `P` pages of a table's row. `S` sequences and `C` pages of each that are worked on together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from optgptq.kernels.paged_pieces import Columns, Piece, attend_piece, gathered_pages, hidden_keys, step_pieces


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class PagedBatch:
    """The sequences of one step in one group of pages.

    Attributes:
        query_start_R1: int32 `[R + 1]`, the first new token of each sequence in the flat order; the last entry is `T`.
        context_R: int32, keys of each sequence, its new tokens included.
        page_table_RP: int32, pages in the order of positions; those that nothing sees any more are 0.
        slot_T: int64, `page * page_size + slot` where the key and value of each new token go.
        max_query: most new tokens of a sequence.
        max_context: the longest context.
    """

    query_start_R1: torch.Tensor
    context_R: torch.Tensor
    page_table_RP: torch.Tensor
    slot_T: torch.Tensor
    max_query: int
    max_context: int


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class ScoreRule:
    """How the scores of one layer are made.

    Attributes:
        scale: factor of the product of query and key.
        window: a query at position `q` sees keys `q - window + 1 .. q`; None: all up to `q`.
        softcap: a scaled score `s` becomes `softcap * tanh(s / softcap)`.
        slopes_N: float32 slopes of ALiBi; `slope * key position * alibi_scale` is added after scaling and softcap.
        alibi_scale: see there.
        round_alibi: slope, position and their product are rounded to bfloat16 before `alibi_scale`.
        sinks_N: float32 scores without a key or value: they only enlarge the denominator of the softmax.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    slopes_N: torch.Tensor | None = None
    alibi_scale: float = 1.0
    round_alibi: bool = False
    sinks_N: torch.Tensor | None = None

    def first_key(self, position: int) -> int:
        """Return the first key that a query at `position` sees."""
        return 0 if self.window is None else max(0, position - self.window + 1)


def store_tokens(
    key_TKD: torch.Tensor,
    value_TKD: torch.Tensor,
    keys_ZKDY: torch.Tensor,
    values_ZKYD: torch.Tensor,
    slot_T: torch.Tensor,
) -> None:
    """Write keys and values of new tokens into their slots, in the dtype of the pages."""
    page_T, place_T = slot_T // keys_ZKDY.shape[3], slot_T % keys_ZKDY.shape[3]
    keys_ZKDY[page_T, :, :, place_T] = key_TKD.to(keys_ZKDY.dtype)
    values_ZKYD[page_T, :, place_T] = value_TKD.to(values_ZKYD.dtype)


def paged_attention(
    query_TND: torch.Tensor, keys_ZKDY: torch.Tensor, values_ZKYD: torch.Tensor, batch: PagedBatch, rule: ScoreRule
) -> torch.Tensor:
    """Return attention `[T, N, D]` in the dtype of the queries; computed in float32, in float64 for float64 queries.

    Runs on any device. The order of sums is the library's, so a row may differ by rounding from that of another batch.
    """
    output_TND = torch.empty_like(query_TND)
    for piece in step_pieces(batch, rule, keys_ZKDY.shape[3]):
        rows = piece.rows(query_TND.device)
        columns = _visible_columns(keys_ZKDY, values_ZKYD, batch.page_table_RP, piece, rule=rule)
        output_TND[rows] = attend_piece(query_TND[rows], columns, piece, rule).to(query_TND.dtype)
    return output_TND


def _visible_columns(
    keys_ZKDY: torch.Tensor, values_ZKYD: torch.Tensor, page_table_RP: torch.Tensor, piece: Piece, *, rule: ScoreRule
) -> Columns:
    """Return keys and values of the pages from the first that the piece sees."""
    device, num_sequences = keys_ZKDY.device, len(piece.sequences)
    num_kv_heads, head_dim, page_size = keys_ZKDY.shape[1:]
    spans = [(rule.first_key(first), first + piece.num_queries - 1) for first in piece.positions]
    table_SC, position_ST = gathered_pages(page_table_RP, piece, spans, page_size)
    head_K1 = torch.arange(num_kv_heads, device=device).unsqueeze(1)
    head_rows = (table_SC.unsqueeze(1) * num_kv_heads + head_K1).flatten()
    keys = keys_ZKDY.flatten(0, 1).index_select(0, head_rows)
    values = values_ZKYD.flatten(0, 1).index_select(0, head_rows)
    return Columns(
        key_SKDT=keys.view(num_sequences, num_kv_heads, -1, head_dim, page_size).transpose(2, 3).flatten(3),
        value_SKTD=values.view(num_sequences, num_kv_heads, -1, head_dim),
        position_ST=position_ST,
        hidden_SQT=hidden_keys(piece, position_ST, rule),
    )


def paged_attention_literal(
    query_TND: torch.Tensor, keys_ZKDY: torch.Tensor, values_ZKYD: torch.Tensor, batch: PagedBatch, rule: ScoreRule
) -> torch.Tensor:
    """Return the definition, float64 `[T, N, D]`: one query and head at a time, over the keys that it sees."""
    num_heads, page_size = query_TND.shape[1], keys_ZKDY.shape[3]
    group_size = num_heads // keys_ZKDY.shape[1]
    output_TND = torch.zeros(query_TND.shape, dtype=torch.float64, device=query_TND.device)
    starts, contexts = batch.query_start_R1.tolist(), batch.context_R.tolist()
    for sequence, context in enumerate(contexts):
        for token in range(starts[sequence], starts[sequence + 1]):
            position = context - (starts[sequence + 1] - token)
            seen = torch.arange(rule.first_key(position), position + 1, device=query_TND.device)
            page = batch.page_table_RP[sequence, seen // page_size].long()
            for head in range(num_heads):
                key_TD = keys_ZKDY[page, head // group_size, :, seen % page_size]
                value_TD = values_ZKYD[page, head // group_size, seen % page_size]
                output_TND[token, head] = literal_head(query_TND[token, head], key_TD, value_TD, seen, head, rule=rule)
    return output_TND


def literal_head(
    query_D: torch.Tensor,
    key_TD: torch.Tensor,
    value_TD: torch.Tensor,
    position_T: torch.Tensor,
    head: int,
    *,
    rule: ScoreRule,
) -> torch.Tensor:
    """Return attention of one query and head over the keys that it sees, float64 `[D]`; the definition."""
    score_T = key_TD.double() @ query_D.double() * rule.scale
    if rule.softcap is not None:
        score_T = rule.softcap * torch.tanh(score_T / rule.softcap)
    if rule.slopes_N is not None:
        slope, place_T = rule.slopes_N[head].double(), position_T.double()
        if rule.round_alibi:
            slope, place_T = slope.bfloat16(), place_T.bfloat16()
        score_T = score_T + (slope * place_T).double() * rule.alibi_scale
    if rule.sinks_N is not None:
        score_T = torch.cat([score_T, rule.sinks_N[head : head + 1].double()])
    weight_T = torch.softmax(score_T, dim=0)[: len(position_T)]
    return weight_T @ value_TD.double()
