"""Attention weights of the heads that share keys, written out; the model itself never builds them.

Shapes: `G` query heads of one key/value head, `S` query positions, `T` key positions, `D` head dimension,
`B` windows, `M` model width, `N` query heads, `K` key/value heads.
"""

from __future__ import annotations

import torch

from optgptq.errors import NumericalError
from optgptq.models.attention import AttentionContext, alibi_bias
from optgptq.models.layer import DecoderLayer
from optgptq.models.spec import DecoderSpec
from optgptq.numerics import exact_float32_products

# Rows of a softmax in float32 over some thousand keys sum to one within a few units of this.
_ROW_SUM_TOLERANCE = 1e-4


def attention_weights(
    query_GSD: torch.Tensor,
    key_TD: torch.Tensor,
    positions_S: torch.Tensor,
    *,
    spec: DecoderSpec,
    layer_index: int,
    first_head: int,
) -> torch.Tensor:
    """Return the weights `[G, S, T]` with which queries at `positions_S` read the keys at positions `0 .. T - 1`.

    The same scale, soft cap, ALiBi bias, causal mask and sliding window as `causal_attention`; the softmax is in
    float32, or in float64 where the queries are. Windows may come first: then every argument and the result have them.

    Args:
        query_GSD: rotated queries.
        key_TD: rotated keys.
        positions_S: int64, all below `T`.
        spec: the model.
        layer_index: for scale and window.
        first_head: index of the first of the `G` query heads among all, for the slopes of ALiBi.
    """
    layer = spec.layers[layer_index]
    exact = torch.promote_types(query_GSD.dtype, torch.float32)
    with exact_float32_products():
        # Scores are many more than queries: the scale is in the latter.
        query_RD = query_GSD.to(exact).mul(layer.attention_scale).flatten(-3, -2)
        scores = torch.matmul(query_RD, key_TD.to(exact).mT).view(*query_GSD.shape[:-1], -1)
    if spec.attention_softcap is not None:
        scores.div_(spec.attention_softcap).tanh_().mul_(spec.attention_softcap)
    key_position = torch.arange(key_TD.shape[-2], device=key_TD.device)
    if spec.alibi is not None:
        heads = slice(first_head, first_head + query_GSD.shape[-3])
        # The model adds its bias in the dtype of the queries: far positions are rounded there.
        scores.add_(alibi_bias(spec.alibi, key_position)[heads].to(query_GSD.dtype).to(exact).unsqueeze(1))
    query_position = positions_S.unsqueeze(-1)
    hidden = key_position > query_position
    if layer.sliding_window is not None:
        hidden |= key_position <= query_position - layer.sliding_window
    return torch.softmax(scores.masked_fill_(hidden.unsqueeze(-3), float("-inf")), dim=-1)


def check_causal(weights_GST: torch.Tensor, positions_S: torch.Tensor, *, where: str) -> None:
    """Check that attention weights are a causal softmax: no weight on later keys, every row a distribution.

    Raises:
        NumericalError: a weight above the diagonal is not exactly zero, or a row does not sum to one.
    """
    sums = weights_GST.sum(dim=-1)
    error = float((sums - 1).abs().max()) if sums.numel() else 0.0
    # Written so that NaN is caught too.
    if not error <= _ROW_SUM_TOLERANCE or bool((weights_GST < 0).any()):
        raise NumericalError(
            where,
            expected="softmax attention: weights that are not negative and sum to 1 for every query",
            found=f"sums that differ from 1 by up to {error:.3g}, smallest weight {float(weights_GST.min()):.3g}",
            action="Check the model's weights and calibration.compute_dtype, or switch the attention moments off.",
        )
    later = torch.arange(weights_GST.shape[-1], device=weights_GST.device) > positions_S.unsqueeze(1)
    leaked = float(weights_GST.masked_select(later).abs().max()) if bool(later.any()) else 0.0
    if leaked != 0.0:
        raise NumericalError(
            where,
            expected="causal attention: no weight on later positions",
            found=f"a weight of {leaked:.3g} on a later position",
            action="Use a model with causal attention, or switch the attention moments off.",
        )


def check_attention(layer: DecoderLayer, inputs_BSM: torch.Tensor, context: AttentionContext) -> None:
    """Check that the written-out weights give the attention the model really runs; one short window is enough.

    `inputs_BSM` is the layer's stage input of `qkv`, without padding.

    Raises:
        NumericalError: they differ: the attention in use is not the causal softmax that the moments describe.
    """
    spec, group = layer.spec, layer.spec.num_heads // layer.spec.num_kv_heads
    query_BNSD, key_BKSD, value_BKSD = layer.project_heads(inputs_BSM, context)
    expected_BNSD = context.attend(layer.index, query_BNSD, key_BKSD, value_BKSD, spec).double()
    positions_S = torch.arange(inputs_BSM.shape[1], device=inputs_BSM.device)
    difference = 0.0
    for row in range(inputs_BSM.shape[0]):
        for first_head in range(0, spec.num_heads, group):
            heads, kv_head = slice(first_head, first_head + group), first_head // group
            weights_GST = attention_weights(
                query_BNSD[row, heads],
                key_BKSD[row, kv_head],
                positions_S,
                spec=spec,
                layer_index=layer.index,
                first_head=first_head,
            )
            found_GSD = weights_GST.double() @ value_BKSD[row, kv_head].double()
            difference += float((found_GSD - expected_BNSD[row, heads]).square().sum())
    relative = (difference / max(float(expected_BNSD.square().sum()), torch.finfo(torch.float64).tiny)) ** 0.5
    allowed = _allowed_difference(query_BNSD.dtype)
    if not relative <= allowed:
        raise NumericalError(
            f"attention of decoder layer {layer.index}",
            expected=f"the output of causal softmax attention, within {allowed:g} of its size",
            found=f"a difference of {relative:.3g}",
            action="Use a model with causal softmax attention, or switch the attention moments off.",
        )


def _allowed_difference(dtype: torch.dtype) -> float:
    # Above rounding, far below what a wrong mask, scale or bias does.
    return max(8 * torch.finfo(dtype).eps, 1e-4)
