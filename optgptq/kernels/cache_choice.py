"""Which implementation of attention over a quantized cache runs, decided once per model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from optgptq.kernels import quantized_attention as plain
from optgptq.kernels.paged_attention import ScoreRule
from optgptq.kernels.quantized_attention import CacheBatch, CacheStorage
from optgptq.kv_cache.scheme import LayerScheme
from optgptq.native import quantized_attention as native

StoreCache = Callable[[torch.Tensor, torch.Tensor, CacheStorage, CacheBatch], None]
"""`key_TKD, value_TKD, storage, batch`."""
CacheAttention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, CacheStorage, CacheBatch, ScoreRule], torch.Tensor]
"""`query_TND, key_TKD, value_TKD, storage, batch, rule`; gives `[T, N, D]`."""

# That of the kernel over pages of full precision.
_WIDEST_HEAD = 256
_FAST_TYPES = (torch.float32, torch.bfloat16, torch.float16)


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
    lost = _what_is_lost(device, dtype, head_dim)
    if lost is None and device.type == "cuda" and dtype in _FAST_TYPES:
        from optgptq.kernels import triton_quantized_attention

        return CacheChoice(
            name="triton",
            reason=f"one triton kernel over codes and exact keys on {place}",
            store=triton_quantized_attention.store,
            attend=triton_quantized_attention.attend,
            rows_are_independent=True,
            can_be_recorded=True,
        )
    return CacheChoice(
        name="torch",
        reason=f"plain torch on {place}: {lost or 'the only one for this device and dtype'}",
        store=plain.store,
        attend=plain.attend,
        rows_are_independent=False,
        is_makeshift=lost is not None,
    )


def _what_is_lost(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Say why a faster implementation that there is for the device does not run; None where there is none."""
    if dtype not in _FAST_TYPES:
        return None
    if device.type == "cpu":
        return "the compiled loops, which are faster, are not built"
    if device.type != "cuda":
        return None
    if head_dim > _WIDEST_HEAD:
        return f"the triton kernels, which are faster, take heads of up to {_WIDEST_HEAD} features"
    if find_spec("triton") is None:
        return "triton, whose kernels are faster, is not installed: `pip install optgptq[triton]`"
    return None
