"""Tiny attention layers in float64 with random weights, and their arithmetic written out as loops."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from optgptq.models.layer import DecoderLayer, LayerNorms
from optgptq.models.linear import Linear
from optgptq.models.norm import Norm
from optgptq.models.registry import config_spec
from optgptq.models.rope import inverse_frequencies
from optgptq.models.spec import AlibiSpec, NormSpec, RopeSpec

_CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 11,
    "hidden_size": 10,
    "intermediate_size": 10,
    "num_hidden_layers": 1,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 5,
    "max_position_embeddings": 64,
}
ROPE = RopeSpec(kind="default", theta=50.0, rotary_dim=4)
SLOPES = (0.5, 0.25, 0.3, 0.1, 0.05, 0.7)


def attention_layer(
    *,
    num_kv_heads: int = 2,
    rope: RopeSpec | None = ROPE,
    window: int | None = None,
    softcap: float | None = None,
    alibi: bool = False,
    norms: bool = False,
    seed: int = 0,
    weight_scale: float = 0.6,
) -> DecoderLayer:
    """Return a layer of width 10 with six query heads of five features; only its `qkv` stage has linears."""
    spec = config_spec(_CONFIG)
    names = spec.names if norms else replace(spec.names, query_norm=None, key_norm=None)
    spec = replace(
        spec,
        names=names,
        num_kv_heads=num_kv_heads,
        norm=NormSpec(kind="rms", eps=1e-2),
        layers=(replace(spec.layers[0], rope=rope, sliding_window=window),),
        attention_softcap=softcap,
        alibi=AlibiSpec(slopes=SLOPES, scale=0.5) if alibi else None,
    )
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return weight_scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

    counts = (spec.num_heads, num_kv_heads, num_kv_heads)
    linears = {
        name: Linear(random(count * spec.head_dim, spec.hidden_size), random(count * spec.head_dim))
        for name, count in zip(spec.stage("qkv").linears, counts, strict=True)
    }
    layer_norms = LayerNorms(
        query=Norm(spec.norm, spec.head_dim, 1 + random(spec.head_dim), None) if norms else None,
        key=Norm(spec.norm, spec.head_dim, 1 + random(spec.head_dim), None) if norms else None,
    )
    return DecoderLayer(spec=spec, index=0, linears=dict(linears), norms=layer_norms)


def random_inputs(batch: int, num_positions: int, width: int = 10, *, seed: int = 1) -> torch.Tensor:
    """Return float64 `[B, S, I]` with columns of different sizes and correlations between neighbours."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(batch, num_positions, width, generator=generator, dtype=torch.float64)
    inputs = inputs + 0.5 * inputs.roll(1, dims=1)
    return inputs * torch.linspace(0.5, 2, width, dtype=torch.float64)


def literal_rotation(rope: RopeSpec, position: int, *, num_positions: int, head_dim: int) -> torch.Tensor:
    """Return the matrix `[D, D]` that a head at `position` is multiplied with."""
    angles = position * inverse_frequencies(rope, num_positions=num_positions)
    matrix = torch.eye(head_dim, dtype=torch.float64)
    half = rope.rotary_dim // 2
    for pair in range(half):
        cosine = math.cos(float(angles[pair])) * rope.attention_factor
        sine = math.sin(float(angles[pair])) * rope.attention_factor
        matrix[pair, pair] = matrix[pair + half, pair + half] = cosine
        matrix[pair, pair + half], matrix[pair + half, pair] = -sine, sine
    return matrix


def literal_weights(layer: DecoderLayer, query_SD: torch.Tensor, key_SD: torch.Tensor, head: int) -> torch.Tensor:
    """Return the attention weights `[S, S]` of one query head, zero where a key is not seen."""
    spec, rule = layer.spec, layer.spec.layers[layer.index]
    num_positions = query_SD.shape[0]
    weights_SS = torch.zeros(num_positions, num_positions, dtype=torch.float64)
    for position in range(num_positions):
        first = 0 if rule.sliding_window is None else max(0, position - rule.sliding_window + 1)
        scores = []
        for key in range(first, position + 1):
            score = float(query_SD[position] @ key_SD[key]) * rule.attention_scale
            if spec.attention_softcap is not None:
                score = spec.attention_softcap * math.tanh(score / spec.attention_softcap)
            if spec.alibi is not None:
                score += spec.alibi.slopes[head] * key * spec.alibi.scale
            scores.append(score)
        weights_SS[position, first : position + 1] = torch.softmax(torch.tensor(scores, dtype=torch.float64), dim=0)
    return weights_SS


def changed(layer: DecoderLayer, name: str, change_OI: torch.Tensor) -> DecoderLayer:
    """Return the layer with `change_OI` added to one weight."""
    other = layer.copy()
    linear: Any = layer.linears[name]
    other.linears[name] = Linear(linear.weight_OI + change_OI, linear.bias_O)
    return other
