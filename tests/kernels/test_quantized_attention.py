"""Attention over a quantized cache in torch: against the dense formula in float64, and what may not matter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.kv_cache import EXACT, PASTS, CacheStep, CacheTexts, cache_texts, layer_schemes, random_parts
from support.paged import Part, dense_attention, paged_texts

from optgptq.kernels.paged_attention import ScoreRule
from optgptq.kernels.quantized_attention import attend, attend_literal, store
from optgptq.kv_cache.page_planes import SIDES, code_plane, parameter_plane, side_scheme
from optgptq.kv_cache.scheme import LayerScheme, PastRule

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
SCHEMES = layer_schemes(16)
LENGTHS = (1, 5, 15, 16, 17, 77, 130)
PARTS: list[Part] = [(0, 0, 1), (1, 4, 5), (2, 9, 15), (3, 15, 16), (4, 10, 17), (5, 76, 77), (6, 115, 130)]


def result(step: CacheStep, rule: ScoreRule) -> torch.Tensor:
    store(*step.arguments[1:])
    return attend(*step.arguments, rule)


def dense(texts: CacheTexts, parts: list[Part], rule: ScoreRule) -> torch.Tensor:
    return torch.cat([texts.dense(part, rule) for part in parts])


@pytest.mark.parametrize("past", PASTS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_and_mode_gives_the_dense_result(scheme: str, past: str) -> None:
    rule = RULES["plain"]
    texts = cache_texts(LENGTHS, SCHEMES[scheme], PASTS[past], seed=3)
    step = texts.step(PARTS)
    found, expected = result(step, rule), dense(texts, PARTS, rule)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("past", PASTS)
@pytest.mark.parametrize("scheme", ["halves", "keys only", "keys along tokens"])
def test_the_definition_is_the_dense_formula(scheme: str, past: str) -> None:
    parts: list[Part] = [(0, 0, 1), (1, 16, 17), (2, 30, 40)]
    for rule in (RULES["all"], RULES["rounded alibi"]):
        texts = cache_texts((1, 17, 40), SCHEMES[scheme], PASTS[past], window=rule.window)
        step = texts.step(parts)
        store(*step.arguments[1:])
        # Codes are decoded in float32.
        expected = dense(texts, parts, rule)
        torch.testing.assert_close(attend_literal(*step.arguments, rule), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("past", "page_size"), [("off", 16), ("token, sinks", 48), ("window", 32)])
@pytest.mark.parametrize("name", RULES)
def test_every_rule_gives_the_dense_result(name: str, past: str, page_size: int) -> None:
    rule = RULES[name]
    texts = cache_texts(LENGTHS, SCHEMES["halves"], PASTS[past], page_size=page_size, window=rule.window)
    step = texts.step(PARTS)
    torch.testing.assert_close(result(step, rule).double(), dense(texts, PARTS, rule), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(3, 3), (4, 2), (7, 1)])
def test_groups_and_dtypes(dtype: torch.dtype, num_heads: int, num_kv_heads: int) -> None:
    rule, parts = ScoreRule(scale=0.25), [(0, 20, 33), (1, 39, 40), (2, 8, 9)]
    for scheme in ("4 bits", "keys only", "values only"):
        texts = cache_texts(
            (33, 40, 9),
            SCHEMES[scheme],
            PASTS["chunk, sinks and recent"],
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            dtype=dtype,
        )
        found = result(texts.step(parts), rule)
        assert found.dtype == dtype
        tolerance = {torch.float64: 1e-6, torch.float32: 1e-5}.get(dtype, 2 * torch.finfo(dtype).eps)
        torch.testing.assert_close(found.double(), dense(texts, parts, rule), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("past", ["off", "chunk", "window and recent"])
def test_a_long_text_is_worked_on_in_pieces(past: str) -> None:
    texts = cache_texts(
        (1000,), layer_schemes(8)["4 bits"], PASTS[past], num_heads=2, num_kv_heads=1, head_dim=8, window=90
    )
    rule, parts = ScoreRule(scale=0.3, window=90), [(0, 830, 1000)]
    torch.testing.assert_close(
        result(texts.step(parts), rule).double(), dense(texts, parts, rule), rtol=1e-5, atol=2e-6
    )


def test_an_empty_step_gives_nothing() -> None:
    texts = cache_texts((4,), SCHEMES["keys along tokens"], PASTS["window"])
    step = texts.step([])
    assert result(step, ScoreRule(scale=1.0)).shape == (0, 4, 16)
    assert bool((step.storage.pages_ZB == texts.fill).all())


@pytest.mark.parametrize("past", ["token", "chunk", "window"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_first_token_of_a_text_gives_its_own_value(scheme: str, past: str) -> None:
    step = cache_texts((1,), SCHEMES[scheme], PASTS[past]).step([(0, 0, 1)])
    assert torch.equal(result(step, ScoreRule(scale=0.7)), step.value_TKD.repeat_interleave(2, 1))


def spoil(step: CacheStep, slot_T: torch.Tensor) -> CacheStep:
    """Return the step with other codes and parameters in these slots; groups along channels only."""
    spoiled = step.copy()
    layout, pages_ZB = spoiled.storage.layout, spoiled.storage.pages_ZB
    page_T, place_T = slot_T // layout.page_size, slot_T % layout.page_size
    for side in SIDES:
        code_plane(pages_ZB, layout, side)[page_T, :, place_T] ^= 0x5A
        if not side_scheme(layout, side).is_exact:
            parameter_plane(pages_ZB, layout, side)[page_T, :, place_T] = 7.0
    return spoiled


@pytest.mark.parametrize("past", ["token", "token, sinks", "chunk", "chunk, sinks and recent", "window and recent"])
@pytest.mark.parametrize("scheme", ["2 bits", "halves", "keys only"])
def test_codes_of_exact_tokens_do_not_matter_now_but_later(scheme: str, past: str) -> None:
    rule = ScoreRule(scale=0.3)
    texts = cache_texts((41, 70), SCHEMES[scheme], PASTS[past])
    parts = [(0, 39, 40), (1, 60, 61)]
    step = texts.step(parts)
    expected = result(step, rule)
    first_exact = step.batch.first_exact_T.tolist()
    exact_slots = [
        texts.tables[text][place // 16] * 16 + place % 16
        for (text, begin, _), first in zip(parts, first_exact, strict=True)
        for place in (*range(texts.past.sink_tokens), *range(first, begin + 1))
    ]
    spoiled = spoil(step, torch.tensor(exact_slots))
    assert torch.equal(attend(*spoiled.arguments, rule), expected)
    # The page is read as soon as the token is past, however long it stays exact; here all later modes read it.
    later = replace(step.batch, num_sinks=0, first_exact_T=step.batch.pages.context_R.clone())
    changed = attend(*spoiled.arguments[:-1], later, rule) - attend(*step.arguments[:-1], later, rule)
    assert bool((changed.abs().amax((1, 2)) > 1e-3).all())


def test_the_next_step_reads_what_this_one_stored() -> None:
    rule = ScoreRule(scale=0.3)
    texts = cache_texts((41,), SCHEMES["4 bits"], PASTS["token"])
    step = texts.step([(0, 39, 40)])
    result(step, rule)
    following = texts.step([(0, 40, 41)])
    for storage in (step.storage, spoil(step, step.batch.pages.slot_T).storage):
        after = replace(following, storage=storage)
        is_right = torch.allclose(result(after, rule).double(), texts.dense((0, 40, 41), rule), atol=1e-6)
        assert is_right == (storage is step.storage)


@pytest.mark.parametrize("fill", [0x00, 0x7C, 0xFF])
def test_what_lies_where_nothing_was_stored_does_not_matter(fill: int) -> None:
    for name in ("3 bits", "keys only", "keys along tokens"):
        for past in ("chunk", "window and recent"):
            rule, parts = RULES["window"], random_parts(LENGTHS, 5)
            texts = cache_texts(LENGTHS, SCHEMES[name], PASTS[past], window=rule.window, fill=fill)
            step, usual = texts.step(parts), replace(texts, fill=0x55).step(parts)
            assert torch.equal(result(step, rule), result(usual, rule))


def test_pages_beyond_two_gibibytes() -> None:
    rule, parts = ScoreRule(scale=0.3), [(0, 20, 90), (1, 30, 31)]
    texts = cache_texts((90, 31), SCHEMES["4 bits"], PASTS["chunk, sinks and recent"], page_size=32)
    step = texts.step(parts)
    num_pages, page_bytes = step.storage.pages_ZB.shape
    ahead = 2**31 // page_bytes + 1
    # Only the few pages that are touched become memory.
    pages_ZB = torch.empty(ahead + num_pages, page_bytes, dtype=torch.uint8)
    pages_ZB[ahead:] = step.storage.pages_ZB
    pages = step.batch.pages
    far = replace(
        step,
        storage=replace(step.copy().storage, pages_ZB=pages_ZB),
        batch=replace(
            step.batch,
            pages=replace(pages, page_table_RP=pages.page_table_RP + ahead, slot_T=pages.slot_T + ahead * 32),
        ),
    )
    assert torch.equal(result(far, rule), result(step, rule))
    assert torch.equal(pages_ZB[ahead:], step.storage.pages_ZB)


@pytest.mark.parametrize("past", PASTS)
def test_what_codes_hold_exactly_is_attended_as_without_codes(past: str) -> None:
    """Wherever the line between codes and exact keys runs, the parts make up the whole."""
    lengths, parts = (33, 130, 7), [(0, 32, 33), (1, 90, 130), (2, 0, 7)]
    paged = paged_texts(lengths, num_heads=4, num_kv_heads=2, head_dim=16, page_size=16, seed=7)
    texts = cache_texts(lengths, LayerScheme(keys=EXACT, values=EXACT), PASTS[past])
    texts = replace(texts, query_LND=paged.query_LND, key_LKD=paged.key_LKD, value_LKD=paged.value_LKD)
    for rule in (RULES["plain"], RULES["sinks"]):
        expected = torch.cat([dense_attention(paged, part, rule) for part in parts])
        torch.testing.assert_close(result(texts.step(parts), rule).double(), expected, rtol=1e-5, atol=2e-6)


@settings(max_examples=25, deadline=None)
@given(num_sinks=st.integers(0, 60), sources=st.lists(st.integers(0, 50), min_size=11, max_size=11), data=st.data())
def test_any_line_between_codes_and_exact_keys(num_sinks: int, sources: list[int], data: st.DataObject) -> None:
    """Each query with a line of its own, also lines that leave a part without any key."""
    window = data.draw(st.none() | st.integers(1, 60))
    texts = cache_texts((50, 9), LayerScheme(keys=EXACT, values=EXACT), PastRule(mode="window", window=64))
    parts: list[Part] = [(0, 40, 50), (1, 8, 9)]
    rule, step = ScoreRule(scale=0.4, window=window), texts.step(parts)
    for text, begin, _ in parts:
        texts.write_codes(step.storage.pages_ZB, text, 0, begin)
    positions = [place for _, begin, end in parts for place in range(begin, end)]
    lines = [min(line, place + 1) for line, place in zip(sources, positions, strict=True)]
    first_exact_T = torch.tensor(lines, dtype=torch.int32)
    batch = replace(step.batch, num_sinks=num_sinks, first_exact_T=first_exact_T)
    found = result(replace(step, batch=batch), rule)
    torch.testing.assert_close(found.double(), dense(texts, parts, rule), rtol=1e-5, atol=2e-6)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    scheme=st.sampled_from(sorted(SCHEMES)),
    past=st.builds(
        PastRule,
        mode=st.sampled_from(["off", "token", "chunk"]),
        sink_tokens=st.integers(0, 30),
        recent_tokens=st.integers(0, 40),
    )
    | st.builds(PastRule, mode=st.just("window"), window=st.integers(1, 50), sink_tokens=st.integers(0, 9)),
    window=st.none() | st.integers(1, 70),
    seed=st.integers(0, 1000),
)
def test_any_step_gives_the_dense_result(
    lengths: list[int], scheme: str, past: PastRule, window: int | None, seed: int
) -> None:
    texts = cache_texts(lengths, SCHEMES[scheme], past, window=window, seed=seed)
    parts, rule = random_parts(lengths, seed), ScoreRule(scale=0.5, window=window)
    torch.testing.assert_close(
        result(texts.step(parts), rule).double(), dense(texts, parts, rule), rtol=2e-5, atol=4e-6
    )
