"""Which implementation of paged attention runs, decided once per model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from optgptq.kernels import paged_attention as plain
from optgptq.kernels.fast_attention import takes_triton, what_is_lost
from optgptq.kernels.paged_attention import PagedBatch, ScoreRule
from optgptq.native import paged_attention as native
from optgptq.native.joint_attention import JointAttention, JointStep

__all__ = ["AttentionChoice", "JointAttention", "JointStep", "PagedAttention", "StoreTokens", "choose_attention"]

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
        rows_are_independent: a token's result has the same bits in every step, whatever else is in it.
        can_be_recorded: nothing is read back from the device, so a graph can hold it.
        joint: attends from a joint projection on, in one call; None where nothing does.
        is_makeshift: there is a faster one for the device, which cannot run here; worth a warning.
    """

    name: str
    reason: str
    store: StoreTokens
    attend: PagedAttention
    rows_are_independent: bool
    can_be_recorded: bool = False
    joint: type[JointAttention] | None = None
    is_makeshift: bool = False


def choose_attention(device: torch.device, dtype: torch.dtype, head_dim: int) -> AttentionChoice:
    """Return what attends on `device` to pages of `dtype`; plain torch runs anywhere.

    That of triton runs on CUDA and HIP devices, which torch both calls `cuda`; triton is imported here, if at all.
    """
    place = f"{device.type} in {str(dtype).removeprefix('torch.')}, head dimension {head_dim}"
    if native.takes_pages(device, dtype):
        return AttentionChoice(
            name="native",
            reason=f"compiled attention on {place}: each key and value is read once for all heads that share it",
            store=native.store_tokens,
            attend=native.paged_attention,
            rows_are_independent=True,
            joint=JointAttention,
        )
    if takes_triton(device, dtype, head_dim):
        from optgptq.kernels import triton_attention

        return AttentionChoice(
            name="triton",
            reason=f"one triton kernel for prompts and single tokens on {place}",
            store=triton_attention.store_tokens,
            attend=triton_attention.paged_attention,
            rows_are_independent=True,
            can_be_recorded=True,
        )
    lost = what_is_lost(device, dtype, head_dim)
    return AttentionChoice(
        name="torch",
        reason=f"plain torch on {place}: {lost or 'the only one for this device and dtype'}",
        store=plain.store_tokens,
        attend=plain.paged_attention,
        rows_are_independent=False,
        is_makeshift=lost is not None,
    )
