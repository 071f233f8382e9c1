"""Random texts in a quantized cache: pages in a shuffled order, bytes written by hand, the rest not a number.

Shapes: as in `optgptq.kernels.quantized_attention`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from support.paged import Part

from optgptq.kernels.paged_attention import PagedBatch, ScoreRule
from optgptq.kernels.quantized_attention import CacheBatch, CacheStorage
from optgptq.kv_cache.codec import Codes, SideCodec, encode
from optgptq.kv_cache.page_layout import PageLayout
from optgptq.kv_cache.page_planes import SIDES, Side, side_scheme
from optgptq.kv_cache.scheme import LayerScheme, PastRule, SideScheme
from optgptq.kv_cache.setup import SideParameters

EXACT = SideScheme()


def layer_schemes(head_dim: int, token_group: int = 16) -> dict[str, LayerScheme]:
    """Return one scheme of each kind, by name; 2 divides `head_dim`, `token_group` divides the page size."""
    whole = {bits: SideScheme(bits=bits, group_size=head_dim) for bits in (2, 3, 4, 8)}
    halves = {bits: SideScheme(bits=bits, group_size=head_dim // 2) for bits in (2, 3, 4, 8)}
    tokens = {bits: SideScheme(bits=bits, group_size=token_group, axis="token") for bits in (2, 3, 4, 8)}
    return {
        **{f"{bits} bits": LayerScheme(keys=side, values=side) for bits, side in whole.items()},
        "halves": LayerScheme(keys=halves[4], values=halves[3]),
        "8 and 2 bits": LayerScheme(keys=whole[8], values=halves[2]),
        "keys only": LayerScheme(keys=whole[4], values=EXACT),
        "values only": LayerScheme(keys=EXACT, values=whole[2]),
        "keys along tokens": LayerScheme(keys=tokens[2], values=whole[2]),
        "keys along tokens, 3 bits": LayerScheme(keys=tokens[3], values=halves[4]),
        "keys along tokens, exact values": LayerScheme(keys=tokens[4], values=EXACT),
    }


PASTS = {
    "off": PastRule(mode="off"),
    "token": PastRule(mode="token"),
    "chunk": PastRule(mode="chunk"),
    "window": PastRule(mode="window", window=24),
    "off, sinks": PastRule(mode="off", sink_tokens=4),
    "token, sinks": PastRule(mode="token", sink_tokens=18),
    "chunk, sinks and recent": PastRule(mode="chunk", sink_tokens=3, recent_tokens=9),
    "window and recent": PastRule(mode="window", window=16, recent_tokens=21),
}


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class CacheStep:
    """What `store` and `attend` are given. Nothing of the new tokens is stored yet."""

    query_TND: torch.Tensor
    key_TKD: torch.Tensor
    value_TKD: torch.Tensor
    storage: CacheStorage
    batch: CacheBatch

    @property
    def arguments(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, CacheStorage, CacheBatch]:
        """The arguments of `attend` before the rule; without the first, those of `store`."""
        return self.query_TND, self.key_TKD, self.value_TKD, self.storage, self.batch

    def copy(self, device: torch.device | str = "cpu") -> CacheStep:
        """Return the same with storage of its own, on a device."""
        storage = _moved(self.storage, device)
        codecs = {name: getattr(storage, name) for name in ("key_codec", "value_codec")}
        moved = {name: None if codec is None else _moved(codec, device) for name, codec in codecs.items()}
        exact = None if self.batch.exact is None else _moved(self.batch.exact, device)
        batch = replace(_moved(self.batch, device), pages=_moved(self.batch.pages, device), exact=exact)
        tensors = {name: getattr(self, name).to(device) for name in ("query_TND", "key_TKD", "value_TKD")}
        return CacheStep(**tensors, storage=replace(storage, **moved), batch=batch)


def _moved(record: object, device: torch.device | str) -> object:
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    tensors = {name: value.clone().to(device) for name, value in values.items() if isinstance(value, torch.Tensor)}
    return replace(record, **tensors)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class CacheTexts:
    """Whole texts, dense, and the pages that each would have.

    Attributes:
        query_LND, key_LKD, value_LKD: of each text, in the dtype of the model.
        codes: what `encode` makes of each text's keys and values, whole groups along tokens only; None for exact sides.
        tables, exact_tables: page numbers of each text in the two pools; no page is in two of them, none is page 0.
        window: of the layer; None: every key is seen.
        fill: byte that lies where nothing was stored.
    """

    query_LND: list[torch.Tensor]
    key_LKD: list[torch.Tensor]
    value_LKD: list[torch.Tensor]
    codes: list[dict[Side, Codes | None]]
    codecs: dict[Side, SideCodec | None]
    layout: PageLayout
    past: PastRule
    tables: list[list[int]]
    exact_tables: list[list[int]]
    window: int | None
    fill: int

    @property
    def keeps_exact(self) -> bool:
        """There is a pool of exact pages."""
        return self.past.sink_tokens + self.past.kept_window > 0

    def step(self, parts: Sequence[Part]) -> CacheStep:
        """Return a step that computes `parts`; what precedes them is stored, as far as anything may be read of it."""
        layout, dtype = self.layout, self.key_LKD[0].dtype
        num_pages = 1 + max((page for table in (*self.tables, *self.exact_tables) for page in table), default=0)
        pages_ZB = torch.full((num_pages, layout.page_bytes), self.fill, dtype=torch.uint8)
        exact_shape = (num_pages, layout.num_kv_heads, layout.head_dim, layout.page_size)
        keys_ZKDY = torch.full(exact_shape, torch.nan, dtype=dtype)
        values_ZKYD = torch.full(exact_shape, torch.nan, dtype=dtype).transpose(2, 3).contiguous()
        for text, begin, _ in parts:
            first = 0 if self.window is None else max(0, begin - self.window + 1)
            self.write_codes(pages_ZB, text, first, begin)
            for position in filter(lambda place, begin=begin: self.is_kept(place, begin), range(begin)):
                page, place = self.exact_tables[text][position // layout.page_size], position % layout.page_size
                keys_ZKDY[page, :, :, place] = self.key_LKD[text][position]
                values_ZKYD[page, :, place] = self.value_LKD[text][position]
        storage = CacheStorage(
            layout=layout,
            pages_ZB=pages_ZB,
            key_codec=self.codecs["keys"],
            value_codec=self.codecs["values"],
            exact_keys_ZKDY=keys_ZKDY if self.keeps_exact else None,
            exact_values_ZKYD=values_ZKYD if self.keeps_exact else None,
        )
        new = {
            name: torch.cat([rows[0][:0], *(rows[text][begin:end] for text, begin, end in parts)])
            for name, rows in (("query_TND", self.query_LND), ("key_TKD", self.key_LKD), ("value_TKD", self.value_LKD))
        }
        return CacheStep(**new, storage=storage, batch=self.batch(parts))

    def is_kept(self, position: int, context: int) -> bool:
        """Say whether a text of `context` tokens keeps a token in exact pages."""
        return position < self.past.sink_tokens or position > context - self.past.kept_window

    def batch(self, parts: Sequence[Part]) -> CacheBatch:
        """Return the records of a step. Tables hold rubbish beyond the last page of a text."""
        size = self.layout.page_size
        width = max((len(table) for table in self.tables), default=0) + 1
        tables = {name: torch.zeros(len(parts), width, dtype=torch.int32) for name in ("codes", "exact")}
        slots: dict[str, list[int]] = {"codes": [], "exact": []}
        for row, (text, begin, end) in enumerate(parts):
            first = 0 if self.window is None else max(0, begin - self.window + 1)
            tables["codes"][row, -(-end // size) :] = 2**30
            for position in range(end):
                column, place = position // size, position % size
                if position >= first - first % self.past.granule:
                    tables["codes"][row, column] = self.tables[text][column]
                kept = self.is_kept(position, end)
                if kept or (position < begin and self.is_kept(position, begin)):
                    tables["exact"][row, column] = self.exact_tables[text][column]
                if position >= begin:
                    slots["codes"].append(self.tables[text][column] * size + place)
                    slots["exact"].append(self.exact_tables[text][column] * size + place if kept else place)
        first_exact = [self.past.first_exact(place, begin) for _, begin, end in parts for place in range(begin, end)]
        pages, exact = (
            PagedBatch(
                query_start_R1=torch.tensor([0, *(end - begin for _, begin, end in parts)]).cumsum(0).int(),
                context_R=torch.tensor([end for _, _, end in parts], dtype=torch.int32),
                page_table_RP=tables[name],
                slot_T=torch.tensor(slots[name], dtype=torch.int64),
                max_query=max((end - begin for _, begin, end in parts), default=0),
                max_context=max((end for _, _, end in parts), default=0),
            )
            for name in ("codes", "exact")
        )
        return CacheBatch(
            pages=pages,
            exact=exact if self.keeps_exact else None,
            first_exact_T=torch.tensor(first_exact, dtype=torch.int32),
            num_sinks=self.past.sink_tokens,
            granule=self.past.granule,
        )

    def write_codes(self, pages_ZB: torch.Tensor, text: int, first: int, end: int) -> None:
        """Write the bytes of the tokens `first .. end - 1`; of groups along tokens, those that end there."""
        layout = self.layout
        starts = {"keys": (0, layout.key_parameters), "values": (layout.value_codes, layout.value_parameters)}
        num_bytes = {"keys": layout.key_row_bytes, "values": layout.value_row_bytes}
        for side, rows_LKD in (("keys", self.key_LKD[text]), ("values", self.value_LKD[text])):
            codes = self.codes[text][side]
            scheme = side_scheme(layout, side)
            size = 1 if scheme.axis == "channel" else scheme.group_size
            for position in range(first - first % size, end - end % size):
                page, place = self.tables[text][position // layout.page_size], position % layout.page_size
                for head in range(layout.num_kv_heads):
                    row = head * layout.head_bytes + starts[side][0] + place * num_bytes[side]
                    if codes is None:
                        row_bytes = rows_LKD[position, head].clone().view(torch.uint8)
                    else:
                        row_bytes = row_by_hand(codes.code_TKD[position, head], scheme.bits)
                        pairs = torch.stack(
                            [codes.scale_TKG[position // size, head], codes.minimum_TKG[position // size, head]], -1
                        )
                        pair_bytes = pairs.flatten().view(torch.uint8)
                        begin = head * layout.head_bytes + starts[side][1] + place // size * len(pair_bytes)
                        pages_ZB[page, begin : begin + len(pair_bytes)] = pair_bytes
                    pages_ZB[page, row : row + len(row_bytes)] = row_bytes

    def dense(self, part: Part, rule: ScoreRule) -> torch.Tensor:
        """Return attention of a part, float64 `[end - begin, N, D]`, from the dense texts, without any page."""
        text, begin, end = part
        num_heads = self.query_LND[text].shape[1]
        group_size = num_heads // self.layout.num_kv_heads
        exact = {"keys": self.key_LKD[text].double(), "values": self.value_LKD[text].double()}
        coded = {side: self._decoded(text, side) for side in SIDES}
        place = torch.arange(len(exact["keys"]))
        output = torch.zeros(end - begin, num_heads, self.layout.head_dim, dtype=torch.float64)
        for position in range(begin, end):
            is_exact = (place < self.past.sink_tokens) | (place >= self.past.first_exact(position, begin))
            seen = torch.arange(rule.first_key(position), position + 1)
            key, value = (
                torch.where(is_exact[:, None, None], exact[side], coded[side])[seen].repeat_interleave(group_size, 1)
                for side in SIDES
            )
            scores = torch.einsum("nd,tnd->nt", self.query_LND[text][position].double(), key) * rule.scale
            if rule.softcap is not None:
                scores = (scores / rule.softcap).tanh() * rule.softcap
            if rule.slopes_N is not None:
                slope, far = rule.slopes_N.unsqueeze(1).double(), seen.double()
                if rule.round_alibi:
                    bias = (slope.bfloat16().float() * far.bfloat16().float()).bfloat16().double()
                else:
                    bias = slope * far
                scores = scores + bias * rule.alibi_scale
            exponentials = scores.exp()
            total = exponentials.sum(-1, keepdim=True)
            if rule.sinks_N is not None:
                total = total + rule.sinks_N.double().exp().unsqueeze(1)
            output[position - begin] = torch.einsum("nt,tnd->nd", exponentials / total, value)
        return output

    def _decoded(self, text: int, side: Side) -> torch.Tensor:
        """Return what the codes of a text stand for, float64; zero where a group is not complete."""
        rows_LKD = self.key_LKD[text] if side == "keys" else self.value_LKD[text]
        codes, scheme = self.codes[text][side], side_scheme(self.layout, side)
        if codes is None:
            return rows_LKD.double()
        axis = 0 if scheme.axis == "token" else 2
        scale, minimum = (
            part.double().repeat_interleave(scheme.group_size, axis) for part in (codes.scale_TKG, codes.minimum_TKG)
        )
        decoded = torch.zeros_like(rows_LKD, dtype=torch.float64)
        decoded[: len(codes.code_TKD)] = codes.code_TKD.double() * scale + minimum
        return decoded


def row_by_hand(code_D: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the bytes of one row of codes, channel by channel as the layout says; no bytes that only fill it up."""
    codes, head_dim = code_D.tolist(), len(code_D)
    upper = 0
    row = [0] * (head_dim * bits // 8)
    if bits == 3:
        upper = -(-head_dim // 4 // 4) * 4
        row = [0] * (upper + head_dim // 8)
    for channel, code in enumerate(codes):
        if bits == 3:
            row[channel % (head_dim // 4)] |= (code & 3) << 2 * (channel // (head_dim // 4))
            row[upper + channel % (head_dim // 8)] |= (code >> 2) << channel // (head_dim // 8)
        else:
            size = head_dim * bits // 8
            row[channel % size] |= code << bits * (channel // size)
    return torch.tensor(row, dtype=torch.uint8)


def cache_texts(
    lengths: Sequence[int],
    scheme: LayerScheme,
    past: PastRule,
    *,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    page_size: int = 16,
    dtype: torch.dtype = torch.float32,
    window: int | None = None,
    is_fitted: bool = False,
    fill: int = 0xFF,
    seed: int = 0,
) -> CacheTexts:
    """Return random texts. `past` gets the granule of the scheme; `is_fitted` codecs have metrics and ranges."""
    generator = torch.Generator().manual_seed(seed)
    layout = PageLayout(
        num_kv_heads=num_kv_heads, head_dim=head_dim, page_size=page_size, scheme=scheme, exact_bytes=dtype.itemsize
    )
    sides = {side: side_scheme(layout, side) for side in SIDES}
    past = replace(past, granule=max((part.group_size for part in sides.values() if part.axis == "token"), default=1))
    codecs: dict[Side, SideCodec | None] = {
        side: None if part.is_exact else random_codec(part, num_kv_heads, head_dim, is_fitted, generator)
        for side, part in sides.items()
    }

    def rows(num: int) -> list[torch.Tensor]:
        return [torch.randn(length, num, head_dim, generator=generator).to(dtype) for length in lengths]

    query_LND, key_LKD, value_LKD = rows(num_heads), rows(num_kv_heads), rows(num_kv_heads)
    codes = [
        {"keys": _whole(key, codecs["keys"]), "values": _whole(value, codecs["values"])}
        for key, value in zip(key_LKD, value_LKD, strict=True)
    ]
    counts = [-(-length // page_size) for length in lengths]
    tables, exact_tables = [], []
    for pool in (tables, exact_tables):
        numbers = (torch.randperm(sum(counts) + 3, generator=generator) + 1).tolist()
        pool.extend([numbers.pop() for _ in range(count)] for count in counts)
    return CacheTexts(
        query_LND=query_LND,
        key_LKD=key_LKD,
        value_LKD=value_LKD,
        codes=codes,
        codecs=codecs,
        layout=layout,
        past=past,
        tables=tables,
        exact_tables=exact_tables,
        window=window,
        fill=fill,
    )


def random_codec(
    scheme: SideScheme, num_kv_heads: int, head_dim: int, is_fitted: bool, generator: torch.Generator
) -> SideCodec:
    """Return a codec; a fitted one with a metric of correlated channels and three ranges."""
    parameters = SideParameters()
    if is_fitted:
        parameters = SideParameters(
            metric_KDD=random_metric(num_kv_heads, head_dim, generator),
            ranges_C2=torch.tensor([[1.0, 1.0], [0.9, 0.9], [0.8, 1.0]]),
        )
    return SideCodec.of(scheme, parameters, torch.device("cpu"))


def random_metric(num_kv_heads: int, head_dim: int, generator: torch.Generator) -> torch.Tensor:
    """Return positive definite matrices `[K, D, D]` with channels that count differently and go together."""
    factor = torch.randn(num_kv_heads, head_dim, 2 * head_dim, generator=generator)
    factor = factor + torch.randn(num_kv_heads, 1, 2 * head_dim, generator=generator)
    factor = factor * torch.linspace(0.3, 2.0, head_dim).view(1, -1, 1)
    return factor @ factor.transpose(1, 2) / (2 * head_dim)


def random_parts(lengths: Sequence[int], seed: int) -> list[Part]:
    """Return a mixed step: the last token of some texts, some or all tokens of others, in a shuffled order."""
    generator = torch.Generator().manual_seed(seed)
    parts: list[Part] = []
    for text in torch.randperm(len(lengths), generator=generator).tolist():
        begin = lengths[text] - 1
        if torch.rand(1, generator=generator) < 0.5:
            begin = int(torch.randint(lengths[text], (1,), generator=generator))
        parts.append((text, begin, lengths[text]))
    return parts


def _whole(x_LKD: torch.Tensor, codec: SideCodec | None) -> Codes | None:
    """Return codes of the vectors, of whole groups along tokens only."""
    if codec is None:
        return None
    size = codec.scheme.group_size if codec.scheme.axis == "token" else 1
    return encode(x_LKD[: len(x_LKD) - len(x_LKD) % size], codec)
