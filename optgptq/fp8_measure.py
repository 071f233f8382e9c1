"""Scales of an fp8 cache for other engines, measured with weights that are quantized."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from optgptq.calibration.stream import ActivationStream
from optgptq.checkpoint.writer import TensorEntry
from optgptq.formats.fp8_scales import Strategy, fp8_entries, fp8_tensors
from optgptq.kv_calibration.statistics import window_heads
from optgptq.models.layer import DecoderLayer
from optgptq.models.spec import DecoderSpec
from optgptq.recipe.records import Recipe


@dataclass(frozen=True, slots=True)
class Fp8Measure:
    """What is asked for.

    Attributes:
        spec: the model.
        strategy: one scale for a layer or for each head.
        num_windows: calibration windows that are looked at.
    """

    spec: DecoderSpec
    strategy: Strategy
    num_windows: int

    @classmethod
    def of(cls, spec: DecoderSpec, recipe: Recipe) -> Fp8Measure | None:
        """Return what the recipe asks for; None for nothing."""
        strategies: dict[str, Strategy | None] = {"off": None, "tensor": "tensor", "head": "attn_head"}
        strategy = strategies[recipe.kv_cache.fp8_scales]
        return None if strategy is None else cls(spec, strategy, recipe.kv_cache.num_windows)

    def entries(self) -> tuple[TensorEntry, ...]:
        """Return the tensors of all layers."""
        modules = [self._attention_module(index) for index in range(self.spec.num_layers)]
        return fp8_entries(modules, strategy=self.strategy, num_kv_heads=self.spec.num_kv_heads)

    def scales(self, start: ActivationStream, layer: DecoderLayer) -> dict[str, torch.Tensor]:
        """Return the tensors of a layer whose weights are quantized; `start`: the windows before it."""
        maxima = [
            (key_KSD.abs().amax((1, 2)), value_KSD.abs().amax((1, 2)))
            for window, (_, key_KSD, value_KSD) in window_heads(start, layer)
            if window < self.num_windows
        ]
        keys, values = (torch.stack(parts).amax(0) for parts in zip(*maxima, strict=True))
        return fp8_tensors([self._attention_module(layer.index)], [keys], [values], strategy=self.strategy)

    def _attention_module(self, index: int) -> str:
        (output,) = self.spec.linear_names(index, "o")
        return output.rpartition(".")[0]
