"""The memory of keys and values: for each decoder layer one storage of keys and one of values, cut into pages.

Separate storages stay below 2 GiB longer, up to where GPUs address them with 32-bit offsets.

Shapes: `Z` pages, `K` key/value heads, `D` head dimension, `Y` tokens of a page.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from optgptq.models.spec import DecoderSpec
from optgptq.runtime.memory_plan import MemoryPlan
from optgptq.scheduling.step import PageCopy


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class LayerPages:
    """Pages of one decoder layer: `keys_ZKDY` and `values_ZKYD`."""

    keys_ZKDY: torch.Tensor
    values_ZKYD: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class PagePool:
    """All pages.

    Attributes:
        plan: how many there are.
        layers: storages of each decoder layer.
        group_of_layer: index into the plan's groups for each decoder layer.
    """

    plan: MemoryPlan
    layers: tuple[LayerPages, ...]
    group_of_layer: tuple[int, ...]

    @classmethod
    def allocate(cls, plan: MemoryPlan, spec: DecoderSpec, *, dtype: torch.dtype, device: torch.device) -> PagePool:
        """Take the memory. It is not written to: a processor's memory is used as pages are."""
        group_of_layer = [0] * spec.num_layers
        for number, group in enumerate(plan.groups):
            for index in group.layers:
                group_of_layer[index] = number

        def empty(pages: int, *shape: int) -> torch.Tensor:
            return torch.empty((pages, spec.num_kv_heads, *shape), dtype=dtype, device=device)

        layers = []
        for number in group_of_layer:
            pages = plan.num_pages[number]
            keys_ZKDY = empty(pages, spec.head_dim, plan.page_size)
            values_ZKYD = empty(pages, plan.page_size, spec.head_dim)
            layers.append(LayerPages(keys_ZKDY=keys_ZKDY, values_ZKYD=values_ZKYD))
        return cls(plan=plan, layers=tuple(layers), group_of_layer=tuple(group_of_layer))

    def copy(self, copies: Iterable[PageCopy]) -> None:
        """Copy whole pages, in every layer of their group."""
        for copy in copies:
            for index in self.plan.groups[copy.group].layers:
                pages = self.layers[index]
                for storage in (pages.keys_ZKDY, pages.values_ZKYD):
                    storage[copy.target].copy_(storage[copy.source])
