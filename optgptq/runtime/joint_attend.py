"""Attention of a step from joint projections on, in one call for each decoder layer.

Shapes: `T` tokens of a step, `N` query heads, `K` key/value heads, `D` head dimension.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from optgptq.kernels.attention_choice import AttentionChoice, JointAttention, JointStep
from optgptq.kernels.paged_attention import ScoreRule
from optgptq.models.decoder import Decoder
from optgptq.models.layer import DecoderLayer
from optgptq.models.rope import RopeTable
from optgptq.models.spec import RopeSpec
from optgptq.runtime.page_pool import LayerPages, PagePool
from optgptq.runtime.step_batch import StepBatch

StepKind = tuple[int, RopeSpec | None]
"""A group of pages and a rotary table."""


@dataclass(slots=True, eq=False, kw_only=True)
class JointAttend:
    """The `AttendJoint` of a step.

    Attributes:
        layers: attention of each decoder layer over its pages.
        kinds: for each decoder layer the pages and the table that it uses.
        steps: the present step, once for each of these.
        work: `[T, N + 2 K, D]` and `[T, N, D]`, grown as steps ask for it.
    """

    layers: tuple[JointAttention, ...]
    kinds: tuple[StepKind, ...]
    steps: dict[StepKind, JointStep] = field(default_factory=dict)
    work: tuple[torch.Tensor, torch.Tensor] = field(default_factory=lambda: (torch.empty(0), torch.empty(0)))

    def take(self, batch: StepBatch, tables: Mapping[RopeSpec, RopeTable]) -> None:
        """Attend to this step from now on; `tables` are those of its tokens."""
        self._grow(len(batch.token_T))
        rotations = {rope: (_rows(table.cosine), _rows(table.sine)) for rope, table in tables.items()}
        self.steps = {}
        for kind in dict.fromkeys(self.kinds):
            number, rope = kind
            cosine_TR, sine_TR = (None, None) if rope is None else rotations[rope]
            self.steps[kind] = self.layers[0].step(batch.groups[number], cosine_TR, sine_TR, self.work)

    def __call__(self, layer_index: int, joint_BSO: torch.Tensor, /) -> torch.Tensor:
        """Return attention `[B, S, N * D]` of the step's new tokens, whose keys and values are stored."""
        return self.layers[layer_index](joint_BSO, self.steps[self.kinds[layer_index]])

    def _grow(self, num_tokens: int) -> None:
        if len(self.work[0]) < num_tokens:
            self.work = self.layers[0].work_space(num_tokens)


def start_joint_attend(
    decoder: Decoder, pool: PagePool, attention: AttentionChoice, rules: Sequence[ScoreRule]
) -> JointAttend | None:
    """Return the attention of all layers; None where the kernels have none, or pages hold codes."""
    layers = []
    for layer, pages, rule in zip(decoder.layers, pool.layers, rules, strict=True):
        if attention.joint is None or not isinstance(pages, LayerPages):
            return None
        layers.append(_of_layer(layer, pages, attention.joint, rule))
    kinds = [(number, layer.rope) for number, layer in zip(pool.group_of_layer, decoder.spec.layers, strict=True)]
    return JointAttend(layers=tuple(layers), kinds=tuple(kinds))


def _of_layer(layer: DecoderLayer, pages: LayerPages, make: type[JointAttention], rule: ScoreRule) -> JointAttention:
    query, key = layer.norms.query, layer.norms.key
    norms = None
    if query is not None and key is not None and query.weight is not None and key.weight is not None:
        norms = (query.weight, key.weight)
    storages = (pages.keys_ZKDY, pages.values_ZKYD)
    return make(*storages, rule, layer.spec.num_heads, norms=norms, eps=layer.spec.norm.eps)


def _rows(table: torch.Tensor) -> torch.Tensor:
    """Return float32 `[T, R / 2]`."""
    return table.reshape(-1, table.shape[-1]).float()
