"""Attention over keys and values in pages: the records, the definition in float64, and the implementation in torch.

Formulas and layout are in `docs/math/paged-attention.md`.

Shapes: `T` tokens of a step, `R` sequences, `N` query heads, `K` key/value heads, `D` head dimension, `Z` pages,
`Y` slots of a page, `P` pages of a table's row. `S` sequences, `C` pages and `Q` new tokens of each that are worked on
together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf

import torch

# Queries of a sequence that are worked on together: bounds the scores to N * 128 * context numbers.
_QUERY_PIECE = 128


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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """Sequences worked on together: where `num_queries` tokens of each begin in the flat order and in its text."""

    sequences: list[int]
    tokens: list[int]
    positions: list[int]
    num_queries: int


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
    for piece in _pieces(batch, rule, keys_ZKDY.shape[3]):
        rows = torch.tensor(piece.tokens).unsqueeze(1) + torch.arange(piece.num_queries)
        rows = rows.flatten().to(query_TND.device)
        result = _attend(query_TND[rows], keys_ZKDY, values_ZKYD, batch.page_table_RP, piece, rule=rule)
        output_TND[rows] = result.to(query_TND.dtype)
    return output_TND


def _pieces(batch: PagedBatch, rule: ScoreRule, page_size: int) -> Iterator[_Piece]:
    """Yield what is worked on together: sequences with one new token of similar length, else parts of one sequence."""
    starts, contexts = batch.query_start_R1.tolist(), batch.context_R.tolist()
    single: list[tuple[int, int]] = []
    for sequence, (start, end, context) in enumerate(zip(starts[:-1], starts[1:], contexts, strict=True)):
        if end - start == 1:
            single.append((context - 1 - rule.first_key(context - 1), sequence))
            continue
        for first in range(start, end, _QUERY_PIECE):
            position = context - (end - first)
            size = min(_QUERY_PIECE, end - first)
            yield _Piece(sequences=[sequence], tokens=[first], positions=[position], num_queries=size)
    together: list[int] = []
    longest = 0
    for length, sequence in sorted(single, reverse=True):
        # Less than half of what is gathered is padding, but for a page.
        if together and 2 * length + page_size < longest:
            yield _decode_piece(together, starts, contexts)
            together = []
        longest = length if not together else longest
        together.append(sequence)
    if together:
        yield _decode_piece(together, starts, contexts)


def _decode_piece(sequences: list[int], starts: list[int], contexts: list[int]) -> _Piece:
    tokens, positions = [starts[index] for index in sequences], [contexts[index] - 1 for index in sequences]
    return _Piece(sequences=sequences, tokens=tokens, positions=positions, num_queries=1)


def _attend(
    query_TND: torch.Tensor,
    keys_ZKDY: torch.Tensor,
    values_ZKYD: torch.Tensor,
    page_table_RP: torch.Tensor,
    piece: _Piece,
    *,
    rule: ScoreRule,
) -> torch.Tensor:
    """Return attention of the piece's queries, `[T, N, D]`; the heads of a group are rows of one product."""
    device, num_sequences = query_TND.device, len(piece.sequences)
    num_kv_heads, head_dim, page_size = keys_ZKDY.shape[1:]
    dtype = torch.promote_types(query_TND.dtype, torch.float32)
    table_SC, first_S1, last_S1 = _visible_pages(page_table_RP, piece, rule, page_size)
    head_K1 = torch.arange(num_kv_heads, device=device).unsqueeze(1)
    head_rows = (table_SC.unsqueeze(1) * num_kv_heads + head_K1).flatten()
    keys = keys_ZKDY.flatten(0, 1).index_select(0, head_rows)
    key_SKDT = keys.view(num_sequences, num_kv_heads, -1, head_dim, page_size).transpose(2, 3).flatten(3).to(dtype)
    values = values_ZKYD.flatten(0, 1).index_select(0, head_rows)
    value_SKTD = values.view(num_sequences, num_kv_heads, -1, head_dim)
    key_ST = first_S1 + torch.arange(value_SKTD.shape[2], device=device)
    hidden_SQT = _hidden(piece, key_ST, rule)
    # What was never stored may be anything; zero times it must stay zero.
    unseen_ST = (key_ST > last_S1) | hidden_SQT.all(1)
    value_SKTD = value_SKTD.masked_fill_(unseen_ST[:, None, :, None], 0.0).to(dtype)
    # [S, K, N/K, Q, D]
    query = query_TND.view(num_sequences, piece.num_queries, num_kv_heads, -1, head_dim).permute(0, 2, 3, 1, 4)
    scores = torch.matmul(query.flatten(2, 3).to(dtype), key_SKDT)
    scores = scores.view(num_sequences, -1, piece.num_queries, scores.shape[-1])
    scores = _ruled(scores, key_ST, last_S1, rule).masked_fill(hidden_SQT.unsqueeze(1), -inf)
    weights = _softmax(scores, last_S1, rule)
    weights = weights.view(num_sequences, num_kv_heads, -1, weights.shape[-1])
    output = torch.matmul(weights, value_SKTD).view(num_sequences, -1, piece.num_queries, head_dim)
    return output.transpose(1, 2).flatten(0, 1)


