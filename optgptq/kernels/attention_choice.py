"""Which implementation of paged attention runs, decided once per model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from optgptq.kernels import paged_attention as plain
from optgptq.kernels.paged_attention import PagedBatch, ScoreRule
from optgptq.native import paged_attention as native

StoreTokens = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]
"""`key_TKD, value_TKD, keys_ZKDY, values_ZKYD, slot_T`."""
PagedAttention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, PagedBatch, ScoreRule], torch.Tensor]
"""`query_TND, keys_ZKDY, values_ZKYD, batch, rule`; gives `[T, N, D]`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionChoice:
    """An implementation and why it was taken.

    Attributes:
        name: which implementation.
        reason: one sentence for the log and for `optgptq doctor`.
        store: writes keys and values into pages.
        attend: reads them.
        is_makeshift: there is a faster one for the device, which cannot run here; worth a warning.
    """

    name: str
    reason: str
    store: StoreTokens
    attend: PagedAttention
    is_makeshift: bool = False


def choose_attention(device: torch.device, dtype: torch.dtype, head_dim: int) -> AttentionChoice:
    """Return what attends on `device` to pages of `dtype`; plain torch runs anywhere."""
    place = f"{device.type} in {str(dtype).removeprefix('torch.')}, head dimension {head_dim}"
    if native.takes_pages(device, dtype):
        return AttentionChoice(
            name="native",
            reason=f"compiled attention on {place}: each key and value is read once for all heads that share it",
            store=native.store_tokens,
            attend=native.paged_attention,
        )
    if device.type == "cpu" and dtype != torch.float64:
        lost = "the compiled loops, which are faster, are not built"
    else:
        lost = "the only one for this device and dtype"
    return AttentionChoice(
        name="torch",
        reason=f"plain torch on {place}: {lost}",
        store=plain.store_tokens,
        attend=plain.paged_attention,
        is_makeshift=device.type != "cpu" or dtype != torch.float64,
    )
