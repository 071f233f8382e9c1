"""Calls of the compiled attention over a quantized cache; `optgptq.kernels.quantized_attention` has its twin in torch.

Shapes: `T` tokens of a step, `R` sequences, `N` query heads, `K` key/value heads, `D` head dimension, `Z` pages,
`B` bytes of a page of codes.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from optgptq.kv_cache.page_layout import CHANNEL_MULTIPLE, PAGE_MULTIPLE
from optgptq.kv_cache.scheme import EXACT_BITS
from optgptq.native.library import check_done, load_library
from optgptq.native.paged_attention import (
    TYPES,
    Pages,
    Rule,
    Sequences,
    float_rows,
    numbered_path,
    rule_fields,
    sequences_fields,
    store_tokens,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from optgptq.kernels.paged_attention import ScoreRule
    from optgptq.kernels.quantized_attention import CacheBatch, CacheStorage
    from optgptq.kv_cache.codec import SideCodec
    from optgptq.kv_cache.page_layout import PageLayout
    from optgptq.kv_cache.scheme import LayerScheme, SideScheme


class _Side(ctypes.Structure):
    """`CacheSide` of `source/cache_attention.hpp`, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("ranges", "metric", "feedback")),
        *((name, ctypes.c_int64) for name in ("num_ranges", "bits", "group_size", "along_tokens")),
        *((name, ctypes.c_int64) for name in ("row_bytes", "codes", "parameters")),
    )


class _CachePages(ctypes.Structure):
    """`CachePages`."""

    _fields_ = (
        ("bytes", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("page_bytes", "head_bytes", "type")),
        ("keys", _Side),
        ("values", _Side),
        ("exact", Pages),
        ("exact_table", ctypes.c_void_p),
        ("exact_stride", ctypes.c_int64),
    )


