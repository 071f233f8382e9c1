"""Which implementation of paged attention runs, decided once per model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from optgptq.kernels import paged_attention as plain
from optgptq.kernels.paged_attention import PagedBatch, ScoreRule
from optgptq.native import paged_attention as native

StoreTokens = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]
"""`key_TKD, value_TKD, keys_ZKDY, values_ZKYD, slot_T`."""
PagedAttention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, PagedBatch, ScoreRule], torch.Tensor]
"""`query_TND, keys_ZKDY, values_ZKYD, batch, rule`; gives `[T, N, D]`."""


# Wider heads were compiled too: programs that take all segments then keep registers in memory.
_WIDEST_HEAD = 256
_FAST_TYPES = (torch.float32, torch.bfloat16, torch.float16)


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
        is_makeshift: there is a faster one for the device, which cannot run here; worth a warning.
    """

    name: str
    reason: str
    store: StoreTokens
    attend: PagedAttention
    rows_are_independent: bool
    can_be_recorded: bool = False
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
        )
    has_triton = find_spec("triton") is not None
    if device.type == "cuda" and dtype in _FAST_TYPES and has_triton and head_dim <= _WIDEST_HEAD:
        from optgptq.kernels import triton_attention

        return AttentionChoice(
            name="triton",
            reason=f"one triton kernel for prompts and single tokens on {place}",
            store=triton_attention.store_tokens,
            attend=triton_attention.paged_attention,
            rows_are_independent=True,
            can_be_recorded=True,
        )
    lost = _what_is_lost(device, dtype, head_dim)
    return AttentionChoice(
        name="torch",
        reason=f"plain torch on {place}: {lost or 'the only one for this device and dtype'}",
        store=plain.store_tokens,
        attend=plain.paged_attention,
        rows_are_independent=False,
        is_makeshift=lost is not None,
    )


def _what_is_lost(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Say why a faster implementation that there is for the device does not run; None where there is none."""
    if dtype not in _FAST_TYPES:
        return None
    if device.type == "cpu":
        return "the compiled loops, which are faster, are not built"
    if device.type == "cuda" and head_dim > _WIDEST_HEAD:
        return f"the triton kernel, which is faster, takes heads of up to {_WIDEST_HEAD} features"
    if device.type == "cuda":
        return "triton, whose kernel is faster, is not installed: `pip install optgptq[triton]`"
    return None
