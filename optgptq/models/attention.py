"""Causal attention of one decoder layer, and what a whole forward pass shares: positions, rotary tables, cache.

Shapes: `B` sequences, `S` query positions, `T` key positions (the last `S` of them are the queries' own),
`N` query heads, `K` key/value heads, `D` head dimension.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn import functional as F  # noqa: N812

from optgptq.errors import ModelError
from optgptq.models.rope import RopeTable, rope_table
from optgptq.models.spec import AlibiSpec, DecoderSpec, RopeSpec
from optgptq.native.causal_attention import attends_causally
from optgptq.native.causal_attention import causal_attention as native_causal_attention

# Queries per step where scores or a bias must be built explicitly: bounds them to N * 256 * T numbers.
_QUERY_CHUNK = 256


class Attend(Protocol):
    """Attention of one decoder layer over new and, where there is a cache, earlier positions.

    Queries and keys are already rotated. `query_BNSD`, `key_BKSD` and `value_BKSD` are the new positions only;
    the result is `[B, N, S, D]`.
    """

    def __call__(
        self,
        layer_index: int,
        query_BNSD: torch.Tensor,
        key_BKSD: torch.Tensor,
        value_BKSD: torch.Tensor,
        spec: DecoderSpec,
        /,
    ) -> torch.Tensor: ...


class AttendJoint(Protocol):
    """Attention from a joint projection on: `[B, S, (N + 2 K) D]`, heads of queries, of keys, of values.

    Norms of heads, rotary positions and the storing of keys and values are part of it; the result is `[B, S, N * D]`.
    """

    def __call__(self, layer_index: int, joint_BSO: torch.Tensor, /) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class AttentionContext:
    """Shared by all layers and batches of one forward pass; make it with `attention_context`.

    Attributes:
        positions: int64 `[S]`, or `[B, S]` where sequences are at different places.
        rope_tables: one table per distinct rotary spec of the model.
        attend: replaces `self_attention`, for a cache.
        attend_joint: does the same for layers that have a joint projection; None: these are taken apart.
    """

    positions: torch.Tensor
    rope_tables: Mapping[RopeSpec, RopeTable]
    attend: Attend
    attend_joint: AttendJoint | None = None


def attention_context(
    spec: DecoderSpec,
    num_positions: int,
    *,
    start: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    attend: Attend | None = None,
) -> AttentionContext:
    """Return the context for positions `start .. start + num_positions - 1`, the same in every sequence.

    Raises:
        ModelError: the model has a position table that is too short.
    """
    positions = torch.arange(start, start + num_positions, device=device)
    return context_at(spec, positions, dtype=dtype, attend=attend)


def context_at(
    spec: DecoderSpec,
    positions: torch.Tensor,
    *,
    dtype: torch.dtype,
    attend: Attend | None = None,
    lengths: torch.Tensor | None = None,
) -> AttentionContext:
    """Return the context for explicit `positions`, int64 `[S]` or `[B, S]`; `lengths` as in `rope_table`."""
    limit = spec.position_limit
    if limit is not None and positions.numel() and int(positions.max()) >= limit:
        raise ModelError(
            spec.names.position_embedding or "positions",
            expected=f"at most {limit} positions, the rows of the model's position table",
            found=str(int(positions.max()) + 1),
            action="Use shorter windows or prompts.",
        )
    tables = {rope: rope_table(rope, positions, dtype=dtype, lengths=lengths) for rope in spec.ropes}
    return AttentionContext(positions=positions, rope_tables=tables, attend=attend or self_attention)


def self_attention(
    layer_index: int,
    query_BNSD: torch.Tensor,
    key_BKSD: torch.Tensor,
    value_BKSD: torch.Tensor,
    spec: DecoderSpec,
    /,
) -> torch.Tensor:
    """The `Attend` without a cache: every position sees itself and those before it."""
    return causal_attention(query_BNSD, key_BKSD, value_BKSD, spec=spec, layer_index=layer_index)


def causal_attention(
    query_BNSD: torch.Tensor,
    key_BKTD: torch.Tensor,
    value_BKTD: torch.Tensor,
    *,
    spec: DecoderSpec,
    layer_index: int,
) -> torch.Tensor:
    """Return attention `[B, N, S, D]` of the last `S` of `T` positions, with the layer's window, softcap and ALiBi.

    Key `j` is taken to be at position `j`; all sequences hold `T` positions. Softmax is taken in float32 where the
    scores are explicit, and inside the fused kernel otherwise.
    """
    layer = spec.layers[layer_index]
    num_queries, num_keys = query_BNSD.shape[2], key_BKTD.shape[2]
    windowed = layer.sliding_window is not None and layer.sliding_window < num_keys
    grouped = spec.num_kv_heads != spec.num_heads
    if spec.alibi is None and spec.attention_softcap is None and not windowed and num_queries in (1, num_keys):
        scale = layer.attention_scale
        if num_queries > 1 and attends_causally(query_BNSD, key_BKTD, value_BKTD, scale=scale):
            return native_causal_attention(query_BNSD, key_BKTD, value_BKTD, scale=scale)
        return F.scaled_dot_product_attention(
            query_BNSD,
            key_BKTD,
            value_BKTD,
            is_causal=num_queries > 1,
            scale=scale,
            enable_gqa=grouped,
        )
    outputs = []
    for begin in range(0, num_queries, _QUERY_CHUNK):
        end = min(begin + _QUERY_CHUNK, num_queries)
        first_query, last_query = num_keys - num_queries + begin, num_keys - num_queries + end - 1
        first_key = max(0, first_query - layer.sliding_window + 1) if layer.sliding_window is not None else 0
        bias = _score_bias(spec, layer.sliding_window, (first_query, last_query), first_key, query_BNSD)
        keys = slice(first_key, last_query + 1)
        arguments = (query_BNSD[:, :, begin:end], key_BKTD[:, :, keys], value_BKTD[:, :, keys])
        outputs.append(_biased_attention(*arguments, bias, scale=layer.attention_scale, softcap=spec.attention_softcap))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def _biased_attention(
    query_BNSD: torch.Tensor,
    key_BKTD: torch.Tensor,
    value_BKTD: torch.Tensor,
    bias: torch.Tensor,
    *,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    if softcap is None:
        # The fused kernel takes masks of two or four dimensions; with three it falls back to a slow one.
        bias = bias if bias.dim() == 2 else bias.unsqueeze(0)
        grouped = key_BKTD.shape[1] != query_BNSD.shape[1]
        return F.scaled_dot_product_attention(
            query_BNSD, key_BKTD, value_BKTD, attn_mask=bias, scale=scale, enable_gqa=grouped
        )
    batch, num_heads, num_queries, head_dim = query_BNSD.shape
    num_kv_heads = key_BKTD.shape[1]
    # [B, N, S, D] -> [B, K, N/K, S, D]: the heads of a group share keys without a copy per head.
    query = query_BNSD.reshape(batch, num_kv_heads, num_heads // num_kv_heads, num_queries, head_dim)
    scores = torch.matmul(query, key_BKTD.unsqueeze(2).transpose(-1, -2)).float()
    bias = bias if bias.dim() == 2 else bias.view(num_kv_heads, num_heads // num_kv_heads, *bias.shape[1:])
    if scores.requires_grad:
        # The gradient of tanh needs its result.
        scores = torch.tanh(scores * (scale / softcap)) * softcap + bias
    else:
        scores.mul_(scale / softcap).tanh_().mul_(softcap).add_(bias)
    weights = torch.softmax(scores, dim=-1).to(value_BKTD.dtype)
    return torch.matmul(weights, value_BKTD.unsqueeze(2)).reshape(batch, num_heads, num_queries, head_dim)


def _score_bias(
    spec: DecoderSpec, window: int | None, queries: tuple[int, int], first_key: int, like: torch.Tensor
) -> torch.Tensor:
    """Return the additive bias `[S, T]`, or `[N, S, T]` with ALiBi; minus infinity where a key is not seen."""
    query = torch.arange(queries[0], queries[1] + 1, device=like.device).unsqueeze(1)
    key = torch.arange(first_key, queries[1] + 1, device=like.device)
    hidden = key > query
    if window is not None:
        hidden |= key <= query - window
    if spec.alibi is None:
        bias = torch.zeros(hidden.shape, dtype=like.dtype, device=like.device)
    else:
        bias = alibi_bias(spec.alibi, key).to(like.dtype).unsqueeze(1).expand(-1, *hidden.shape)
    return bias.masked_fill(hidden, float("-inf"))


def alibi_bias(alibi: AlibiSpec, positions: torch.Tensor) -> torch.Tensor:
    """Return `slope * position * scale` `[N, T]`, float32 but for the rounding the spec asks for.

    Source: Press et al., ALiBi, arXiv 2108.12409, section 3; softmax lets the query's position drop out.
    """
    slopes = torch.tensor(alibi.slopes, dtype=torch.float32, device=positions.device).unsqueeze(1)
    if alibi.bfloat16_bias:
        return (slopes.bfloat16() * positions).float() * alibi.scale
    return slopes * positions * alibi.scale
