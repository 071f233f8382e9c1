"""What attention over pages in torch works on at once, and how it scores: pieces of a step, masks, rules of scores.

Shapes: `T` keys, `N` query heads, `K` key/value heads, `D` head dimension. `S` sequences, `C` pages and `Q` new tokens
of each that are worked on together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from optgptq.kernels.paged_attention import PagedBatch, ScoreRule

# Queries of a sequence that are worked on together: bounds the scores to N * 128 * context numbers.
_QUERY_PIECE = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Sequences worked on together: where `num_queries` tokens of each begin in the flat order and in its text."""

    sequences: list[int]
    tokens: list[int]
    positions: list[int]
    num_queries: int

    def rows(self, device: torch.device) -> torch.Tensor:
        """Return the piece's tokens in the flat order, sequence after sequence."""
        rows = torch.tensor(self.tokens).unsqueeze(1) + torch.arange(self.num_queries)
        return rows.flatten().to(device)

    def last_position(self, device: torch.device) -> torch.Tensor:
        """Return the position of the last query of each sequence, `[S, 1]`."""
        return torch.tensor(self.positions, device=device).unsqueeze(1) + (self.num_queries - 1)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Columns:
    """Keys and values that the queries of a piece attend to.

    Attributes:
        key_SKDT, value_SKTD: those that no query sees may be anything; such values are overwritten.
        position_ST: of each key in its text.
        hidden_SQT: which keys each query does not see.
    """

    key_SKDT: torch.Tensor
    value_SKTD: torch.Tensor
    position_ST: torch.Tensor
    hidden_SQT: torch.Tensor


def step_pieces(batch: PagedBatch, rule: ScoreRule, page_size: int) -> Iterator[Piece]:
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
            yield Piece(sequences=[sequence], tokens=[first], positions=[position], num_queries=size)
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


def _decode_piece(sequences: list[int], starts: list[int], contexts: list[int]) -> Piece:
    tokens, positions = [starts[index] for index in sequences], [contexts[index] - 1 for index in sequences]
    return Piece(sequences=sequences, tokens=tokens, positions=positions, num_queries=1)


def gathered_pages(
    page_table_RP: torch.Tensor, piece: Piece, spans: list[tuple[int, int]], page_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return pages `[S, C]` from the page of the first to that of the last position of each span, and their positions.

    The pages of a span are filled up with page 0; their positions `[S, C * page_size]` go on behind the span.
    """
    device = page_table_RP.device
    pages = [(first // page_size, last // page_size) for first, last in spans]
    most = max(last - first + 1 for first, last in pages)
    first_S1, last_S1 = torch.tensor(pages, device=device).unsqueeze(2).unbind(1)
    column_SC = first_S1 + torch.arange(most, device=device)
    sequence_S1 = torch.tensor(piece.sequences, device=device).unsqueeze(1)
    table_SC = page_table_RP[sequence_S1, column_SC.clamp(max=page_table_RP.shape[1] - 1)]
    position_ST = first_S1 * page_size + torch.arange(most * page_size, device=device)
    return torch.where(column_SC <= last_S1, table_SC, 0).long(), position_ST


def hidden_keys(piece: Piece, position_ST: torch.Tensor, rule: ScoreRule) -> torch.Tensor:
    """Return which keys each query does not see, `[S, Q, T]`: later ones, and those that its window left behind."""
    positions_S1 = torch.tensor(piece.positions, device=position_ST.device).unsqueeze(1)
    query_SQ1 = (positions_S1 + torch.arange(piece.num_queries, device=position_ST.device)).unsqueeze(2)
    hidden_SQT = position_ST.unsqueeze(1) > query_SQ1
    if rule.window is not None:
        hidden_SQT |= position_ST.unsqueeze(1) <= query_SQ1 - rule.window
    return hidden_SQT


def attend_piece(query_TND: torch.Tensor, columns: Columns, piece: Piece, rule: ScoreRule) -> torch.Tensor:
    """Return attention of the piece's queries, `[T, N, D]`; the heads of a group are rows of one product."""
    num_sequences, num_kv_heads, num_keys, head_dim = columns.value_SKTD.shape
    dtype = torch.promote_types(query_TND.dtype, torch.float32)
    hidden_SQT, last_S1 = columns.hidden_SQT, piece.last_position(query_TND.device)
    # What was never stored may be anything; zero times it must stay zero.
    unseen_ST = hidden_SQT.all(1)
    value_SKTD = columns.value_SKTD.masked_fill_(unseen_ST[:, None, :, None], 0.0).to(dtype)
    # [S, K, N/K, Q, D]
    query = query_TND.view(num_sequences, piece.num_queries, num_kv_heads, -1, head_dim).permute(0, 2, 3, 1, 4)
    scores = torch.matmul(query.flatten(2, 3).to(dtype), columns.key_SKDT.to(dtype))
    scores = scores.view(num_sequences, -1, piece.num_queries, num_keys)
    scores = _ruled(scores, columns.position_ST, last_S1, rule).masked_fill(hidden_SQT.unsqueeze(1), -inf)
    weights = _softmax(scores, last_S1, rule)
    weights = weights.view(num_sequences, num_kv_heads, -1, num_keys)
    output = torch.matmul(weights, value_SKTD).view(num_sequences, -1, piece.num_queries, head_dim)
    return output.transpose(1, 2).flatten(0, 1)


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
