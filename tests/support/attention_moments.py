"""Attention moments of tiny layers, collected in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from optgptq.calibration.attention_inputs import AttentionInputs, attention_inputs
from optgptq.calibration.attention_moments import AttentionMoments, AttentionMomentSettings
from optgptq.models.attention import AttentionContext, attention_context
from optgptq.models.layer import DecoderLayer

FLOAT64 = AttentionMomentSettings(dtype=torch.float64)
QUERY, KEY, VALUE = "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"


def context_of(layer: DecoderLayer, num_positions: int) -> AttentionContext:
    return attention_context(layer.spec, num_positions, dtype=torch.float64)


def heads_of(layer: DecoderLayer, inputs_BSI: torch.Tensor) -> AttentionInputs:
    return attention_inputs(layer, inputs_BSI, context_of(layer, inputs_BSI.shape[1]))


def all_heads(layer: DecoderLayer, **values: Any) -> AttentionMomentSettings:
    return replace(FLOAT64, value_heads=range(layer.spec.num_kv_heads), **values)


def collected(
    layer: DecoderLayer, inputs_BSI: torch.Tensor, settings: AttentionMomentSettings = FLOAT64
) -> AttentionMoments:
    moments = AttentionMoments(layer, settings, num_positions=inputs_BSI.shape[1])
    moments.add(heads_of(layer, inputs_BSI))
    return moments


def change(layer: DecoderLayer, name: str, *, seed: int = 5, size: float = 1.0) -> torch.Tensor:
    linear: Any = layer.linears[name]
    generator = torch.Generator().manual_seed(seed)
    return size * torch.randn(linear.weight_OI.shape, generator=generator, dtype=torch.float64)


def two_sided(output_DD: torch.Tensor, change_DI: torch.Tensor, input_II: torch.Tensor) -> float:
    return float(torch.trace(output_DD @ change_DI @ input_II @ change_DI.T))