class _NewTokens(ctypes.Structure):
    """`NewTokens`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("key", "value")),
        *((name, ctypes.c_int64) for name in ("key_token_stride", "key_head_stride")),
        *((name, ctypes.c_int64) for name in ("value_token_stride", "value_head_stride")),
    )


class _AttendCall(ctypes.Structure):
    """`CacheCall`."""

    _fields_ = (
        ("pages", _CachePages),
        ("sequences", Sequences),
        ("rule", Rule),
        ("tokens", _NewTokens),
        *((name, ctypes.c_void_p) for name in ("query", "output", "first_exact")),
        *((name, ctypes.c_int64) for name in ("token_stride", "head_stride", "num_heads", "num_sinks")),
    )


class _StoreCall(ctypes.Structure):
    """`CacheStoreCall`."""

    _fields_ = (
        ("pages", _CachePages),
        ("sequences", Sequences),
        ("tokens", _NewTokens),
        ("slot", ctypes.c_void_p),
        ("num_tokens", ctypes.c_int64),
    )


def takes_cache(device: torch.device, dtype: torch.dtype, schemes: Sequence[LayerScheme]) -> bool:
    """Say whether the calls below take queries, keys and values of this dtype, stored by these schemes.

    They take every scheme that a page layout takes, on processors.
    """
    del schemes
    return device.type == "cpu" and dtype in TYPES and load_library() is not None


def store(
    key_TKD: torch.Tensor,
    value_TKD: torch.Tensor,
    storage: CacheStorage,
    batch: CacheBatch,
    *,
    path: str | None = None,
) -> None:
    """Write codes of the new tokens, and their numbers into exact pages. To be called before `attend`.

    `path` is an instruction set, None for the fastest.
    """
    if batch.exact is not None:
        assert storage.exact_keys_ZKDY is not None
        assert storage.exact_values_ZKYD is not None
        exact = (storage.exact_keys_ZKDY, storage.exact_values_ZKYD)
        store_tokens(key_TKD, value_TKD, *exact, batch.exact.slot_T, path=path)
    key, value = float_rows(key_TKD), float_rows(value_TKD)
    slot_T = batch.pages.slot_T
    assert slot_T.dtype == torch.int64 and slot_T.is_contiguous() and slot_T.shape == key.shape[:1]  # noqa: PT018
    pages = _pages(storage, batch, key_TKD.dtype)
    _add_codec(pages.keys, storage.key_codec)
    _add_codec(pages.values, storage.value_codec)
    call = _StoreCall(
        pages,
        sequences_fields(batch.pages),
        _tokens(key, value, storage.layout),
        slot_T.data_ptr(),
        key.shape[0],
    )
    library, number = numbered_path(path)
    check_done(library.shared.optgptq_store_codes(ctypes.byref(call), number, torch.get_num_threads()))


def attend(
    query_TND: torch.Tensor,
    key_TKD: torch.Tensor,
    value_TKD: torch.Tensor,
    storage: CacheStorage,
    batch: CacheBatch,
    rule: ScoreRule,
    *,
    path: str | None = None,
) -> torch.Tensor:
    """Return attention `[T, N, D]` in the dtype of the queries; computed in float32.

    A row has the same bits in any batch, on any number of threads, and however its sequence is cut into parts, as long
    as its `first_exact_T` is the same.
    """
    query, key, value = float_rows(query_TND), float_rows(key_TKD), float_rows(value_TKD)
    output = torch.empty(query.shape, dtype=torch.float32)
    num_heads, layout = query.shape[1], storage.layout
    assert num_heads % layout.num_kv_heads == 0
    assert query.shape[2] == layout.head_dim
    first_exact_T = batch.first_exact_T
    assert first_exact_T.dtype == torch.int32 and first_exact_T.is_contiguous()  # noqa: PT018
    assert first_exact_T.shape == query.shape[:1]
    call = _AttendCall(
        _pages(storage, batch, key_TKD.dtype),
        sequences_fields(batch.pages),
        rule_fields(rule, num_heads),
        _tokens(key, value, layout),
        query.data_ptr(),
        output.data_ptr(),
        first_exact_T.data_ptr(),
        *query.stride()[:2],
        num_heads,
        batch.num_sinks,
    )
    library, number = numbered_path(path)
    check_done(library.shared.optgptq_attend_codes(ctypes.byref(call), number, torch.get_num_threads()))
    return output if query_TND.dtype == torch.float32 else output.to(query_TND.dtype)


def _tokens(key: torch.Tensor, value: torch.Tensor, layout: PageLayout) -> _NewTokens:
    assert key.shape == value.shape == (key.shape[0], layout.num_kv_heads, layout.head_dim)
    return _NewTokens(key.data_ptr(), value.data_ptr(), *key.stride()[:2], *value.stride()[:2])


def _pages(storage: CacheStorage, batch: CacheBatch, dtype: torch.dtype) -> _CachePages:
    layout, pages_ZB = storage.layout, storage.pages_ZB
    page_bytes, head_bytes, keys, values = _places(layout)
    assert pages_ZB.dtype == torch.uint8 and pages_ZB.is_contiguous()  # noqa: PT018
    assert pages_ZB.shape[1] == page_bytes
    shape = (layout.num_kv_heads, layout.head_dim, layout.page_size)
    exact, table, stride = Pages(None, None, *shape, TYPES[dtype]), None, 0
    if batch.exact is not None:
        keys_ZKDY, values_ZKYD = storage.exact_keys_ZKDY, storage.exact_values_ZKYD
        assert keys_ZKDY is not None
        assert values_ZKYD is not None
        assert keys_ZKDY.dtype == values_ZKYD.dtype
        assert keys_ZKDY.shape[1:] == shape
        assert keys_ZKDY.is_contiguous() and values_ZKYD.is_contiguous()  # noqa: PT018
        exact = Pages(keys_ZKDY.data_ptr(), values_ZKYD.data_ptr(), *shape, TYPES[keys_ZKDY.dtype])
        table_RP = batch.exact.page_table_RP
        assert table_RP.dtype == torch.int32
        assert table_RP.stride(1) == 1 or table_RP.shape[1] <= 1
        table, stride = table_RP.data_ptr(), table_RP.stride(0)
    number_type = TYPES[dtype]
    return _CachePages(pages_ZB.data_ptr(), page_bytes, head_bytes, number_type, keys, values, exact, table, stride)


@lru_cache(maxsize=256)
def _places(layout: PageLayout) -> tuple[int, int, _Side, _Side]:
    """Return bytes of a page and of a head, and where keys and values lie, without what makes codes.

    Kept, since a step asks twice for each decoder layer: without it half of what a call costs in Python.
    """
    assert layout.page_size % PAGE_MULTIPLE == 0
    assert layout.head_dim % CHANNEL_MULTIPLE == 0
    keys = _side(layout.scheme.keys, layout.key_row_bytes, 0, layout.key_parameters)
    values = _side(layout.scheme.values, layout.value_row_bytes, layout.value_codes, layout.value_parameters)
    return layout.page_bytes, layout.head_bytes, keys, values


def _side(scheme: SideScheme, row_bytes: int, codes: int, parameters: int) -> _Side:
    along_tokens = scheme.axis == "token"
    places = (row_bytes, codes, parameters)
    return _Side(None, None, None, 0, scheme.bits, scheme.group_size, along_tokens, *places)


def _add_codec(side: _Side, codec: SideCodec | None) -> None:
    """Say in `side`, a copy, how codes are made."""
    if codec is None:
        assert side.bits == EXACT_BITS
        return
    assert (side.bits, side.group_size) == (codec.scheme.bits, codec.scheme.group_size)
    for name, numbers in (
        ("ranges", codec.ranges_C2),
        ("metric", codec.metric_KDD),
        ("feedback", codec.feedback_KDD),
    ):
        assert numbers is None or (numbers.dtype == torch.float32 and numbers.is_contiguous())
        setattr(side, name, None if numbers is None else numbers.data_ptr())
    side.num_ranges = codec.ranges_C2.shape[0]
