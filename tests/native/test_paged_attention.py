"""The compiled attention over pages: against float64, and the same bits for every way to work on a text."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.native_paths import native_paths
from support.paged import PagedStep, PagedTexts, Part, dense_attention, paged_texts

from optgptq.kernels import paged_attention as plain
from optgptq.kernels.paged_attention import ScoreRule
from optgptq.native.library import load_library
from optgptq.native.paged_attention import exponential, hyperbolic_tangent, paged_attention, store_tokens

pytestmark = pytest.mark.skipif(load_library() is None, reason="the native library was not built")

LENGTHS = (1, 5, 15, 16, 17, 77, 130, 300)
PARTS: list[Part] = [
    (0, 0, 1),
    (1, 4, 5),
    (2, 0, 15),
    (3, 15, 16),
    (4, 10, 17),
    (5, 76, 77),
    (6, 1, 130),
    (7, 299, 300),
]
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])
SINKS = torch.tensor([-1.0, 0.0, 2.0, 30.0])
RULES = {
    "plain": ScoreRule(scale=0.3),
    "window": ScoreRule(scale=0.3, window=21),
    "wide window": ScoreRule(scale=0.3, window=100),
    "window of one": ScoreRule(scale=0.3, window=1),
    "softcap": ScoreRule(scale=0.3, softcap=2.0),
    "alibi": ScoreRule(scale=0.3, slopes_N=SLOPES),
    "rounded alibi": ScoreRule(scale=0.3, slopes_N=SLOPES, alibi_scale=0.37, round_alibi=True),
    "sinks": ScoreRule(scale=0.3, sinks_N=SINKS),
    "all": ScoreRule(scale=0.2, window=70, softcap=3.0, slopes_N=SLOPES, alibi_scale=0.7, sinks_N=SINKS),
}


def check(texts: PagedTexts, parts: list[Part], rule: ScoreRule, path: str) -> None:
    expected = torch.cat([dense_attention(texts, part, rule) for part in parts])
    found = paged_attention(*texts.step(parts).arguments, rule, path=path)
    torch.testing.assert_close(found.double(), expected, rtol=5e-6, atol=2e-6)


@pytest.mark.parametrize("path", native_paths())
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("page_size", [8, 16, 24, 32, 128])
def test_every_rule_gives_the_dense_result(path: str, name: str, page_size: int) -> None:
    rule = RULES[name]
    texts = paged_texts(
        LENGTHS, num_heads=4, num_kv_heads=2, head_dim=16, page_size=page_size, window=rule.window, seed=page_size
    )
    check(texts, PARTS, rule, path)


@pytest.mark.parametrize("path", native_paths())
@pytest.mark.parametrize("head_dim", [1, 8, 10, 16, 23, 32, 64, 80, 128, 256, 257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_head_dimension_and_dtype(path: str, head_dim: int, dtype: torch.dtype) -> None:
    texts = paged_texts((77, 18), num_heads=7, num_kv_heads=1, head_dim=head_dim, page_size=16, dtype=dtype)
    check(texts, [(0, 70, 77), (1, 17, 18)], ScoreRule(scale=head_dim**-0.5), path)


@pytest.mark.parametrize("path", native_paths())
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(3, 3), (6, 3), (8, 2), (7, 1), (40, 1)])
def test_every_group(path: str, num_heads: int, num_kv_heads: int) -> None:
    texts = paged_texts(
        (90, 40, 41), num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=24, page_size=16, dtype=torch.bfloat16
    )
    check(texts, [(0, 30, 90), (1, 39, 40), (2, 36, 41)], ScoreRule(scale=0.2), path)


@pytest.mark.parametrize("path", native_paths())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_of_other_dtypes_and_strides(path: str, dtype: torch.dtype) -> None:
    texts = paged_texts((33, 20), num_heads=4, num_kv_heads=2, head_dim=16, page_size=8, dtype=dtype)
    step, rule = texts.step([(0, 20, 33), (1, 19, 20)]), ScoreRule(scale=0.3)
    expected = paged_attention(*step.arguments, rule, path=path)
    wide = torch.zeros(14, 9, 16)
    wide[:, 2:6] = step.query_TND
    assert torch.equal(paged_attention(wide[:, 2:6], *step.arguments[1:], rule, path=path), expected)
    turned = step.query_TND.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(paged_attention(turned, *step.arguments[1:], rule, path=path), expected)
    narrow = step.to("cpu", dtype)
    found = paged_attention(*narrow.arguments, rule, path=path)
    assert found.dtype == dtype
    assert torch.equal(
        found, paged_attention(narrow.query_TND.float(), *narrow.arguments[1:], rule, path=path).to(dtype)
    )


@pytest.mark.parametrize("path", native_paths())
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_row_has_the_same_bits_however_it_is_reached(path: str, data: st.DataObject) -> None:
    """Texts in one part each, against random cuts, in random company, on one thread or three."""
    lengths = data.draw(st.lists(st.integers(1, 150), min_size=1, max_size=4), label="lengths")
    window = data.draw(st.none() | st.integers(1, 140), label="window")
    group = data.draw(st.sampled_from([1, 2, 3, 4, 7]), label="group")
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), label="dtype")
    head_dim = data.draw(st.sampled_from([8, 10, 16, 40, 64]), label="head_dim")
    texts = paged_texts(
        lengths, num_heads=2 * group, num_kv_heads=2, head_dim=head_dim, page_size=16, dtype=dtype, window=window
    )
    slopes_N = torch.linspace(0.5, 0.01, 2 * group)
    rule = ScoreRule(
        scale=0.3, window=window, **data.draw(st.sampled_from([{}, {"slopes_N": slopes_N}, {"softcap": 5}]))
    )
    whole = [
        paged_attention(*texts.step([(text, 0, end)]).arguments, rule, path=path) for text, end in enumerate(lengths)
    ]
    rounds: list[list[Part]] = [[], [], []]
    for text, end in enumerate(lengths):
        cuts = sorted({0, end, *data.draw(st.lists(st.integers(0, end), max_size=2), label="cuts")})
        for number, (begin, stop) in enumerate(itertools.pairwise(cuts)):
            rounds[number].append((text, begin, stop))
    for parts in rounds:
        parts = data.draw(st.permutations(parts))
        found = _on_three_threads(texts.step(parts), rule, path)
        expected = torch.cat([whole[0][:0], *(whole[text][begin:end] for text, begin, end in parts)])
        assert torch.equal(found, expected)


def _on_three_threads(step: PagedStep, rule: ScoreRule, path: str) -> torch.Tensor:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        return paged_attention(*step.arguments, rule, path=path)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("path", native_paths())
def test_threads_change_no_bit(path: str) -> None:
    """Enough work that threads are taken."""
    texts = paged_texts((300, 290), num_heads=8, num_kv_heads=2, head_dim=64, page_size=32, dtype=torch.bfloat16)
    step, rule = texts.step([(0, 0, 300), (1, 200, 290)]), ScoreRule(scale=0.1)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = paged_attention(*step.arguments, rule, path=path)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(_on_three_threads(step, rule, path), alone)


@pytest.mark.parametrize("path", native_paths())
def test_what_a_row_does_not_see_does_not_reach_it(path: str) -> None:
    """Not even where it is infinite or no number: later keys of its own part, unused slots, the page of nothing."""
    texts = paged_texts((70,), num_heads=4, num_kv_heads=2, head_dim=16, page_size=16, window=40)
    rule = ScoreRule(scale=0.3, window=40)
    expected = paged_attention(*texts.step([(0, 30, 70)]).arguments, rule, path=path)
    texts.key_LKD[0][66:] = torch.nan
    texts.value_LKD[0][66:] = torch.inf
    texts.value_LKD[0][5] = torch.nan
    found = paged_attention(*texts.step([(0, 30, 70)]).arguments, rule, path=path)
    # Position 30 + 15 is the first whose window begins behind position 5.
    assert torch.equal(found[15:36], expected[15:36])
    assert bool(found[:15].isnan().all())
    assert bool(found[36:].isnan().all())


@pytest.mark.parametrize("path", native_paths())
def test_entries_of_tables_beyond_the_text_are_not_read(path: str) -> None:
    texts = paged_texts((30, 11), num_heads=2, num_kv_heads=1, head_dim=8, page_size=8, window=9)
    step, rule = texts.step([(0, 29, 30), (1, 10, 11)]), ScoreRule(scale=0.5, window=9)
    expected = paged_attention(*step.arguments, rule, path=path)
    table_RP = step.batch.page_table_RP.clone()
    table_RP[table_RP == 0] = 2**30
    batch = replace(step.batch, page_table_RP=table_RP)
    assert torch.equal(paged_attention(*step.arguments[:3], batch, rule, path=path), expected)


@pytest.mark.parametrize("path", native_paths())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("page_size", [8, 16])
def test_tokens_are_stored_as_torch_stores_them(path: str, dtype: torch.dtype, page_size: int) -> None:
    texts = paged_texts((20, 9), num_heads=2, num_kv_heads=3, head_dim=21, page_size=page_size, dtype=dtype)
    step = texts.step([(0, 3, 20), (1, 8, 9)])
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(18, 3, 50, generator=generator)
    # Subnormal numbers, ties, overflow, and what is not finite.
    rows[0, 0, :10] = torch.tensor([1e-7, 6e-8, -3e-5, 65519.0, 65520.0, -1e30, torch.inf, torch.nan, 0.0, 1.00390625])
    rows[1] *= 2.0**-15
    key_TKD, value_TKD = rows[:, :, :21], rows[:, :, 29:]
    expected = [torch.full_like(step.keys_ZKDY, 7.0), torch.full_like(step.values_ZKYD, 7.0)]
    found = [pages.clone() for pages in expected]
    plain.store_tokens(key_TKD, value_TKD, *expected, step.batch.slot_T)
    store_tokens(key_TKD, value_TKD, *found, step.batch.slot_T, path=path)
    for pages, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(pages, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("path", native_paths())
def test_empty_steps(path: str) -> None:
    texts = paged_texts((4,), num_heads=2, num_kv_heads=1, head_dim=8, page_size=8)
    step = texts.step([])
    assert paged_attention(*step.arguments, ScoreRule(scale=1.0), path=path).shape == (0, 2, 8)
    store_tokens(step.key_TKD, step.value_TKD, step.keys_ZKDY, step.values_ZKYD, step.batch.slot_T, path=path)
    assert bool(step.keys_ZKDY.isnan().all())


@pytest.mark.parametrize("path", native_paths())
def test_the_exponential_is_exact_enough(path: str) -> None:
    x = torch.cat([torch.linspace(-87.0, 0.0, 400_001), -torch.logspace(-30, 1.9, 50_000)])
    exact = x.double().exp()
    assert float(((exponential(path, x).double() - exact) / exact).abs().max()) <= 2e-7
    edges = torch.tensor([0.0, -0.0, -88.0, -1e30, -torch.inf, torch.nan])
    expected = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0, torch.nan])
    torch.testing.assert_close(exponential(path, edges), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("path", native_paths())
def test_the_hyperbolic_tangent_is_exact_enough(path: str) -> None:
    x = torch.cat([torch.linspace(-12.0, 12.0, 400_001), torch.logspace(-30, 30, 50_000)])
    exact = x.double().tanh()
    error = (hyperbolic_tangent(path, x).double() - exact).abs() / exact.abs().clamp_min(1e-40)
    assert float(error[x != 0].max()) <= 3e-7
    edges = torch.tensor([0.0, torch.inf, -torch.inf, torch.nan])
    expected = torch.tensor([0.0, 1.0, -1.0, torch.nan])
    torch.testing.assert_close(hyperbolic_tangent(path, edges), expected, rtol=0, atol=0, equal_nan=True)
