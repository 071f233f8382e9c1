"""Paged attention in torch against the dense formula in float64, and the records of a step."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.paged import Part, dense_attention, paged_texts

from optgptq.kernels.paged_attention import ScoreRule, paged_attention, paged_attention_literal, store_tokens

HEADS = 4
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])
RULES = {
    "plain": ScoreRule(scale=0.3),
    "window": ScoreRule(scale=0.3, window=21),
    "short window": ScoreRule(scale=0.3, window=3),
    "softcap": ScoreRule(scale=0.3, softcap=2.0),
    "alibi": ScoreRule(scale=0.3, slopes_N=SLOPES),
    "rounded alibi": ScoreRule(scale=0.3, slopes_N=SLOPES, alibi_scale=0.37, round_alibi=True),
    "sinks": ScoreRule(scale=0.3, sinks_N=torch.tensor([-1.0, 0.0, 2.0, 9.0])),
    "all": ScoreRule(
        scale=0.2, window=40, softcap=3.0, slopes_N=SLOPES, alibi_scale=0.7, sinks_N=torch.tensor([0.0, 1.0, 2.0, 3.0])
    ),
}
LENGTHS = (1, 5, 15, 16, 17, 77, 130)
PARTS: list[Part] = [(0, 0, 1), (1, 4, 5), (2, 0, 15), (3, 15, 16), (4, 10, 17), (5, 76, 77), (6, 1, 130)]


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("page_size", [8, 16, 32])
def test_every_rule_gives_the_dense_result(name: str, page_size: int) -> None:
    rule = RULES[name]
    texts = paged_texts(
        LENGTHS, num_heads=HEADS, num_kv_heads=2, head_dim=10, page_size=page_size, window=rule.window, seed=3
    )
    step = texts.step(PARTS)
    expected = torch.cat([dense_attention(texts, part, rule) for part in PARTS])
    found = paged_attention(*step.arguments, rule)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", RULES)
def test_the_definition_is_the_dense_formula(name: str) -> None:
    rule = RULES[name]
    texts = paged_texts((5, 17, 45), num_heads=HEADS, num_kv_heads=2, head_dim=8, page_size=8, window=rule.window)
    parts = [(0, 0, 5), (1, 16, 17), (2, 30, 45)]
    step = texts.step(parts)
    expected = torch.cat([dense_attention(texts, part, rule) for part in parts])
    torch.testing.assert_close(paged_attention_literal(*step.arguments, rule), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(3, 3), (4, 2), (8, 2), (7, 1)])
def test_groups_and_dtypes(dtype: torch.dtype, num_heads: int, num_kv_heads: int) -> None:
    texts = paged_texts(
        (33, 40, 9), num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=16, page_size=16, dtype=dtype
    )
    rule = ScoreRule(scale=0.25)
    step = texts.step([(0, 20, 33), (1, 39, 40), (2, 8, 9)]).to("cpu", dtype)
    found = paged_attention(*step.arguments, rule)
    assert found.dtype == dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 2 * torch.finfo(dtype).eps)
    expected = paged_attention_literal(*step.arguments, rule)
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


def test_a_long_part_is_worked_on_in_pieces() -> None:
    texts = paged_texts((300,), num_heads=2, num_kv_heads=1, head_dim=8, page_size=16, window=50)
    rule = ScoreRule(scale=0.3, window=50)
    step = texts.step([(0, 3, 300)])
    torch.testing.assert_close(
        paged_attention(*step.arguments, rule).double(), dense_attention(texts, (0, 3, 300), rule), rtol=1e-5, atol=1e-6
    )


def test_an_empty_step_gives_nothing() -> None:
    texts = paged_texts((4,), num_heads=2, num_kv_heads=1, head_dim=8, page_size=8)
    step = texts.step([])
    assert paged_attention(*step.arguments, ScoreRule(scale=1.0)).shape == (0, 2, 8)
    store_tokens(step.key_TKD, step.value_TKD, step.keys_ZKDY, step.values_ZKYD, step.batch.slot_T)
    assert bool(step.keys_ZKDY.isnan().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tokens_go_to_their_slots_and_nowhere_else(dtype: torch.dtype) -> None:
    texts = paged_texts((20, 9), num_heads=2, num_kv_heads=2, head_dim=8, page_size=8, dtype=dtype)
    whole = texts.step([(0, 0, 20), (1, 0, 9)])
    before = texts.step([(0, 0, 13), (1, 0, 8)])
    new = texts.step([(0, 13, 20), (1, 8, 9)])
    store_tokens(new.key_TKD, new.value_TKD, before.keys_ZKDY, before.values_ZKYD, new.batch.slot_T)
    assert torch.equal(before.keys_ZKDY.nan_to_num(9.0), whole.keys_ZKDY.nan_to_num(9.0))
    assert torch.equal(before.values_ZKYD.nan_to_num(9.0), whole.values_ZKYD.nan_to_num(9.0))


def test_what_lies_in_unused_entries_and_slots_does_not_matter() -> None:
    texts = paged_texts((30, 11), num_heads=2, num_kv_heads=1, head_dim=8, page_size=8)
    step, rule = texts.step([(0, 29, 30), (1, 10, 11)]), ScoreRule(scale=0.5)
    expected = paged_attention(*step.arguments, rule)
    table_RP = step.batch.page_table_RP.clone()
    table_RP[1, 2:] = 10_000
    step.keys_ZKDY.nan_to_num_(torch.inf)
    step.values_ZKYD.nan_to_num_(-torch.inf)
    batch = replace(step.batch, page_table_RP=table_RP)
    assert torch.equal(paged_attention(step.query_TND, step.keys_ZKDY, step.values_ZKYD, batch, rule), expected)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=5),
    window=st.none() | st.integers(1, 70),
    data=st.data(),
)
def test_any_cut_of_any_texts_gives_the_dense_result(
    lengths: list[int], window: int | None, data: st.DataObject
) -> None:
    texts = paged_texts(lengths, num_heads=4, num_kv_heads=2, head_dim=4, page_size=8, window=window)
    cuts = [data.draw(st.integers(0, length - 1)) for length in lengths]
    rule = ScoreRule(scale=0.5, window=window)
    parts = [(text, begin, end) for text, begin, end in zip(itertools.count(), cuts, lengths, strict=False)]
    expected = torch.cat([dense_attention(texts, part, rule) for part in parts])
    found = paged_attention(*texts.step(parts).arguments, rule)
    torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=2e-6)
