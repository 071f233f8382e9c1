"""What errors of single keys and values cost at the output of attention, from a few queries of each window.

To first order an error `e_t` of the key at `t` moves the output of a query by `p_t (v_t - o) (q e_t)`, and an error of
the value by `p_t e_t`: the squares of what stands before the errors are the weights that are measured here. Derivation:
`docs/math/kv-cache-calibration.md`.

Shapes: `N` query heads, `K` key/value heads, `G` query heads of a group, `S` positions of a window, `P` probed queries,
`D` head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from optgptq.kv_cache.scheme import PastRule
from optgptq.kv_calibration.attend import exact_keys, score_weights
from optgptq.models.layer import DecoderLayer

_NUM_PROBES = 64


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Probed:
    """Sums over the probed queries of one window, float32.

    Attributes:
        query_KDD: of `q q^T`, each query weighted by what an error of its scores costs.
        key_mass_KS, value_mass_KS: what errors of each token's key, along the queries, and of its value cost.
    """

    query_KDD: torch.Tensor
    key_mass_KS: torch.Tensor
    value_mass_KS: torch.Tensor


def probe_window(
    layer: DecoderLayer,
    heads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    reader_NDD: torch.Tensor,
    past: PastRule,
) -> Probed:
    """Return what a few evenly spread queries of a window say; `heads` are queries `[N, S, D]`, keys and values.

    Keys and values that a query reads exactly cost nothing.
    """
    key_KSD, value_KSD = heads[1].float(), heads[2].float()
    num_kv_heads, length = key_KSD.shape[:2]
    probe_P = torch.linspace(0, length - 1, min(_NUM_PROBES, length), device=key_KSD.device).long()
    query_KGPD = heads[0][:, probe_P].float().reshape(num_kv_heads, -1, len(probe_P), key_KSD.shape[2])
    scores = torch.matmul(query_KGPD, key_KSD.unsqueeze(1).transpose(-1, -2))
    weight_KGPS = score_weights(scores, probe_P, spec=layer.spec, layer_index=layer.index)
    output_KGPD = torch.matmul(weight_KGPS, value_KSD.unsqueeze(1))
    distance_KGPS = _distances(output_KGPD, value_KSD, reader_NDD.view(num_kv_heads, -1, *reader_NDD.shape[1:]))
    value_cost = (weight_KGPS * ~exact_keys(past, length, probe_P.device)[probe_P]).square()
    key_cost = value_cost * distance_KGPS
    cost_KGP = key_cost.sum(-1)
    weighted_KGPD = query_KGPD * cost_KGP.unsqueeze(-1)
    return Probed(
        query_KDD=torch.matmul(weighted_KGPD.flatten(1, 2).transpose(1, 2), query_KGPD.flatten(1, 2)),
        key_mass_KS=(key_cost * query_KGPD.square().sum(-1, keepdim=True)).sum((1, 2)),
        value_mass_KS=value_cost.sum((1, 2)),
    )


def _distances(output_KGPD: torch.Tensor, value_KSD: torch.Tensor, reader_KGDD: torch.Tensor) -> torch.Tensor:
    """Return `(v - o)^T reader (v - o)` of each query and value, `[K, G, P, S]`."""
    read_KGPD = torch.matmul(output_KGPD, reader_KGDD)
    own_KGP = (read_KGPD * output_KGPD).sum(-1)
    value_KGSD = torch.matmul(value_KSD.unsqueeze(1), reader_KGDD)
    each_KGS = (value_KGSD * value_KSD.unsqueeze(1)).sum(-1)
    cross_KGPS = torch.matmul(read_KGPD, value_KSD.unsqueeze(1).transpose(-1, -2))
    return (own_KGP.unsqueeze(-1) - 2 * cross_KGPS + each_KGS.unsqueeze(2)).clamp_min(0)
