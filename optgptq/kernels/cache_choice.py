"""Which implementation of attention over a quantized cache runs, decided once per model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from optgptq.kernels import quantized_attention as plain
from optgptq.kernels.fast_attention import takes_triton, what_is_lost
from optgptq.kernels.paged_attention import ScoreRule
from optgptq.kernels.quantized_attention import CacheBatch, CacheStorage
from optgptq.kv_cache.scheme import LayerScheme
from optgptq.native import quantized_attention as native

StoreCache = Callable[[torch.Tensor, torch.Tensor, CacheStorage, CacheBatch], None]
"""`key_TKD, value_TKD, storage, batch`."""
CacheAttention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, CacheStorage, CacheBatch, ScoreRule], torch.Tensor]
"""`query_TND, key_TKD, value_TKD, storage, batch, rule`; gives `[T, N, D]`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheChoice:
    """An implementation and why it was taken.

    Attributes:
        name: which implementation.
        reason: one sentence for the log and for `optgptq doctor`.
        store: writes codes and exact numbers into pages; called before `attend`.
        attend: reads them.
        rows_are_independent: a token's result has the same bits in every step, whatever else is in it, as long as the
            same keys are exact.
        can_be_recorded: nothing is read back from the device, so a graph can hold it.
        is_makeshift: there is a faster one for the device, which cannot run here; worth a warning.
    """

    name: str
    reason: str
    store: StoreCache
    attend: CacheAttention
    rows_are_independent: bool
    can_be_recorded: bool = False
    is_makeshift: bool = False


def choose_cache_attention(
    device: torch.device, dtype: torch.dtype, head_dim: int, schemes: Sequence[LayerScheme]
) -> CacheChoice:
    """Return what serves all of the schemes on `device` for queries of `dtype`; plain torch runs anywhere.

    That of triton runs on CUDA and HIP devices, which torch both calls `cuda`; triton is imported here, if at all.
    """
    place = f"{device.type} in {str(dtype).removeprefix('torch.')}, head dimension {head_dim}"
    if native.takes_cache(device, dtype, schemes):
        return CacheChoice(
            name="native",
            reason=f"compiled attention over codes on {place}: each code is read once for all heads that share it",
            store=native.store,
            attend=native.attend,
            rows_are_independent=True,
        )
    if takes_triton(device, dtype, head_dim):
        from optgptq.kernels import triton_quantized_attention

        return CacheChoice(
            name="triton",
            reason=f"one triton kernel over codes and exact keys on {place}",
            store=triton_quantized_attention.store,
            attend=triton_quantized_attention.attend,
            rows_are_independent=True,
            can_be_recorded=True,
        )
    lost = what_is_lost(device, dtype, head_dim)
    return CacheChoice(
        name="torch",
        reason=f"plain torch on {place}: {lost or 'the only one for this device and dtype'}",
        store=plain.store,
        attend=plain.attend,
        rows_are_independent=False,
        is_makeshift=lost is not None,
    )
