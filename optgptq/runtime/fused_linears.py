"""Query, key and value, or gate and up, as one product: fewer and larger operations for a running model.

Shapes: `O` output rows, `I` input columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from optgptq.memory import return_free_memory
from optgptq.models.decoder import Decoder
from optgptq.models.layer import DecoderLayer
from optgptq.models.linear import Linear, LinearLike
from optgptq.models.spec import DecoderSpec, Stage
from optgptq.runtime.linear import QuantLinear

FUSED_QKV, FUSED_GATE_UP = "fused_qkv", "fused_gate_up"


def fuse_linears(decoder: Decoder) -> Decoder:
    """Return the model with the linears of each stage joined where all of them are held in the same way.

    The decoder's own layers are emptied as their linears are joined, so that no weight is held twice.
    """
    layers = []
    for index, layer in enumerate(decoder.layers):
        layers.append(_fused_layer(layer))
        decoder.layers[index] = layers[-1]
        del layer
        return_free_memory()
    return replace(decoder, layers=layers)


def _fused_layer(layer: DecoderLayer) -> DecoderLayer:
    spec, linears = layer.spec, dict(layer.linears)
    if spec.qkv_layout == "split":
        spec = _join(spec, linears, spec.stage("qkv"), FUSED_QKV)
    if spec.gated and len(spec.stage("gate_up").linears) == 2:
        spec = _join(spec, linears, spec.stage("gate_up"), FUSED_GATE_UP)
    return replace(layer, spec=spec, linears=linears)


def _join(spec: DecoderSpec, linears: dict[str, LinearLike], stage: Stage, name: str) -> DecoderSpec:
    """Replace the linears of a stage by one, where that can be; return the spec that says so."""
    joined = _joined([linears[local] for local in stage.linears])
    if joined is None:
        return spec
    for local in stage.linears:
        del linears[local]
    linears[name] = joined
    fused = replace(stage, linears=(name,), fused_name="")
    stages = tuple(fused if other.name == stage.name else other for other in spec.stages)
    return replace(spec, stages=stages, qkv_layout="concatenated" if stage.name == "qkv" else spec.qkv_layout)


def _joined(parts: Sequence[LinearLike]) -> LinearLike | None:
    dense = [part for part in parts if isinstance(part, Linear)]
    if len(dense) == len(parts):
        weight_OI = torch.cat([part.weight_OI for part in dense])
        return Linear(weight_OI, _joined_bias([(part.bias_O, len(part.weight_OI)) for part in dense], weight_OI))
    held: list[QuantLinear[Any]] = [part for part in parts if isinstance(part, QuantLinear)]
    if len(held) < len(parts) or any(part.kernel is not held[0].kernel for part in held):
        return None
    weights = [part.weight for part in held]
    if not all(type(weight) is type(weights[0]) and weights[0].stacks_with(weight) for weight in weights):
        return None
    bias_O = _joined_bias([(part.bias_O, part.weight.out_features) for part in held], None)
    return QuantLinear(weight=weights[0].stacked(weights), bias_O=bias_O, kernel=held[0].kernel)


def _joined_bias(parts: Sequence[tuple[torch.Tensor | None, int]], like: torch.Tensor | None) -> torch.Tensor | None:
    biases = [bias for bias, _ in parts if bias is not None]
    if not biases:
        return None
    like = biases[0] if like is None else like
    return torch.cat([like.new_zeros(rows) if bias is None else bias for bias, rows in parts])