def _visible_pages(
    page_table_RP: torch.Tensor, piece: _Piece, rule: ScoreRule, page_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return pages `[S, C]` from the first that is seen, the position of their first slot, and the last position."""
    device = page_table_RP.device
    spans = [(rule.first_key(first) // page_size, first + piece.num_queries - 1) for first in piece.positions]
    most = max(last // page_size - first + 1 for first, last in spans)
    first_S1, last_S1 = torch.tensor(spans, device=device).unsqueeze(2).unbind(1)
    column_SC = first_S1 + torch.arange(most, device=device)
    needed_SC = column_SC <= last_S1 // page_size
    sequence_S1 = torch.tensor(piece.sequences, device=device).unsqueeze(1)
    table_SC = page_table_RP[sequence_S1, column_SC.clamp(max=page_table_RP.shape[1] - 1)]
    return torch.where(needed_SC, table_SC, 0).long(), first_S1 * page_size, last_S1


def _hidden(piece: _Piece, key_ST: torch.Tensor, rule: ScoreRule) -> torch.Tensor:
    """Return which keys each query does not see, `[S, Q, T]`."""
    positions_S1 = torch.tensor(piece.positions, device=key_ST.device).unsqueeze(1)
    query_SQ1 = (positions_S1 + torch.arange(piece.num_queries, device=key_ST.device)).unsqueeze(2)
    hidden_SQT = key_ST.unsqueeze(1) > query_SQ1
    if rule.window is not None:
        hidden_SQT |= key_ST.unsqueeze(1) <= query_SQ1 - rule.window
    return hidden_SQT


def _ruled(scores_SNQT: torch.Tensor, key_ST: torch.Tensor, last_S1: torch.Tensor, rule: ScoreRule) -> torch.Tensor:
    scores_SNQT = scores_SNQT * rule.scale
    if rule.softcap is not None:
        scores_SNQT = torch.tanh(scores_SNQT / rule.softcap) * rule.softcap
    if rule.slopes_N is None:
        return scores_SNQT
    return scores_SNQT + _bias(rule, key_ST, last_S1).transpose(0, 1).unsqueeze(2)


def _bias(rule: ScoreRule, key_ST: torch.Tensor, last_S1: torch.Tensor) -> torch.Tensor:
    """Return what ALiBi adds to each head, float32 `[N, S, T]`, less what it adds at the last position.

    Softmax lets the difference drop out; with the whole bias of far positions scores would lose digits.
    """
    assert rule.slopes_N is not None
    slopes = rule.slopes_N.view(-1, 1, 1)
    if not rule.round_alibi:
        return slopes * (key_ST - last_S1) * rule.alibi_scale
    rounded = slopes.bfloat16()
    return ((rounded * key_ST.bfloat16()).float() - (rounded * last_S1.bfloat16()).float()) * rule.alibi_scale


def _softmax(scores_SNQT: torch.Tensor, last_S1: torch.Tensor, rule: ScoreRule) -> torch.Tensor:
    if rule.sinks_N is None:
        return torch.softmax(scores_SNQT, dim=-1)
    sinks_SN = rule.sinks_N.to(scores_SNQT.dtype).unsqueeze(0)
    if rule.slopes_N is not None:
        # A sink is a key at position 0, without a value.
        sinks_SN = sinks_SN + _bias(rule, torch.zeros_like(last_S1), last_S1).squeeze(2).transpose(0, 1)
    sinks = sinks_SN[:, :, None, None].expand(*scores_SNQT.shape[:3], 1)
    return torch.softmax(torch.cat([scores_SNQT, sinks], dim=-1), dim=-1)[..., :-1]


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
                key_TD = keys_ZKDY[page, head // group_size, :, seen % page_size].double()
                value_TD = values_ZKYD[page, head // group_size, seen % page_size].double()
                score_T = key_TD @ query_TND[token, head].double() * rule.scale
                if rule.softcap is not None:
                    score_T = rule.softcap * torch.tanh(score_T / rule.softcap)
                if rule.slopes_N is not None:
                    slope, place_T = rule.slopes_N[head].double(), seen.double()
                    if rule.round_alibi:
                        slope, place_T = slope.bfloat16(), place_T.bfloat16()
                    score_T = score_T + (slope * place_T).double() * rule.alibi_scale
                if rule.sinks_N is not None:
                    score_T = torch.cat([score_T, rule.sinks_N[head : head + 1].double()])
                weight_T = torch.softmax(score_T, dim=0)[: len(seen)]
                output_TND[token, head] = weight_T @ value_TD
    return output_TND
