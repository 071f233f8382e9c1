"""The memory of keys and values: for each decoder layer storages of its own, cut into pages.

Separate storages stay below 2 GiB longer, up to where GPUs address them with 32-bit offsets.

Shapes: `Z` pages, `K` key/value heads, `D` head dimension, `Y` tokens of a page, `B` bytes of a page of codes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from optgptq.kernels.quantized_attention import CacheStorage
from optgptq.kv_cache.codec import SideCodec
from optgptq.kv_cache.page_layout import PageLayout
from optgptq.kv_cache.setup import LayerParameters
from optgptq.models.spec import DecoderSpec
from optgptq.runtime.cache_plan import CachePlan
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
        group_of_layer: index into the plan's groups for each decoder layer; of its codes, where it is quantized.
        exact_group: index of the group of exact pages of all quantized layers; None where there are none.
    """

    plan: MemoryPlan
    layers: tuple[LayerPages | CacheStorage, ...]
    group_of_layer: tuple[int, ...]
    exact_group: int | None = None

    @classmethod
    def allocate(
        cls,
        plan: MemoryPlan,
        spec: DecoderSpec,
        *,
        dtype: torch.dtype,
        device: torch.device,
        cache: CachePlan | None = None,
    ) -> PagePool:
        """Take the memory. It is not written to: a processor's memory is used as pages are.

        Args:
            plan: made for the same `cache`.
            spec: the model.
            dtype: of keys and values as they are computed.
            device: where the memory is.
            cache: what quantized layers store; None where there are none.
        """
        group_of_layer = [0] * spec.num_layers
        exact_group = None
        for number, group in enumerate(plan.groups):
            if group.is_exact:
                exact_group = number
                continue
            for index in group.layers:
                group_of_layer[index] = number

        def numbers(group: int) -> LayerPages:
            shape = (plan.num_pages[group], spec.num_kv_heads)
            keys_ZKDY = torch.empty(*shape, spec.head_dim, plan.page_size, dtype=dtype, device=device)
            values_ZKYD = torch.empty(*shape, plan.page_size, spec.head_dim, dtype=dtype, device=device)
            return LayerPages(keys_ZKDY=keys_ZKDY, values_ZKYD=values_ZKYD)

        layers: list[LayerPages | CacheStorage] = []
        for index, group_number in enumerate(group_of_layer):
            layout = None if cache is None else cache.layouts[index]
            if cache is None or layout is None:
                layers.append(numbers(group_number))
                continue
            exact = None if exact_group is None else numbers(exact_group)
            pages_ZB = torch.empty(plan.num_pages[group_number], layout.page_bytes, dtype=torch.uint8, device=device)
            layers.append(_storage(layout, cache.setup.layers[index], pages_ZB, exact))
        return cls(plan=plan, layers=tuple(layers), group_of_layer=tuple(group_of_layer), exact_group=exact_group)

    def tensors_of(self, group: int) -> Iterator[torch.Tensor]:
        """Yield the storages whose pages a group counts; their first dimension is the page."""
        for index in self.plan.groups[group].layers:
            pages = self.layers[index]
            if isinstance(pages, LayerPages):
                yield from (pages.keys_ZKDY, pages.values_ZKYD)
            elif group != self.exact_group:
                yield pages.pages_ZB
            else:
                assert pages.exact_keys_ZKDY is not None
                assert pages.exact_values_ZKYD is not None
                yield from (pages.exact_keys_ZKDY, pages.exact_values_ZKYD)

    def copy(self, copies: Iterable[PageCopy]) -> None:
        """Copy whole pages, in every layer of their group."""
        for copy in copies:
            for storage in self.tensors_of(copy.group):
                storage[copy.target].copy_(storage[copy.source])


def _storage(
    layout: PageLayout, parameters: LayerParameters, pages_ZB: torch.Tensor, exact: LayerPages | None
) -> CacheStorage:
    scheme, device = layout.scheme, pages_ZB.device
    return CacheStorage(
        layout=layout,
        pages_ZB=pages_ZB,
        key_codec=None if scheme.keys.is_exact else SideCodec.of(scheme.keys, parameters.keys, device),
        value_codec=None if scheme.values.is_exact else SideCodec.of(scheme.values, parameters.values, device),
        exact_keys_ZKDY=None if exact is None else exact.keys_ZKDY,
        exact_values_ZKYD=None if exact is None else exact.values_ZKYD,
    )
