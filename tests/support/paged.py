"""Random texts whose keys and values lie in pages in a shuffled order; what is not stored is NaN.

Shapes: as in `optgptq.kernels.paged_attention`. `L` positions of a text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch

from optgptq.kernels.paged_attention import PagedBatch, ScoreRule

Part = tuple[int, int, int]
"""A text and the positions `begin .. end - 1` of it that a step computes."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class PagedStep:
    """What one call is given; `key_TKD` and `value_TKD` are those of the new tokens, which the pages hold already."""

    query_TND: torch.Tensor
    key_TKD: torch.Tensor
    value_TKD: torch.Tensor
    keys_ZKDY: torch.Tensor
    values_ZKYD: torch.Tensor
    batch: PagedBatch

    @property
    def arguments(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, PagedBatch]:
        """The arguments of `paged_attention` before the rule."""
        return self.query_TND, self.keys_ZKDY, self.values_ZKYD, self.batch

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> PagedStep:
        """Return the same on a device, queries and new tokens in `dtype`."""
        tensors = {name: getattr(self, name).to(device, dtype) for name in ("query_TND", "key_TKD", "value_TKD")}
        pages = {name: getattr(self, name).to(device) for name in ("keys_ZKDY", "values_ZKYD")}
        numbers = {field.name: getattr(self.batch, field.name) for field in fields(PagedBatch)}
        moved = {name: value.to(device) for name, value in numbers.items() if isinstance(value, torch.Tensor)}
        return PagedStep(**tensors, **pages, batch=replace(self.batch, **moved))


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class PagedTexts:
    """Whole texts, dense, and the pages that each would have.

    Attributes:
        query_LND: queries of each text.
        key_LKD, value_LKD: keys and values of each text, rounded to the dtype of the pages.
        tables: page numbers of each text; no page is in two of them, none is page 0.
        num_pages: of the pool; more than are used.
        dtype: of the pages.
    """

    query_LND: list[torch.Tensor]
    key_LKD: list[torch.Tensor]
    value_LKD: list[torch.Tensor]
    tables: list[list[int]]
    page_size: int
    num_pages: int
    dtype: torch.dtype
    window: int | None

    def step(self, parts: Sequence[Part]) -> PagedStep:
        """Return a step that computes `parts`: pages hold what is seen, and NaN everywhere else.

        Entries of tables are 0 where a window's page is seen by nothing, and beyond the last page.
        """
        num_kv_heads, head_dim = self.key_LKD[0].shape[1:]
        pool = (self.num_pages, num_kv_heads)
        keys_ZKDY = torch.full((*pool, head_dim, self.page_size), torch.nan, dtype=self.dtype)
        values_ZKYD = torch.full((*pool, self.page_size, head_dim), torch.nan, dtype=self.dtype)
        width = max((len(table) for table in self.tables), default=0) + 1
        table_RP = torch.zeros(len(parts), width, dtype=torch.int32)
        slots: list[int] = []
        for row, (text, begin, end) in enumerate(parts):
            first = 0 if self.window is None else max(0, begin - self.window + 1)
            for position in range(first, end):
                page, place = self.tables[text][position // self.page_size], position % self.page_size
                keys_ZKDY[page, :, :, place] = self.key_LKD[text][position].to(self.dtype)
                values_ZKYD[page, :, place] = self.value_LKD[text][position].to(self.dtype)
                table_RP[row, position // self.page_size] = page
                if position >= begin:
                    slots.append(page * self.page_size + place)
        batch = PagedBatch(
            query_start_R1=torch.tensor([0, *(end - begin for _, begin, end in parts)]).cumsum(0).int(),
            context_R=torch.tensor([end for _, _, end in parts], dtype=torch.int32),
            page_table_RP=table_RP,
            slot_T=torch.tensor(slots, dtype=torch.int64),
            max_query=max((end - begin for _, begin, end in parts), default=0),
            max_context=max((end for _, _, end in parts), default=0),
        )
        new = {
            name: torch.cat([rows[0][:0], *(rows[text][begin:end] for text, begin, end in parts)])
            for name, rows in (("query_TND", self.query_LND), ("key_TKD", self.key_LKD), ("value_TKD", self.value_LKD))
        }
        return PagedStep(**new, keys_ZKDY=keys_ZKDY, values_ZKYD=values_ZKYD, batch=batch)


def paged_texts(
    lengths: Sequence[int],
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    dtype: torch.dtype = torch.float32,
    window: int | None = None,
    seed: int = 0,
) -> PagedTexts:
    """Return random texts; queries are float32."""
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-length // page_size) for length in lengths]
    numbers = (torch.randperm(sum(counts) + 3, generator=generator) + 1).tolist()
    tables = [[numbers.pop() for _ in range(count)] for count in counts]

    def rows(num: int) -> list[torch.Tensor]:
        return [torch.randn(length, num, head_dim, generator=generator) for length in lengths]

    return PagedTexts(
        query_LND=rows(num_heads),
        key_LKD=[part.to(dtype).float() for part in rows(num_kv_heads)],
        value_LKD=[part.to(dtype).float() for part in rows(num_kv_heads)],
        tables=tables,
        page_size=page_size,
        num_pages=sum(counts) + 4,
        dtype=dtype,
        window=window,
    )


def dense_attention(texts: PagedTexts, part: Part, rule: ScoreRule) -> torch.Tensor:
    """Return attention of a part, float64 `[end - begin, N, D]`, from the dense texts, without any page."""
    text, begin, end = part
    query = texts.query_LND[text][begin:end].double().transpose(0, 1)
    group_size = query.shape[0] // texts.key_LKD[text].shape[1]
    key, value = (
        rows[text][:end].double().transpose(0, 1).repeat_interleave(group_size, dim=0)
        for rows in (texts.key_LKD, texts.value_LKD)
    )
    scores = query @ key.transpose(1, 2) * rule.scale
    if rule.softcap is not None:
        scores = (scores / rule.softcap).tanh() * rule.softcap
    key_position, query_position = torch.arange(end), torch.arange(begin, end).unsqueeze(1)
    if rule.slopes_N is not None:
        slope, place = rule.slopes_N.unsqueeze(1).double(), key_position.double()
        if rule.round_alibi:
            bias = (slope.bfloat16().float() * place.bfloat16().float()).bfloat16().double()
        else:
            bias = slope * place
        scores = scores + bias.unsqueeze(1) * rule.alibi_scale
    hidden = key_position > query_position
    if rule.window is not None:
        hidden |= key_position <= query_position - rule.window
    exponentials = scores.masked_fill(hidden, -torch.inf).exp()
    total = exponentials.sum(-1, keepdim=True)
    if rule.sinks_N is not None:
        total = total + rule.sinks_N.double().exp().view(-1, 1, 1)
    return (exponentials / total @ value).transpose(0, 1)
