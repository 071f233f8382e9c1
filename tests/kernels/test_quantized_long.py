"""A text of 131,072 tokens with nearly equal weights: sums of many small numbers lose nothing."""

from __future__ import annotations

import pytest
import torch

from optgptq.kernels import quantized_attention as plain
from optgptq.kernels.cache_choice import choose_cache_attention
from optgptq.kernels.paged_attention import PagedBatch, ScoreRule
from optgptq.kernels.quantized_attention import CacheBatch, CacheStorage
from optgptq.kv_cache.codec import SideCodec
from optgptq.kv_cache.page_layout import PageLayout
from optgptq.kv_cache.page_planes import SIDES, read_vectors, write_vectors
from optgptq.kv_cache.scheme import LayerScheme, SideScheme
from optgptq.kv_cache.setup import SideParameters

LENGTH, HEAD_DIM, PAGE = 131_072, 16, 16
SCHEME = LayerScheme(keys=SideScheme(bits=4, group_size=HEAD_DIM), values=SideScheme(bits=2, group_size=HEAD_DIM))
CPU = torch.device("cpu")


def numbers(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kernel", ["torch", "chosen"])
def test_flat_attention_over_a_long_text(kernel: str) -> None:
    layout = PageLayout(num_kv_heads=1, head_dim=HEAD_DIM, page_size=PAGE, scheme=SCHEME, exact_bytes=4)
    key_codec, value_codec = (SideCodec.of(side, SideParameters(), CPU) for side in (SCHEME.keys, SCHEME.values))
    pages_ZB = torch.zeros(LENGTH // PAGE + 1, layout.page_bytes, dtype=torch.uint8)
    slot_T = torch.arange(PAGE, PAGE + LENGTH - 1)
    for seed, (side, codec) in enumerate(zip(SIDES, (key_codec, value_codec), strict=True)):
        x_TKD = numbers(LENGTH - 1, 1, HEAD_DIM, seed=seed) * (0.05 if side == "keys" else 1.0)
        write_vectors(x_TKD, pages_ZB, slot_T, layout=layout, side=side, codec=codec)
    query_TND, key_TKD, value_TKD = (numbers(1, heads, HEAD_DIM, seed=2 + heads) for heads in (2, 1, 1))
    storage = CacheStorage(
        layout=layout,
        pages_ZB=pages_ZB,
        key_codec=key_codec,
        value_codec=value_codec,
        exact_keys_ZKDY=None,
        exact_values_ZKYD=None,
    )
    batch = CacheBatch(
        pages=PagedBatch(
            query_start_R1=torch.tensor([0, 1], dtype=torch.int32),
            context_R=torch.tensor([LENGTH], dtype=torch.int32),
            page_table_RP=torch.arange(1, LENGTH // PAGE + 1, dtype=torch.int32).unsqueeze(0),
            slot_T=torch.tensor([PAGE + LENGTH - 1]),
            max_query=1,
            max_context=LENGTH,
        ),
        exact=None,
        first_exact_T=torch.tensor([LENGTH - 1], dtype=torch.int32),
        num_sinks=0,
    )
    attend = (
        plain.attend if kernel == "torch" else choose_cache_attention(CPU, torch.float32, HEAD_DIM, [SCHEME]).attend
    )
    found_TND = attend(query_TND, key_TKD, value_TKD, storage, batch, ScoreRule(scale=HEAD_DIM**-0.5))
    keys, values = (
        torch.cat((read_vectors(pages_ZB, layout=layout, side=side, exact_dtype=torch.float32)[slot_T], own))[:, 0]
        for side, own in zip(SIDES, (key_TKD, value_TKD), strict=True)
    )
    weights = torch.softmax(query_TND[0].double() @ keys.double().T * HEAD_DIM**-0.5, dim=1)
    assert float(weights.max()) < 1e-3
    expected_ND = weights @ values.double()
    # Chains of 131,072 float32 sums of numbers around 1.
    torch.testing.assert_close(found_TND[0].double(), expected_ND, rtol=0, atol=5e-5)
