"""What of the keys attention depends on.

Shapes: `N` query heads, `K` key/value heads, `D` head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from optgptq.gqa.statistics import HeadMoments
from optgptq.models.spec import DecoderSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyRule:
    """What of a key the scores depend on.

    Attributes:
        rotary_dim: leading features that positions turn.
        drops_mean: a constant added to all keys changes no attention weight.
    """

    rotary_dim: int
    drops_mean: bool


def key_rule(spec: DecoderSpec, layer_index: int) -> KeyRule:
    """Return the rule of one decoder layer."""
    rope = spec.layers[layer_index].rope
    rotary_dim = 0 if rope is None else rope.rotary_dim
    return KeyRule(rotary_dim=rotary_dim, drops_mean=rope is None and spec.attention_softcap is None)


def centred_keys(moments: HeadMoments, rule: KeyRule) -> torch.Tensor:
    """Return the moment of what the scores see of the keys, `[K, D, K, D]`."""
    if not rule.drops_mean:
        return moments.key_KDKD
    return moments.key_KDKD - torch.einsum("kd,ge->kdge", moments.key_KD, moments.key_KD)


def query_weights(moments: HeadMoments) -> torch.Tensor:
    """Return `[K, D, D]`: what an error of each key head costs, the moment of the queries that meet it."""
    num_kv_heads, size = moments.key_KDKD.shape[:2]
    return moments.query_NDD.view(num_kv_heads, -1, size, size).sum(1)
