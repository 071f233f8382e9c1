"""How far a quantized cache moves the model: at the output of attention, and where it counts, several layers on.

The cross-block score runs a layer with a quantized past and the next layers without, and compares with the
full-precision model: what reaches the residual stream, not what a squared error of keys looks like.

Source: WKVQuant, arXiv 2402.12065, cross-block reconstruction, evaluated instead of differentiated.

Shapes: `B` windows of a batch, `S` positions, `M` model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from optgptq.calibration.states import KeptState
from optgptq.kv_cache.scheme import PastRule
from optgptq.kv_calibration.attend import CacheAttend, LayerQuantizer
from optgptq.models.attention import AttentionContext
from optgptq.models.layer import DecoderLayer

# Layers behind the one that is judged, as in the paper.
NUM_FOLLOWING = 5


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class ScoredBatch:
    """Windows that choose among candidates.

    Attributes:
        hidden: hidden states before the layer, in the chain that is quantized so far.
        valid_BS: False at padding; None where there is none.
        near, far: behind the layer and behind the last following one, in the full-precision model.
    """

    hidden: KeptState
    valid_BS: torch.Tensor | None
    near: KeptState
    far: KeptState


@dataclass(slots=True)
class MeanRatio:
    """The mean absolute difference over the mean absolute value, batch by batch."""

    difference: float = 0.0
    size: float = 0.0

    def add(self, found_BSM: torch.Tensor, expected_BSM: torch.Tensor, valid_BS: torch.Tensor | None) -> None:
        """Add a batch; padding counts nothing."""
        difference, expected = (found_BSM - expected_BSM).float().abs(), expected_BSM.float().abs()
        if valid_BS is not None:
            difference, expected = difference[valid_BS], expected[valid_BS]
        self.difference += float(difference.sum(dtype=torch.float64))
        self.size += float(expected.sum(dtype=torch.float64))

    @property
    def value(self) -> float:
        """The ratio; 0 of nothing."""
        return self.difference / self.size if self.size > 0 else 0.0


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class BlockScore:
    """Judges quantizers of one decoder layer.

    Attributes:
        layers: the layer and the following ones.
        batches: to judge on.
        context: of a full-precision pass.
        past: which keys are exact.
    """

    layers: Sequence[DecoderLayer]
    batches: Sequence[ScoredBatch]
    context: AttentionContext
    past: PastRule = field(default_factory=lambda: PastRule(mode="token"))

    def cross_block(self, quantizer: LayerQuantizer) -> float:
        """Return the mean absolute difference behind the layer and behind the last one, each over the mean value."""
        near, far = MeanRatio(), MeanRatio()
        quantized = quantized_context(self.context, {self.layers[0].index: quantizer}, self.past)
        for batch in self.batches:
            hidden_BSM = self.layers[0].forward(batch.hidden.read().hidden_BSM, quantized)
            near.add(hidden_BSM, batch.near.read().hidden_BSM, batch.valid_BS)
            for layer in self.layers[1:]:
                hidden_BSM = layer.forward(hidden_BSM, self.context)
            far.add(hidden_BSM, batch.far.read().hidden_BSM, batch.valid_BS)
        return near.value + far.value

    def attention_errors(self, quantizers: Sequence[LayerQuantizer]) -> list[float]:
        """Return the same difference behind the output projection of the layer, for each quantizer."""
        layer = self.layers[0]
        (name,) = layer.spec.stage("o").linears
        project, ratios = layer.linears[name], [MeanRatio() for _ in quantizers]
        for batch in self.batches:
            inputs_BSM = layer.stage_input("qkv", batch.hidden.read(), self.context)
            heads = layer.project_heads(inputs_BSM, self.context)
            exact_BNSD = self.context.attend(layer.index, *heads, layer.spec)
            exact_BSM = project(exact_BNSD.transpose(1, 2).flatten(2))
            for ratio, quantizer in zip(ratios, quantizers, strict=True):
                attend = CacheAttend(layers={layer.index: quantizer}, past=self.past)
                output_BNSD = attend(layer.index, *heads, layer.spec)
                ratio.add(project(output_BNSD.transpose(1, 2).flatten(2)), exact_BSM, batch.valid_BS)
        return [ratio.value for ratio in ratios]


def quantized_context(context: AttentionContext, layers: dict[int, LayerQuantizer], past: PastRule) -> AttentionContext:
    """Return the same context with the past of some layers read from codes."""
    return replace(context, attend=CacheAttend(layers=layers, past=past))
