"""Causal attention over whole sequences of bfloat16 numbers by the processor's own instruction.

Shapes: `B` sequences, `S` positions, `Q` positions whose queries count, `N` query heads, `K` key/value heads, `D` head
dimension, `E` features of a value.
"""

from __future__ import annotations

import ctypes

import torch

from optgptq.native.library import PAIR_WAYS, PairWay, check_done, load_library

# Features of one vector of sums.
_FEATURES = 16


class _HeadNumbers(ctypes.Structure):
    """`HeadNumbers` of `source/causal_attention.hpp`, field by field."""

    _fields_ = (
        ("numbers", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("sequence_stride", "head_stride", "token_stride")),
    )


class _CausalCall(ctypes.Structure):
    """`CausalCall`."""

    _fields_ = (
        *((name, _HeadNumbers) for name in ("query", "key", "value")),
        *((name, ctypes.c_void_p) for name in ("positions", "output")),
        *((name, ctypes.c_int64) for name in ("num_sequences", "num_heads", "num_kv_heads", "num_tokens")),
        *((name, ctypes.c_int64) for name in ("num_queries", "head_dim", "value_dim")),
        ("scale", ctypes.c_double),
    )


def attends_causally(
    query_BNSD: torch.Tensor, key_BKSD: torch.Tensor, value_BKSE: torch.Tensor, *, scale: float
) -> bool:
    """Say whether `causal_attention` takes these: bfloat16 on a processor with the instruction, no gradient."""
    tensors = (query_BNSD, key_BKSD, value_BKSE)
    batch, num_heads, num_tokens, head_dim = query_BNSD.shape
    fits = (
        key_BKSD.shape == (batch, key_BKSD.shape[1], num_tokens, head_dim)
        and value_BKSE.shape[:3] == key_BKSD.shape[:3]
        and num_heads % key_BKSD.shape[1] == 0
        and head_dim % _FEATURES == value_BKSE.shape[3] % _FEATURES == 0
        and query_BNSD.numel() > 0
        and scale > 0
    )
    on_processor = all(
        tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu" and tensor.stride(3) == 1 for tensor in tensors
    )
    if not fits or not on_processor:
        return False
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return False
    library = load_library()
    return library is not None and library.bfloat16_products


def causal_attention(
    query_BNSD: torch.Tensor,
    key_BKSD: torch.Tensor,
    value_BKSE: torch.Tensor,
    *,
    scale: float,
    positions_BQ: torch.Tensor | None = None,
    way: PairWay = "faster",
) -> torch.Tensor:
    """Return attention `[B, N, Q, E]` where each position sees itself and those before it.

    Scores, softmax and sums are float32; weights are rounded to bfloat16 before they meet the values. In memory heads
    of a position follow each other. The same bits for any number of threads and of sequences, and in both ways.

    Args:
        query_BNSD: queries of all positions, as `attends_causally` takes them.
        key_BKSD: keys.
        value_BKSE: values, of any number of features that is a multiple of 16.
        scale: of the scores, above zero.
        positions_BQ: int64, ascending in each sequence: only these have outputs; None: all.
        way: how products of pairs are added, the faster one by default.
    """
    library = load_library()
    assert library is not None
    batch, num_heads, num_tokens, head_dim = query_BNSD.shape
    num_queries, value_dim = num_tokens if positions_BQ is None else positions_BQ.shape[1], value_BKSE.shape[3]
    positions_BQ = None if positions_BQ is None else positions_BQ.contiguous()
    output_BQNE = torch.empty(batch, num_queries, num_heads, value_dim, dtype=torch.bfloat16)
    call = _CausalCall(
        *(_HeadNumbers(heads.data_ptr(), *heads.stride()[:3]) for heads in (query_BNSD, key_BKSD, value_BKSE)),
        None if positions_BQ is None else positions_BQ.data_ptr(),
        output_BQNE.data_ptr(),
        batch,
        num_heads,
        key_BKSD.shape[1],
        num_tokens,
        num_queries,
        head_dim,
        value_dim,
        scale,
    )
    status = library.shared.optgptq_causal_attention(ctypes.byref(call), PAIR_WAYS[way], torch.get_num_threads())
    check_done(status)
    return output_BQNE.transpose(1, 2)
