"""Calls of the compiled attention over pages; `optgptq.kernels.paged_attention` has its twin in torch.

Shapes: `T` tokens of a step, `R` sequences, `N` query heads, `K` key/value heads, `D` head dimension, `Z` pages,
`Y` slots of a page.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch

from optgptq.native.library import PATHS, Library, check_done, load_library

if TYPE_CHECKING:
    from optgptq.kernels.paged_attention import PagedBatch, ScoreRule

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Pages(ctypes.Structure):
    """`Pages` of `source/paged_attention.hpp`, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("keys", "values")),
        *((name, ctypes.c_int64) for name in ("num_kv_heads", "head_dim", "page_size", "type")),
    )


class Sequences(ctypes.Structure):
    """`PagedSequences`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query_start", "context", "page_table")),
        *((name, ctypes.c_int64) for name in ("table_stride", "num_sequences", "max_query")),
    )


class Rule(ctypes.Structure):
    """`ScoreRule`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("slopes", "sinks")),
        *((name, ctypes.c_int64) for name in ("window", "round_alibi")),
        *((name, ctypes.c_double) for name in ("scale", "softcap", "alibi_scale")),
    )


class _AttentionCall(ctypes.Structure):
    """`PagedCall`."""

    _fields_ = (
        ("pages", Pages),
        ("sequences", Sequences),
        ("rule", Rule),
        *((name, ctypes.c_void_p) for name in ("query", "output")),
        *((name, ctypes.c_int64) for name in ("token_stride", "head_stride", "num_heads")),
    )


class _StoreCall(ctypes.Structure):
    """`StoreCall`."""

    _fields_ = (
        ("pages", Pages),
        *((name, ctypes.c_void_p) for name in ("key", "value", "slot")),
        *((name, ctypes.c_int64) for name in ("key_token_stride", "key_head_stride")),
        *((name, ctypes.c_int64) for name in ("value_token_stride", "value_head_stride", "num_tokens")),
    )


def takes_pages(device: torch.device, dtype: torch.dtype) -> bool:
    """Say whether the calls below take queries, keys and values of this dtype."""
    return device.type == "cpu" and dtype in TYPES and load_library() is not None


def store_tokens(
    key_TKD: torch.Tensor,
    value_TKD: torch.Tensor,
    keys_ZKDY: torch.Tensor,
    values_ZKYD: torch.Tensor,
    slot_T: torch.Tensor,
    *,
    path: str | None = None,
) -> None:
    """Write keys and values of new tokens into their slots, rounded to the dtype of the pages.

    `path` is an instruction set, None for the fastest.
    """
    key_TKD, value_TKD = float_rows(key_TKD), float_rows(value_TKD)
    num_tokens = key_TKD.shape[0]
    assert key_TKD.shape == value_TKD.shape == (num_tokens, *keys_ZKDY.shape[1:3])
    assert slot_T.dtype == torch.int64 and slot_T.is_contiguous() and slot_T.shape == (num_tokens,)  # noqa: PT018
    call = _StoreCall(
        pages_fields(keys_ZKDY, values_ZKYD),
        key_TKD.data_ptr(),
        value_TKD.data_ptr(),
        slot_T.data_ptr(),
        *key_TKD.stride()[:2],
        *value_TKD.stride()[:2],
        num_tokens,
    )
    library, number = numbered_path(path)
    check_done(library.shared.optgptq_store_tokens(ctypes.byref(call), number, torch.get_num_threads()))


