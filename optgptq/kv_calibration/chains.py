"""The streams that run side by side while a cache is calibrated, with at most six decoder layers in memory.

All windows run through the layers with the past quantized so far; those that are held out also run with a plain cache,
some layers ahead, and with plain rounding, for comparison.

Shapes: `B` windows of a batch, `S` positions, `M` model width.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from optgptq.calibration.states import KeptState
from optgptq.calibration.stream import ActivationStream, Batch
from optgptq.kv_cache.scheme import PastRule
from optgptq.kv_calibration.attend import LayerQuantizer
from optgptq.kv_calibration.score import NUM_FOLLOWING, BlockScore, ScoredBatch, quantized_context
from optgptq.models.attention import AttentionContext
from optgptq.models.layer import DecoderLayer, LayerState

LayerOf = Callable[[int], DecoderLayer]


@dataclass(slots=True, eq=False)
class Chains:
    """All windows before decoder layer `index`.

    Attributes:
        stream: all windows, the past quantized so far.
        layer_of: reads a decoder layer.
        num_layers: of the model.
        past: which keys are exact.
        index: the layer that comes next.
        layers: that one and the following ones, as far as they are read.
        ahead: kept hidden states of the held-out windows in the full-precision model: before layer `index`, behind it,
            and so on, one list of batches each.
        plain: of the same windows with plain rounding.
    """

    stream: ActivationStream
    layer_of: LayerOf
    num_layers: int
    past: PastRule
    index: int = 0
    layers: deque[DecoderLayer] = field(default_factory=deque)
    ahead: deque[list[KeptState]] = field(default_factory=deque)
    plain: list[KeptState] = field(default_factory=list)

    @classmethod
    def start(cls, stream: ActivationStream, layer_of: LayerOf, *, num_layers: int, past: PastRule) -> Chains:
        """Return the chains before the first decoder layer."""
        chains = cls(stream=stream, layer_of=layer_of, num_layers=num_layers, past=past)
        chains.plain = [batch.kept for batch in chains.held_out]
        chains.ahead.append(list(chains.plain))
        return chains

    @property
    def held_out(self) -> list[Batch]:
        """Batches that choose."""
        return [batch for batch in self.stream.batches if batch.held_out]

    def layer(self) -> DecoderLayer:
        """Return the layer that comes next."""
        self._read(1)
        return self.layers[0]

    def judge(self) -> BlockScore:
        """Return what judges quantizers of the layer that comes next."""
        count = min(NUM_FOLLOWING + 1, self.num_layers - self.index)
        self._read(count)
        while len(self.ahead) <= count:
            layer = self.layers[len(self.ahead) - 1]
            self.ahead.append(self._through(layer, self.ahead[-1], self.stream.context))
        batches = [
            ScoredBatch(hidden=batch.kept, valid_BS=batch.valid_BS, near=near, far=far)
            for batch, near, far in zip(self.held_out, self.ahead[1], self.ahead[count], strict=True)
        ]
        return BlockScore(
            layers=tuple(self.layers)[:count], batches=batches, context=self.stream.context, past=self.past
        )

    def advance(self, quantizer: LayerQuantizer, plain: LayerQuantizer) -> None:
        """Take all windows through the layer, the past quantized by `quantizer`, and by `plain` in the comparison."""
        layer, context = self.layer(), self.stream.context
        chosen = quantized_context(context, {layer.index: quantizer}, self.past)
        rounded = quantized_context(context, {layer.index: plain}, self.past)
        if len(self.ahead) == 1:
            self.ahead.append(self._through(layer, self.ahead[0], context))
        for batch in self.stream.batches:
            batch.state = LayerState(hidden_BSM=layer.forward(batch.state.hidden_BSM, chosen))
        self.plain = self._through(layer, self.plain, rounded)
        self.ahead.popleft()
        self.layers.popleft()
        self.index += 1

    def _through(self, layer: DecoderLayer, kept: Sequence[KeptState], context: AttentionContext) -> list[KeptState]:
        store = self.stream.batches[0].store
        return [store.keep(LayerState(hidden_BSM=layer.forward(hidden_BSM, context))) for hidden_BSM in hidden_of(kept)]

    def _read(self, count: int) -> None:
        while len(self.layers) < count:
            self.layers.append(self.layer_of(self.index + len(self.layers)))


def hidden_of(kept: Sequence[KeptState]) -> Iterator[torch.Tensor]:
    """Yield hidden states `[B, S, M]`, each read when its turn comes."""
    return (each.read().hidden_BSM for each in kept)


def copied(stream: ActivationStream) -> ActivationStream:
    """Return a stream at the same place that moves on its own; no activation is copied."""
    return stream.snapshot()
