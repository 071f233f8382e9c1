"""Keys and values out of a quantized cache, in torch: those of exact pages, of the step itself, and of codes.

Shapes: `T` tokens of a step or keys, `K` key/value heads, `D` head dimension, `Z` pages, `Y` slots of a page. `S`
sequences, `C` pages and `Q` new tokens of each that are worked on together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from optgptq.kernels.paged_pieces import Columns, Piece, gathered_pages, hidden_keys
from optgptq.kv_cache.page_planes import Side, read_vectors

if TYPE_CHECKING:
    from optgptq.kernels.paged_attention import ScoreRule
    from optgptq.kernels.quantized_attention import CacheBatch, CacheStorage


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class StepCache:
    """New keys and values of a step, and where a decoder layer keeps the others."""

    key_TKD: torch.Tensor
    value_TKD: torch.Tensor
    storage: CacheStorage
    batch: CacheBatch


def exact_vectors(cache: StepCache, side: Side, sequence: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """Return vectors `[..., K, D]` of positions `[...]`, in the dtype of the step's.

    New tokens are taken from the step, earlier ones from exact pages. Anything where neither holds them.
    """
    batch, storage = cache.batch, cache.storage
    new_TKD = cache.key_TKD if side == "keys" else cache.value_TKD
    starts, ends = batch.pages.query_start_R1[sequence], batch.pages.query_start_R1[sequence + 1]
    begins = batch.pages.context_R[sequence] - (ends - starts)
    vectors = new_TKD[(starts + position - begins).clamp(0, len(new_TKD) - 1).long()]
    if batch.exact is None:
        return vectors
    assert storage.exact_keys_ZKDY is not None
    assert storage.exact_values_ZKYD is not None
    page_size, table_RP = storage.layout.page_size, batch.exact.page_table_RP
    is_past = position < begins
    page = table_RP[sequence, (position // page_size).clamp(max=table_RP.shape[1] - 1)].long()
    page, place = torch.where(is_past, page, 0), position % page_size
    kept = storage.exact_keys_ZKDY[page, :, :, place] if side == "keys" else storage.exact_values_ZKYD[page, :, place]
    return torch.where(is_past[..., None, None], kept.to(vectors.dtype), vectors)


def completed_groups(batch: CacheBatch, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return sequences and positions of all tokens of groups whose last token is new, group after group."""
    starts, contexts = batch.pages.query_start_R1.tolist(), batch.pages.context_R.tolist()
    sequences, positions = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0, dtype=torch.int64)]
    for sequence, (start, end, context) in enumerate(zip(starts[:-1], starts[1:], contexts, strict=True)):
        begin = context - (end - start)
        positions.append(torch.arange(begin - begin % group_size, context - context % group_size))
        sequences.append(torch.full_like(positions[-1], sequence))
    device = batch.pages.context_R.device
    return torch.cat(sequences).to(device), torch.cat(positions).to(device)


def gather_columns(cache: StepCache, piece: Piece, rule: ScoreRule) -> Columns:
    """Return what the queries of a piece attend to: first tokens, codes, and the keys from the first exact one on."""
    batch, device = cache.batch, cache.key_TKD.device
    first_exact_SQ = batch.first_exact_T[piece.rows(device)].view(len(piece.sequences), -1)
    begins = [max(rule.first_key(first), batch.num_sinks) for first in piece.positions]
    lows, highs = first_exact_SQ.amin(1).tolist(), first_exact_SQ.amax(1).tolist()
    columns: list[Columns] = []
    if batch.num_sinks:
        position_ST = torch.arange(batch.num_sinks, device=device).repeat(len(piece.sequences), 1)
        columns.append(_exact_columns(cache, piece, position_ST, hidden_keys(piece, position_ST, rule)))
    spans = [(begin, high - 1) for begin, high in zip(begins, highs, strict=True)]
    if any(first <= last for first, last in spans):
        columns.append(_code_columns(cache, piece, spans, first_exact_SQ, rule=rule))
    firsts = [max(begin, low) for begin, low in zip(begins, lows, strict=True)]
    num_exact = max(
        position + piece.num_queries - first for position, first in zip(piece.positions, firsts, strict=True)
    )
    if num_exact > 0:
        position_ST = torch.tensor(firsts, device=device).unsqueeze(1) + torch.arange(num_exact, device=device)
        hidden_SQT = hidden_keys(piece, position_ST, rule) | (position_ST.unsqueeze(1) < first_exact_SQ.unsqueeze(2))
        columns.append(_exact_columns(cache, piece, position_ST, hidden_SQT))
    return Columns(
        key_SKDT=torch.cat([part.key_SKDT for part in columns], 3),
        value_SKTD=torch.cat([part.value_SKTD for part in columns], 2),
        position_ST=torch.cat([part.position_ST for part in columns], 1),
        hidden_SQT=torch.cat([part.hidden_SQT for part in columns], 2),
    )


def _exact_columns(cache: StepCache, piece: Piece, position_ST: torch.Tensor, hidden_SQT: torch.Tensor) -> Columns:
    sequence_S1 = torch.tensor(piece.sequences, device=position_ST.device).unsqueeze(1)
    sequence_ST = sequence_S1.expand_as(position_ST)
    key_STKD = exact_vectors(cache, "keys", sequence_ST, position_ST)
    value_STKD = exact_vectors(cache, "values", sequence_ST, position_ST)
    return _columns(key_STKD, value_STKD, position_ST, hidden_SQT)


def _code_columns(
    cache: StepCache, piece: Piece, spans: list[tuple[int, int]], first_exact_SQ: torch.Tensor, *, rule: ScoreRule
) -> Columns:
    """Return keys and values of whole pages of codes; those of exact positions are hidden."""
    storage, batch, num_sequences = cache.storage, cache.batch, len(piece.sequences)
    layout = storage.layout
    table_SC, position_ST = gathered_pages(batch.pages.page_table_RP, piece, spans, layout.page_size)
    pages_ZB = storage.pages_ZB.index_select(0, table_SC.flatten())
    key_TKD = read_vectors(pages_ZB, layout=layout, side="keys", exact_dtype=cache.key_TKD.dtype)
    value_TKD = read_vectors(pages_ZB, layout=layout, side="values", exact_dtype=cache.value_TKD.dtype)
    hidden_SQT = hidden_keys(piece, position_ST, rule)
    hidden_SQT |= position_ST.unsqueeze(1) >= first_exact_SQ.unsqueeze(2)
    hidden_SQT |= (position_ST < batch.num_sinks).unsqueeze(1)
    return _columns(
        key_TKD.view(num_sequences, -1, *key_TKD.shape[1:]),
        value_TKD.view(num_sequences, -1, *value_TKD.shape[1:]),
        position_ST,
        hidden_SQT,
    )


def _columns(
    key_STKD: torch.Tensor, value_STKD: torch.Tensor, position_ST: torch.Tensor, hidden_SQT: torch.Tensor
) -> Columns:
    dtype = torch.promote_types(key_STKD.dtype, torch.float32)
    return Columns(
        key_SKDT=key_STKD.permute(0, 2, 3, 1).to(dtype),
        value_SKTD=value_STKD.transpose(1, 2).to(dtype),
        position_ST=position_ST,
        hidden_SQT=hidden_SQT,
    )
