"""Attention with merged heads: shared keys folded into the queries, shared values into the output projection.

Keys. With no rotation between projection and score, `(T^T q) (e x) = q (T e x)` for any maps `T` and `e`; what all keys
of a query have in common drops out of the softmax, so the keys' mean, and with it their bias, is left out of the
problem. Where a soft cap or a rotation stands in between nothing drops out, and the bias goes the way of the keys.

Values. `sum_n W_n (A_n v)` becomes `sum_n (W_n U) (A_n e v)`. Attention weights sum to one, so a constant part of the
values is a constant of the output: where the output projection has a bias, the values' bias moves there, together with
the mean of what is lost.

Shapes: `N` query heads, `K` key/value heads, `D` head dimension, `I` input columns, `M` model width, `G` groups,
`C` heads of a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from optgptq.gqa.heads import HeadWeights
from optgptq.gqa.keys import KeyRule, centred_keys, query_weights
from optgptq.gqa.rotary import shared_rotary_key
from optgptq.gqa.statistics import AttendedValues, Groups, HeadMoments
from optgptq.gqa.subspace import SharedSubspace, shared_subspace


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class MergedHeads:
    """The new attention weights, and the shares of energy that the shared heads lose on the calibration text.

    Attributes:
        heads: with one key/value head per group, query heads in the order of the groups.
        key_error: of scores.
        value_error: of the attention's output.
    """

    heads: HeadWeights
    key_error: float
    value_error: float


def query_order(groups: Groups, num_heads: int, num_kv_heads: int) -> list[int]:
    """Return the query heads as they stand in the new model: those of the first group, then those of the next."""
    shared = num_heads // num_kv_heads
    return [head * shared + offset for group in groups for head in group for offset in range(shared)]


def merge_heads(
    heads: HeadWeights, moments: HeadMoments, attended: AttendedValues, groups: Groups, rule: KeyRule
) -> MergedHeads:
    """Return attention with one key/value head per group.

    Args:
        heads: of the layer.
        moments: of its heads.
        attended: of its values, for the same groups.
        groups: all of one size.
        rule: of the layer.
    """
    keys = _shared_keys(moments, groups, rule)
    has_constant = heads.output_bias_M is not None
    values = _shared_values(heads, attended, groups, centred=has_constant)
    num_heads, num_kv_heads = len(heads.query_NDI), len(heads.key_KDI)
    order = query_order(groups, num_heads, num_kv_heads)
    key_NDR, value_NDR = (_by_query_head(each, num_heads // num_kv_heads) for each in (keys, values))
    bias_ND = heads.query_bias_ND
    merged = HeadWeights(
        query_NDI=key_NDR.mT @ heads.query_NDI[order],
        key_KDI=_encoded(keys, groups, heads.key_KDI),
        value_KDI=_encoded(values, groups, heads.value_KDI),
        output_MND=torch.einsum("mnd,ndr->mnr", heads.output_MND[:, order], value_NDR),
        query_bias_ND=None if bias_ND is None else torch.einsum("ndr,nd->nr", key_NDR, bias_ND[order]),
        key_bias_KD=_key_bias(heads, keys, groups, rule),
        value_bias_KD=_value_bias(heads, values, groups),
        output_bias_M=None if not has_constant else _output_bias(heads, attended, values, groups),
    )
    return MergedHeads(heads=merged, key_error=_lost(keys), value_error=_lost(values))


def _shared_keys(moments: HeadMoments, groups: Groups, rule: KeyRule) -> list[SharedSubspace]:
    key_KDKD = centred_keys(moments, rule)
    size = key_KDKD.shape[1]
    query_KDD = query_weights(moments)
    found = []
    for group in groups:
        members = list(group)
        moment_CDCD = key_KDKD[members][:, :, members]
        if rule.rotary_dim:
            found.append(shared_rotary_key(query_KDD[members], moment_CDCD, rule.rotary_dim))
        else:
            found.append(shared_subspace(query_KDD[members], moment_CDCD, size))
    return found


def _shared_values(
    heads: HeadWeights, attended: AttendedValues, groups: Groups, *, centred: bool
) -> list[SharedSubspace]:
    num_kv_heads, size = heads.value_KDI.shape[:2]
    readers_KDD = reader_weights(heads)
    found = []
    for index, group in enumerate(groups):
        moment_CDCD = attended.moment_GCDCD[index]
        if centred:
            order = query_order((group,), len(heads.query_NDI), num_kv_heads)
            mean_NCD = attended.mean_NCD[order]
            moment_CDCD = moment_CDCD - torch.einsum("ncd,nge->cdge", mean_NCD, mean_NCD) / len(order)
        found.append(shared_subspace(readers_KDD[list(group)], moment_CDCD, size))
    return found


def reader_weights(heads: HeadWeights) -> torch.Tensor:
    """Return `[K, D, D]`: what an error of each value head costs at the attention's output."""
    num_kv_heads, size = heads.value_KDI.shape[:2]
    output_NDM = heads.output_MND.permute(1, 2, 0)
    return (output_NDM @ output_NDM.mT).view(num_kv_heads, -1, size, size).sum(1)


