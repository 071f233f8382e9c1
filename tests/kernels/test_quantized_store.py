"""What a step writes into a quantized cache, in torch, and texts that are computed in many steps."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.kv_cache import PASTS, CacheStep, CacheTexts, cache_texts, layer_schemes

from optgptq.kernels.paged_attention import ScoreRule
from optgptq.kernels.quantized_attention import CacheStorage, attend, store
from optgptq.kv_cache.scheme import PastRule

SCHEMES = layer_schemes(16)
RULE = ScoreRule(scale=0.3)


def in_parts(texts: CacheTexts, cuts: list[int], storage: CacheStorage, rule: ScoreRule = RULE) -> torch.Tensor:
    """Return attention of text 0, computed in one storage, cut into steps."""
    outputs = []
    for begin, end in itertools.pairwise(cuts):
        new = [rows[0][begin:end] for rows in (texts.query_LND, texts.key_LKD, texts.value_LKD)]
        step = CacheStep(
            query_TND=new[0],
            key_TKD=new[1],
            value_TKD=new[2],
            storage=storage,
            batch=texts.batch([(0, begin, end)]),
        )
        store(*step.arguments[1:])
        outputs.append(attend(*step.arguments, rule))
    return torch.cat(outputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("past", ["token", "chunk, sinks and recent"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_bytes_of_new_tokens_and_nothing_else(scheme: str, past: str, dtype: torch.dtype) -> None:
    """The same bytes as by hand; every other byte, other pages included, stays what it was."""
    # With 32 channels no row has bytes that only fill it up.
    wide = layer_schemes(32)[scheme]
    texts = cache_texts((35, 33, 1), wide, PASTS[past], dtype=dtype, head_dim=32, page_size=32)
    parts = [(0, 11, 35), (1, 32, 33), (2, 0, 1)]
    step = texts.step(parts)
    expected = step.copy().storage.pages_ZB
    for text, begin, end in parts:
        texts.write_codes(expected, text, begin, end)
    store(*step.arguments[1:])
    assert torch.equal(step.storage.pages_ZB, expected)


@pytest.mark.parametrize("past", ["window", "chunk, sinks and recent", "token, sinks", "window and recent"])
def test_exact_pages_take_what_is_kept(past: str) -> None:
    texts = cache_texts((50, 9), SCHEMES["4 bits"], PASTS[past])
    parts = [(0, 11, 50), (1, 8, 9)]
    step = texts.step(parts)
    before = step.copy()
    store(*step.arguments[1:])
    assert step.batch.exact is not None
    slot_T = step.batch.exact.slot_T
    # Tokens that are not kept write over each other in page 0.
    is_kept = slot_T >= 16
    assert 0 < int(is_kept.sum()) < len(slot_T)
    for found, old, new_TKD in zip(exact_rows(step), exact_rows(before), (step.key_TKD, step.value_TKD), strict=True):
        assert torch.equal(found[slot_T[is_kept]], new_TKD[is_kept])
        others = torch.ones(len(found), dtype=torch.bool)
        others[slot_T] = False
        assert torch.equal(found[others].nan_to_num(9.0), old[others].nan_to_num(9.0))


def exact_rows(step: CacheStep) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the exact keys and values of all slots, `[slots, K, D]`."""
    keys_ZKDY, values_ZKYD = step.storage.exact_keys_ZKDY, step.storage.exact_values_ZKYD
    assert keys_ZKDY is not None
    assert values_ZKYD is not None
    return keys_ZKDY.permute(0, 3, 1, 2).flatten(0, 1), values_ZKYD.transpose(1, 2).flatten(0, 1)


@pytest.mark.parametrize("past", PASTS)
@pytest.mark.parametrize("scheme", ["8 and 2 bits", "keys along tokens", "values only"])
def test_a_text_computed_in_many_steps(scheme: str, past: str) -> None:
    """Against the dense formula step by step; modes that do not depend on steps give the same as in one."""
    rule = ScoreRule(scale=0.3, window=35)
    texts = cache_texts((67,), SCHEMES[scheme], PASTS[past], window=35)
    cuts = [0, 1, 20, 21, 22, 48, 66, 67]
    found = in_parts(texts, cuts, texts.step([]).storage, rule)
    expected = torch.cat([texts.dense((0, begin, end), rule) for begin, end in itertools.pairwise(cuts)])
    torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=2e-6)
    whole = in_parts(texts, [0, 67], texts.step([]).storage, rule)
    assert torch.allclose(found, whole, rtol=0, atol=2e-6) == (not texts.past.depends_on_steps)


@settings(max_examples=20, deadline=None)
@given(
    length=st.integers(1, 90),
    scheme=st.sampled_from(sorted(SCHEMES)),
    past=st.sampled_from([PASTS[name] for name in ("off", "token", "token, sinks", "window", "window and recent")]),
    cuts=st.sets(st.integers(1, 89), max_size=8),
)
def test_cuts_do_not_matter(length: int, scheme: str, past: PastRule, cuts: set[int]) -> None:
    texts = cache_texts((length,), SCHEMES[scheme], past)
    one, many = texts.step([]).storage, texts.step([]).storage
    whole = in_parts(texts, [0, length], one)
    places = [0, *sorted(cut for cut in cuts if cut < length), length]
    torch.testing.assert_close(in_parts(texts, places, many), whole, rtol=0, atol=2e-6)
    assert torch.equal(one.pages_ZB, many.pages_ZB)


@pytest.mark.parametrize("scheme", ["3 bits", "halves"])
def test_fitted_codes_serve_attention_alike(scheme: str) -> None:
    """Only the writer knows of the metric; what is read is what the bytes say."""
    texts = cache_texts((60,), SCHEMES[scheme], PASTS["token"], is_fitted=True)
    found = in_parts(texts, [0, 20, 60], texts.step([]).storage)
    torch.testing.assert_close(found.double(), texts.dense((0, 0, 60), RULE), rtol=1e-3, atol=1e-3)
    plain = cache_texts((60,), SCHEMES[scheme], PASTS["token"])
    assert not torch.equal(plain.codes[0]["keys"].code_TKD, texts.codes[0]["keys"].code_TKD)
