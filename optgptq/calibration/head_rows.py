"""Which output rows of which linear make a head, so that a fused query-key-value can be solved head by head.

Shapes: `N` query heads, `K` key/value heads, `D` head dimension, `O` output rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from optgptq.models.spec import DecoderSpec


@dataclass(frozen=True, slots=True, eq=False)
class Projection:
    """Rows of one linear of the stage `qkv`: `weight_OI[rows_ND]` is `[N, D, I]`, and assigning there puts it back.

    Attributes:
        linear: name relative to the decoder layer.
        rows_ND: int64 `[N, D]`, or `[K, D]` for keys and values.
    """

    linear: str
    rows_ND: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class HeadRows:
    """Where the heads of each projection are; together they are every row of the stage once."""

    query: Projection
    key: Projection
    value: Projection


def head_rows(spec: DecoderSpec) -> HeadRows:
    """Return the rows of every head in the layout that `DecoderLayer.project_heads` reads."""
    linears = spec.stage("qkv").linears
    heads, kv_heads = spec.num_heads, spec.num_kv_heads
    if spec.qkv_layout == "split":
        query, key, value = linears
        return HeadRows(
            query=Projection(query, _rows(torch.arange(heads), spec)),
            key=Projection(key, _rows(torch.arange(kv_heads), spec)),
            value=Projection(value, _rows(torch.arange(kv_heads), spec)),
        )
    (fused,) = linears
    group, kv = heads // kv_heads, torch.arange(kv_heads)
    if spec.qkv_layout == "concatenated":
        first, second, third = torch.arange(heads), heads + kv, heads + kv_heads + kv
    elif spec.qkv_layout == "per_head_interleaved":
        first, second, third = 3 * kv, 3 * kv + 1, 3 * kv + 2
    else:
        # Falcon: each key/value head is stored behind the query heads that share it.
        blocks = (group + 2) * kv
        first = (blocks.unsqueeze(1) + torch.arange(group)).flatten()
        second, third = blocks + group, blocks + group + 1
    return HeadRows(
        query=Projection(fused, _rows(first, spec)),
        key=Projection(fused, _rows(second, spec)),
        value=Projection(fused, _rows(third, spec)),
    )


def _rows(blocks: torch.Tensor, spec: DecoderSpec) -> torch.Tensor:
    """Return the rows `[number, D]` of head-sized blocks of the output, given by their place in it."""
    return blocks.unsqueeze(1) * spec.head_dim + torch.arange(spec.head_dim)