def _by_query_head(shared: list[SharedSubspace], num_sharing: int) -> torch.Tensor:
    """Return `[N, D, D]`: the map from the shared head to the old one, for each query head in the new order."""
    return torch.cat([each.decode_KDR for each in shared]).repeat_interleave(num_sharing, dim=0)


def _encoded(shared: list[SharedSubspace], groups: Groups, weight_KDX: torch.Tensor) -> torch.Tensor:
    parts = [
        torch.einsum("rkd,kd...->r...", each.encode_RKD, weight_KDX[list(group)])
        for each, group in zip(shared, groups, strict=True)
    ]
    return torch.stack(parts)


def _key_bias(heads: HeadWeights, keys: list[SharedSubspace], groups: Groups, rule: KeyRule) -> torch.Tensor | None:
    if heads.key_bias_KD is None:
        return None
    bias_KD = _encoded(keys, groups, heads.key_bias_KD)
    return torch.zeros_like(bias_KD) if rule.drops_mean else bias_KD


def _value_bias(heads: HeadWeights, values: list[SharedSubspace], groups: Groups) -> torch.Tensor | None:
    if heads.value_bias_KD is None:
        return None
    bias_KD = _encoded(values, groups, heads.value_bias_KD)
    return bias_KD if heads.output_bias_M is None else torch.zeros_like(bias_KD)


def _output_bias(
    heads: HeadWeights, attended: AttendedValues, values: list[SharedSubspace], groups: Groups
) -> torch.Tensor:
    """Return the output's bias: what the shared values lack on average, their dropped bias included."""
    assert heads.output_bias_M is not None
    bias_M = heads.output_bias_M.clone()
    shared = len(heads.query_NDI) // len(heads.key_KDI)
    for each, group in zip(values, groups, strict=True):
        dropped_R = torch.zeros(each.encode_RKD.shape[0], dtype=bias_M.dtype, device=bias_M.device)
        if heads.value_bias_KD is not None:
            dropped_R = torch.einsum("rkd,kd->r", each.encode_RKD, heads.value_bias_KD[list(group)])
        for place, head in enumerate(group):
            for query in range(head * shared, (head + 1) * shared):
                mean_CD = attended.mean_NCD[query]
                kept_R = torch.einsum("rkd,kd->r", each.encode_RKD, mean_CD) - dropped_R
                bias_M += heads.output_MND[:, query] @ (mean_CD[place] - each.decode_KDR[place] @ kept_R)
    return bias_M


def _lost(shared: list[SharedSubspace]) -> float:
    energy = sum(each.energy for each in shared)
    return sum(each.error for each in shared) / energy if energy > 0 else 0.0
