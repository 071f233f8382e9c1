"""Causal attention against a literal float64 loop."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optgptq.errors import ModelError
from optgptq.models.attention import alibi_bias, attention_context, causal_attention
from optgptq.models.registry import config_spec
from optgptq.models.spec import AlibiSpec, DecoderSpec

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 11,
    "hidden_size": 24,
    "intermediate_size": 10,
    "num_hidden_layers": 1,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
}
SLOPES = (0.5, 0.25, 0.3, 0.1, 0.05, 0.7)


def literal_attention(
    query_BNSD: torch.Tensor,
    key_BKTD: torch.Tensor,
    value_BKTD: torch.Tensor,
    *,
    spec: DecoderSpec,
) -> torch.Tensor:
    layer = spec.layers[0]
    output = torch.zeros_like(query_BNSD, dtype=torch.float64)
    batch, num_heads, num_queries, _ = query_BNSD.shape
    num_keys, group = key_BKTD.shape[2], num_heads // key_BKTD.shape[1]
    for b in range(batch):
        for n in range(num_heads):
            for s in range(num_queries):
                position = num_keys - num_queries + s
                first = 0 if layer.sliding_window is None else max(0, position - layer.sliding_window + 1)
                scores = []
                for t in range(first, position + 1):
                    score = float(query_BNSD[b, n, s].double() @ key_BKTD[b, n // group, t].double())
                    score *= layer.attention_scale
                    if spec.attention_softcap is not None:
                        score = spec.attention_softcap * math.tanh(score / spec.attention_softcap)
                    if spec.alibi is not None:
                        score += spec.alibi.slopes[n] * t * spec.alibi.scale
                    scores.append(score)
                weights = torch.softmax(torch.tensor(scores, dtype=torch.float64), dim=0)
                output[b, n, s] = weights @ value_BKTD[b, n // group, first : position + 1].double()
    return output


@settings(max_examples=40, deadline=None)
@given(
    num_queries=st.integers(1, 9),
    num_earlier=st.integers(0, 6),
    window=st.one_of(st.none(), st.integers(1, 12)),
    softcap=st.one_of(st.none(), st.floats(0.5, 20)),
    alibi=st.booleans(),
    num_kv_heads=st.sampled_from([1, 2, 3, 6]),
)
def test_causal_attention_equals_the_literal_loop(
    num_queries: int, num_earlier: int, window: int | None, softcap: float | None, alibi: bool, num_kv_heads: int
) -> None:
    spec = config_spec(CONFIG)
    spec = replace(
        spec,
        num_kv_heads=num_kv_heads,
        layers=(replace(spec.layers[0], sliding_window=window),),
        attention_softcap=softcap,
        alibi=AlibiSpec(slopes=SLOPES, scale=0.5) if alibi else None,
    )
    generator = torch.Generator().manual_seed(num_queries)
    num_keys = num_queries + num_earlier
    query = torch.randn(2, 6, num_queries, 4, generator=generator)
    key, value = torch.randn(2, 2, num_kv_heads, num_keys, 4, generator=generator)
    found = causal_attention(query, key, value, spec=spec, layer_index=0)
    expected = literal_attention(query, key, value, spec=spec)
    assert found.shape == (2, 6, num_queries, 4)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-6)


def test_query_chunks_join_to_the_same_result_as_one_mask() -> None:
    spec = config_spec({**CONFIG, "num_key_value_heads": 6})
    windowed = replace(spec, layers=(replace(spec.layers[0], sliding_window=100),))
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, 6, 530, 4, generator=generator)
    distance = torch.arange(530).unsqueeze(1) - torch.arange(530)
    mask = (distance >= 0) & (distance < 100)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    found = causal_attention(query, key, value, spec=windowed, layer_index=0)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_bfloat16_bias_is_rounded_before_it_is_scaled() -> None:
    bias = alibi_bias(AlibiSpec(slopes=(0.3,), scale=0.5, bfloat16_bias=True), torch.tensor([0, 1, 301]))
    slope = torch.tensor(0.3).bfloat16().float()
    position = torch.tensor(301.0).bfloat16().float()
    expected = torch.stack([torch.tensor(0.0), slope, (slope * position).bfloat16().float()]) * 0.5
    torch.testing.assert_close(bias, expected.unsqueeze(0), rtol=0, atol=0)
    plain = alibi_bias(AlibiSpec(slopes=(0.3,), scale=0.5), torch.tensor([301]))
    assert float(plain) != float(bias[0, 2])


def test_positions_beyond_the_position_table_are_refused() -> None:
    config = {"vocab_size": 11, "n_embd": 4, "n_layer": 1, "n_head": 1, "n_positions": 8}
    spec = config_spec({"architectures": ["GPT2LMHeadModel"], **config})
    assert attention_context(spec, 8).positions.shape == (8,)
    with pytest.raises(ModelError, match=r"transformer\.wpe: expected at most 8 positions.*found 9"):
        attention_context(spec, 9)
    with pytest.raises(ModelError, match="found 9"):
        attention_context(spec, 1, start=8)


def test_rope_tables_are_shared_by_layers_with_equal_parameters() -> None:
    spec = config_spec({**CONFIG, "num_hidden_layers": 5})
    context = attention_context(spec, 7, start=3)
    assert len(context.rope_tables) == 1
    (table,) = context.rope_tables.values()
    assert table.cosine.shape == (7, 1, 2)
    assert context.positions.tolist() == list(range(3, 10))
