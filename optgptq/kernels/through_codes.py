"""Vectors through their codes and back, by the compiled loops where they run: what calibration asks thousands of times.

Shapes: `T` tokens, `K` key/value heads, `D` head dimension.
"""

from __future__ import annotations

import torch

from optgptq.kernels.paged_attention import PagedBatch
from optgptq.kernels.quantized_attention import CacheBatch, CacheStorage
from optgptq.kv_cache.codec import SideCodec, decode, encode
from optgptq.kv_cache.page_layout import CHANNEL_MULTIPLE, PAGE_MULTIPLE, PageLayout
from optgptq.kv_cache.page_planes import read_vectors
from optgptq.kv_cache.scheme import LayerScheme
from optgptq.native import quantized_attention as native


def through_codes(x_TKD: torch.Tensor, codec: SideCodec) -> torch.Tensor:
    """Return what the codes of float32 vectors stand for, float32.

    The same as `decode(encode(x, codec), codec.scheme)`, but for fitted codes that are equally good up to rounding.
    """
    layer = LayerScheme(keys=codec.scheme, values=codec.scheme)
    compiled = native.takes_cache(x_TKD.device, torch.float32, [layer]) and x_TKD.shape[2] % CHANNEL_MULTIPLE == 0
    if not compiled or codec.scheme.axis == "token" or len(x_TKD) < 2:
        return decode(encode(x_TKD, codec), codec.scheme)
    # Two halves, one as keys and one as values: nothing is stored twice.
    half = -(-len(x_TKD) // 2)
    key_TKD = x_TKD[:half].contiguous()
    value_TKD = torch.zeros_like(key_TKD)
    value_TKD[: len(x_TKD) - half] = x_TKD[half:]
    layout = PageLayout(
        num_kv_heads=x_TKD.shape[1], head_dim=x_TKD.shape[2], page_size=PAGE_MULTIPLE, scheme=layer, exact_bytes=4
    )
    num_pages = -(-half // PAGE_MULTIPLE)
    # What is decoded beyond the last token must be numbers.
    pages_ZB = torch.zeros(num_pages, layout.page_bytes, dtype=torch.uint8)
    storage = CacheStorage(
        layout=layout,
        pages_ZB=pages_ZB,
        key_codec=codec,
        value_codec=codec,
        exact_keys_ZKDY=None,
        exact_values_ZKYD=None,
    )
    native.store(key_TKD, value_TKD, storage, _one_text(half, num_pages))
    keys_TKD, values_TKD = (
        read_vectors(pages_ZB, layout=layout, side=side, exact_dtype=torch.float32) for side in ("keys", "values")
    )
    return torch.cat((keys_TKD[:half], values_TKD[: len(x_TKD) - half]))


def _one_text(num_tokens: int, num_pages: int) -> CacheBatch:
    """Return a step in which one text has all pages."""
    return CacheBatch(
        pages=PagedBatch(
            query_start_R1=torch.tensor([0, num_tokens], dtype=torch.int32),
            context_R=torch.tensor([num_tokens], dtype=torch.int32),
            page_table_RP=torch.arange(num_pages, dtype=torch.int32).unsqueeze(0),
            slot_T=torch.arange(num_tokens),
            max_query=num_tokens,
            max_context=num_tokens,
        ),
        exact=None,
        first_exact_T=torch.arange(num_tokens, dtype=torch.int32),
        num_sinks=0,
    )
