"""Which rows of the linears that make queries, keys and values belong to which head.

Shapes: `N` query heads, `K` key/value heads, `D` head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from optgptq.models.spec import DecoderSpec


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class HeadRows:
    """Rows of one linear, int64; None for heads that another linear makes.

    Attributes:
        query_ND: of query head `n`, which reads key/value head `n // (N / K)`.
        key_KD, value_KD: of key/value head `k`.
    """

    query_ND: torch.Tensor | None = None
    key_KD: torch.Tensor | None = None
    value_KD: torch.Tensor | None = None


def head_rows(spec: DecoderSpec, place: int) -> HeadRows:
    """Return the rows of linear number `place` of the stage `qkv`: query, key, value, or all of them in one."""
    num_heads, num_kv, head_dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
    if spec.qkv_layout == "split":
        if place == 0:
            return HeadRows(query_ND=torch.arange(num_heads * head_dim).view(num_heads, head_dim))
        rows_KD = torch.arange(num_kv * head_dim).view(num_kv, head_dim)
        return HeadRows(key_KD=rows_KD) if place == 1 else HeadRows(value_KD=rows_KD)
    rows = torch.arange((num_heads + 2 * num_kv) * head_dim)
    if spec.qkv_layout == "concatenated":
        query_ND, key_KD, value_KD = torch.split(rows.view(-1, head_dim), [num_heads, num_kv, num_kv])
    elif spec.qkv_layout == "per_head_interleaved":
        query_ND, key_KD, value_KD = rows.view(num_kv, 3, head_dim).unbind(1)
    else:
        heads = rows.view(num_kv, num_heads // num_kv + 2, head_dim)
        query_ND, key_KD, value_KD = heads[:, :-2].reshape(num_heads, head_dim), heads[:, -2], heads[:, -1]
    return HeadRows(query_ND=query_ND, key_KD=key_KD, value_KD=value_KD)
