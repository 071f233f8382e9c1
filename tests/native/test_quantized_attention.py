"""The compiled attention over a quantized cache: against float64, and the same bits for every way to work on a text."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.kv_cache import PASTS, CacheStep, CacheTexts, cache_texts, layer_schemes
from support.native_paths import native_paths
from support.paged import PagedTexts, Part, dense_attention

from optgptq.kernels import quantized_attention as plain
from optgptq.kernels.paged_attention import ScoreRule
from optgptq.kv_cache.scheme import LayerScheme, SideScheme
from optgptq.native.library import load_library
from optgptq.native.quantized_attention import attend, store, takes_cache

pytestmark = pytest.mark.skipif(load_library() is None, reason="the native library was not built")

SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])
RULES = {
    "plain": ScoreRule(scale=0.3),
    "window": ScoreRule(scale=0.3, window=21),
    "wide window": ScoreRule(scale=0.3, window=100),
    "window of one": ScoreRule(scale=0.3, window=1),
    "softcap": ScoreRule(scale=0.3, softcap=2.0),
    "alibi": ScoreRule(scale=0.3, slopes_N=SLOPES),
    "rounded alibi": ScoreRule(scale=0.3, slopes_N=SLOPES, alibi_scale=0.37, round_alibi=True),
    "sinks": ScoreRule(scale=0.3, sinks_N=torch.tensor([-1.0, 0.0, 2.0, 30.0])),
    "all": ScoreRule(
        scale=0.2, window=70, softcap=3.0, slopes_N=SLOPES, alibi_scale=0.7, sinks_N=torch.tensor([0.0, 1.0, 2.0, 3.0])
    ),
}
SCHEMES = layer_schemes(16)
LENGTHS = (1, 5, 15, 16, 17, 77, 130)
PARTS: list[Part] = [(0, 0, 1), (1, 4, 5), (2, 9, 15), (3, 15, 16), (4, 10, 17), (5, 76, 77), (6, 90, 130)]
HEALTH = [HealthCheck.function_scoped_fixture]


def result(step: CacheStep, rule: ScoreRule, path: str) -> torch.Tensor:
    store(*step.arguments[1:], path=path)
    return attend(*step.arguments, rule, path=path)


def expected_of(step: CacheStep, rule: ScoreRule) -> torch.Tensor:
    """Return what torch makes of the step in float64, from bytes that torch has written."""
    own = step.copy()
    plain.store(*own.arguments[1:])
    query_TND, *others = own.arguments
    return plain.attend(query_TND.double(), *others, rule)


@cache
def case(scheme: str, past: str, rule: str = "plain", page_size: int = 16) -> tuple[CacheStep, torch.Tensor]:
    """Return a mixed step and its result; made once for all instruction sets."""
    window = RULES[rule].window
    step = cache_texts(LENGTHS, SCHEMES[scheme], PASTS[past], page_size=page_size, window=window, seed=3).step(PARTS)
    return step, expected_of(step, RULES[rule])


@pytest.mark.parametrize("path", native_paths())
@pytest.mark.parametrize("past", PASTS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_and_mode_gives_the_dense_result(path: str, scheme: str, past: str) -> None:
    step, expected = case(scheme, past)
    found = result(step.copy(), RULES["plain"], path)
    torch.testing.assert_close(found.double(), expected, rtol=5e-6, atol=4e-6)


@pytest.mark.parametrize("path", native_paths())
@pytest.mark.parametrize(("past", "page_size"), [("off", 16), ("token, sinks", 48), ("window", 32), ("chunk", 128)])
@pytest.mark.parametrize("name", RULES)
def test_every_rule_gives_the_dense_result(path: str, name: str, past: str, page_size: int) -> None:
    step, expected = case("4 bits", past, name, page_size)
    found = result(step.copy(), RULES[name], path)
    torch.testing.assert_close(found.double(), expected, rtol=5e-6, atol=4e-6)


@pytest.mark.parametrize("path", native_paths())
@pytest.mark.parametrize("head_dim", [8, 24, 32, 64, 80, 128, 256])
def test_every_head_dimension_and_number_of_rows(path: str, head_dim: int) -> None:
    """One row alone, a few, and so many that codes become floats first; packing splits channels differently."""
    side = {bits: SideScheme(bits=bits, group_size=head_dim) for bits in (2, 3, 4, 8)}
    rule, parts = ScoreRule(scale=head_dim**-0.5), [(0, 76, 77), (1, 24, 26), (2, 31, 40)]
    for keys, values in ((2, 4), (3, 8), (4, 2), (8, 3)):
        scheme = LayerScheme(keys=side[keys], values=side[values])
        texts = cache_texts(
            (77, 26, 40), scheme, PASTS["token"], num_heads=3, num_kv_heads=1, head_dim=head_dim, seed=keys
        )
        step = texts.step(parts)
        expected = expected_of(step, rule)
        torch.testing.assert_close(result(step, rule, path).double(), expected, rtol=5e-6, atol=4e-6)


@pytest.mark.parametrize("path", native_paths())
@pytest.mark.parametrize("group_size", [4, 8, 16, 48])
def test_groups_along_tokens_of_every_length(path: str, group_size: int) -> None:
    side = SideScheme(bits=4, group_size=group_size, axis="token")
    whole = SideScheme(bits=4, group_size=24)
    for scheme in (LayerScheme(keys=side, values=side), LayerScheme(keys=whole, values=side)):
        texts = cache_texts((130, 60, 70), scheme, PASTS["chunk, sinks and recent"], page_size=48, head_dim=24)
        step, rule = texts.step([(0, 129, 130), (1, 20, 60), (2, 69, 70)]), ScoreRule(scale=0.3)
        expected = expected_of(step, rule)
        torch.testing.assert_close(result(step, rule, path).double(), expected, rtol=5e-6, atol=4e-6)


@pytest.mark.parametrize("path", native_paths())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(3, 3), (8, 2), (7, 1), (40, 1)])
def test_groups_of_heads_and_dtypes(path: str, dtype: torch.dtype, num_heads: int, num_kv_heads: int) -> None:
    rule, parts = ScoreRule(scale=0.25), [(0, 20, 33), (1, 39, 40), (2, 6, 9)]
    for scheme in ("4 bits", "keys only", "values only"):
        texts = cache_texts(
            (33, 40, 9),
            layer_schemes(40)[scheme],
            PASTS["chunk, sinks and recent"],
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=40,
            dtype=dtype,
        )
        step = texts.step(parts)
        expected = expected_of(step, rule)
        found = result(step, rule, path)
        assert found.dtype == dtype
        tolerance = 5e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("path", native_paths())
def test_rows_of_other_strides(path: str) -> None:
    texts = cache_texts((33, 20), SCHEMES["4 bits"], PASTS["window and recent"])
    step, rule = texts.step([(0, 20, 33), (1, 19, 20)]), ScoreRule(scale=0.3)
    expected = result(step.copy(), rule, path)
    turned = replace(
        step,
        query_TND=step.query_TND.transpose(1, 2).contiguous().transpose(1, 2),
        key_TKD=torch.cat([step.key_TKD, step.key_TKD], 1)[:, 2:],
        value_TKD=step.value_TKD.transpose(0, 1).contiguous().transpose(0, 1),
    )
    assert torch.equal(result(turned, rule, path), expected)


@pytest.mark.parametrize("path", native_paths())
@settings(max_examples=25, deadline=None, suppress_health_check=HEALTH)
@given(data=st.data())
def test_a_row_has_the_same_bits_however_it_is_reached(path: str, data: st.DataObject) -> None:
    """Texts in one part each, against random parts of them, in random company, on one thread or three."""
    lengths = data.draw(st.lists(st.integers(1, 150), min_size=1, max_size=4), label="lengths")
    head_dim = data.draw(st.sampled_from([8, 16, 40, 64]), label="head_dim")
    scheme = layer_schemes(head_dim)[data.draw(st.sampled_from(sorted(SCHEMES)), label="scheme")]
    past = PASTS[data.draw(st.sampled_from(["off", "token", "token, sinks", "window", "window and recent"]))]
    window = data.draw(st.none() | st.integers(1, 140), label="window")
    group = data.draw(st.sampled_from([1, 2, 3, 4, 7]), label="group")
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), label="dtype")
    texts = cache_texts(
        lengths, scheme, past, num_heads=2 * group, head_dim=head_dim, dtype=dtype, window=window, page_size=16
    )
    rule = ScoreRule(scale=0.3, window=window, softcap=data.draw(st.sampled_from([None, 5.0])))
    whole = [result(texts.step([(text, 0, end)]), rule, path) for text, end in enumerate(lengths)]
    parts: list[Part] = []
    for text, end in enumerate(lengths):
        begin = data.draw(st.integers(0, end - 1), label="begin")
        parts.append((text, begin, data.draw(st.integers(begin + 1, end), label="end")))
    parts = data.draw(st.permutations(parts))
    found = _on_three_threads(partial(result, texts.step(parts), rule, path))
    assert torch.equal(found, torch.cat([whole[text][begin:end] for text, begin, end in parts]))


def _on_three_threads(function: partial[torch.Tensor]) -> torch.Tensor:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        return function()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("path", native_paths())
@pytest.mark.parametrize("past", ["chunk", "chunk, sinks and recent"])
def test_company_and_threads_change_no_bit(path: str, past: str) -> None:
    """Enough work that threads are taken; what a step computes of a text is the same here."""
    texts = cache_texts((300, 290, 150), layer_schemes(64)["4 bits"], PASTS[past], num_heads=16, head_dim=64)
    rule, parts = ScoreRule(scale=0.1), [(0, 100, 300), (1, 200, 290), (2, 149, 150)]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = torch.cat([result(texts.step([part]), rule, path) for part in parts])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(_on_three_threads(partial(result, texts.step(parts), rule, path)), alone)


@pytest.mark.parametrize("path", native_paths())
@pytest.mark.parametrize("fill", [0x7C, 0xFF])
@pytest.mark.parametrize("name", ["3 bits", "4 bits", "8 and 2 bits", "keys only", "keys along tokens"])
def test_what_lies_where_nothing_was_stored_does_not_matter(path: str, name: str, fill: int) -> None:
    for past in ("off", "window and recent"):
        rule = RULES["window"]
        texts = cache_texts(LENGTHS[3:6], SCHEMES[name], PASTS[past], window=rule.window, fill=fill)
        parts: list[Part] = [(0, 15, 16), (1, 10, 17), (2, 70, 77)]
        step, usual = texts.step(parts), replace(texts, fill=0x55).step(parts)
        assert torch.equal(result(step, rule, path), result(usual, rule, path))


@pytest.mark.parametrize("path", native_paths())
def test_entries_of_tables_that_nothing_sees_are_not_read(path: str) -> None:
    texts = cache_texts((30, 75), SCHEMES["4 bits"], PASTS["window"], window=9)
    step, rule = texts.step([(0, 29, 30), (1, 70, 75)]), ScoreRule(scale=0.5, window=9)
    expected = result(step.copy(), rule, path)
    assert step.batch.exact is not None
    tables = [batch.page_table_RP.clone() for batch in (step.batch.pages, step.batch.exact)]
    for table_RP in tables:
        table_RP[table_RP == 0] = 2**30
    pages, exact = (
        replace(step.batch.pages, page_table_RP=tables[0]),
        replace(step.batch.exact, page_table_RP=tables[1]),
    )
    changed = replace(step, batch=replace(step.batch, pages=pages, exact=exact))
    assert torch.equal(result(changed, rule, path), expected)


@pytest.mark.parametrize("path", native_paths())
@pytest.mark.parametrize("scheme", ["4 bits", "halves", "keys along tokens"])
def test_the_first_token_of_a_text_gives_its_own_value(path: str, scheme: str) -> None:
    step = cache_texts((1,), SCHEMES[scheme], PASTS["token"]).step([(0, 0, 1)])
    assert torch.equal(result(step, ScoreRule(scale=0.7), path), step.value_TKD.repeat_interleave(2, 1))


@pytest.mark.parametrize("path", native_paths())
def test_what_is_not_finite_is_seen(path: str) -> None:
    """In every later row, and in no other head."""
    texts = cache_texts((20,), SCHEMES["4 bits"], PASTS["token"])
    step, rule = texts.step([(0, 0, 20)]), ScoreRule(scale=0.3)
    step.key_TKD[7, 1, 3] = torch.inf
    found = result(step, rule, path)
    assert bool(found[:, :2].isfinite().all())
    assert bool(found[:7, 2:].isfinite().all())
    assert bool(found[8:, 2:].isnan().all())


@pytest.mark.parametrize("path", native_paths())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_sides_are_plain_attention(path: str, dtype: torch.dtype) -> None:
    """With nothing rounded, or everything exact, the result is that of attention without codes."""
    scheme = LayerScheme(keys=SideScheme(), values=SideScheme())
    rule, parts = ScoreRule(scale=0.3), [(0, 89, 90), (1, 20, 60)]
    for past in ("off", "chunk", "window and recent"):
        texts = cache_texts((90, 60), scheme, PASTS[past], dtype=dtype)
        found = result(texts.step(parts), rule, path)
        dense = PagedTexts(
            query_LND=texts.query_LND,
            key_LKD=texts.key_LKD,
            value_LKD=texts.value_LKD,
            tables=texts.tables,
            page_size=16,
            num_pages=1,
            dtype=dtype,
            window=None,
        )
        expected = torch.cat([dense_attention(dense, part, rule) for part in parts])
        tolerance = 5e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("path", native_paths())
def test_an_empty_step_gives_nothing(path: str) -> None:
    texts: CacheTexts = cache_texts((4,), SCHEMES["keys along tokens"], PASTS["window"])
    step = texts.step([])
    assert result(step, ScoreRule(scale=1.0), path).shape == (0, 4, 16)
    assert bool((step.storage.pages_ZB == texts.fill).all())


def test_what_is_taken() -> None:
    schemes = list(SCHEMES.values())
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert takes_cache(torch.device("cpu"), dtype, schemes)
        assert not takes_cache(torch.device("meta"), dtype, schemes)
    assert not takes_cache(torch.device("cpu"), torch.float64, schemes)