def paged_attention(
    query_TND: torch.Tensor,
    keys_ZKDY: torch.Tensor,
    values_ZKYD: torch.Tensor,
    batch: PagedBatch,
    rule: ScoreRule,
    *,
    path: str | None = None,
) -> torch.Tensor:
    """Return attention `[T, N, D]` in the dtype of the queries; computed in float32.

    A row has the same bits in any batch, however its sequence is cut into parts, on any number of threads.
    """
    query = float_rows(query_TND)
    output = torch.empty(query.shape, dtype=torch.float32)
    num_heads = query.shape[1]
    assert query.shape[2] == keys_ZKDY.shape[2]
    assert num_heads % keys_ZKDY.shape[1] == 0
    call = _AttentionCall(
        pages_fields(keys_ZKDY, values_ZKYD),
        sequences_fields(batch),
        rule_fields(rule, num_heads),
        query.data_ptr(),
        output.data_ptr(),
        *query.stride()[:2],
        num_heads,
    )
    library, number = numbered_path(path)
    check_done(library.shared.optgptq_paged_attention(ctypes.byref(call), number, torch.get_num_threads()))
    return output if query_TND.dtype == torch.float32 else output.to(query_TND.dtype)


def exponential(path: str, x: torch.Tensor) -> torch.Tensor:
    """Return `exp(x)` for float32 `x <= 0`, as attention computes it."""
    return _function(path, x, hyperbolic=False)


def hyperbolic_tangent(path: str, x: torch.Tensor) -> torch.Tensor:
    """Return `tanh(x)` of float32 `x`, as attention computes it."""
    return _function(path, x, hyperbolic=True)


def _function(path: str, x: torch.Tensor, *, hyperbolic: bool) -> torch.Tensor:
    library, number = numbered_path(path)
    x = x.float().contiguous()
    result = torch.empty_like(x)
    shared = library.shared
    check_done(shared.optgptq_attention_function(x.data_ptr(), result.data_ptr(), x.numel(), hyperbolic, number))
    return result


def float_rows(rows: torch.Tensor) -> torch.Tensor:
    """Return rows in float32, the numbers of a head side by side."""
    rows = rows if rows.dtype == torch.float32 else rows.float()
    return rows if rows.stride(2) == 1 else rows.contiguous()


def pages_fields(keys_ZKDY: torch.Tensor, values_ZKYD: torch.Tensor) -> Pages:
    """Return what the library is told of the pages of a layer; the tensors must outlive the call."""
    num_pages, num_kv_heads, head_dim, page_size = keys_ZKDY.shape
    assert values_ZKYD.shape == (num_pages, num_kv_heads, page_size, head_dim)
    assert keys_ZKDY.is_contiguous() and values_ZKYD.is_contiguous()  # noqa: PT018
    assert keys_ZKDY.dtype == values_ZKYD.dtype
    number_type = TYPES[keys_ZKDY.dtype]
    return Pages(keys_ZKDY.data_ptr(), values_ZKYD.data_ptr(), num_kv_heads, head_dim, page_size, number_type)


def sequences_fields(batch: PagedBatch) -> Sequences:
    """Return what the library is told of the sequences of a step; the batch must outlive the call."""
    starts, contexts, table = batch.query_start_R1, batch.context_R, batch.page_table_RP
    assert starts.dtype == contexts.dtype == table.dtype == torch.int32
    assert table.stride(1) == 1 or table.shape[1] <= 1
    num_sequences = contexts.shape[0]
    pointers = (starts.data_ptr(), contexts.data_ptr(), table.data_ptr())
    return Sequences(*pointers, table.stride(0), num_sequences, batch.max_query)


def rule_fields(rule: ScoreRule, num_heads: int) -> Rule:
    """Return what the library is told of a rule; the rule must outlive the call."""
    pointers = []
    for numbers_N in (rule.slopes_N, rule.sinks_N):
        assert numbers_N is None or (numbers_N.dtype == torch.float32 and numbers_N.shape == (num_heads,))
        assert numbers_N is None or numbers_N.is_contiguous()
        pointers.append(None if numbers_N is None else numbers_N.data_ptr())
    return Rule(*pointers, rule.window or 0, rule.round_alibi, rule.scale, rule.softcap or 0.0, rule.alibi_scale)


def numbered_path(path: str | None) -> tuple[Library, int]:
    """Return the library and the number of an instruction set, of the fastest for None."""
    library = load_library()
    assert library is not None
    return library, PATHS[path or library.paths[0]]
