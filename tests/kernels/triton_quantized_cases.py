"""The triton kernel that attends to a quantized cache against float64, started by `test_triton_quantized.py`.

Under `TRITON_INTERPRET=1`, set before triton is imported, numpy runs the kernels on the processor; without it the
machine's GPU does. Pages hold bytes that are not a number where nothing is stored, and so does memory to be filled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from support.kv_cache import PASTS, CacheStep, CacheTexts, cache_texts, layer_schemes
from support.paged import Part
from support.triton_quantized import DEVICE, LENGTHS, MIX, poison_memory, repair_products, stored

from optgptq.kernels import triton_attention, triton_quantized_attention
from optgptq.kernels.paged_attention import PagedBatch, ScoreRule
from optgptq.kv_cache.codec import encode
from optgptq.kv_cache.scheme import LayerScheme, SideScheme

SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])
SINKS = torch.tensor([-1.0, 0.0, 2.0, 9.0])
RULES = {
    "plain": ScoreRule(scale=0.3),
    "window": ScoreRule(scale=0.3, window=21),
    "softcap": ScoreRule(scale=0.3, softcap=2.0),
    "rounded alibi and sinks": ScoreRule(scale=0.3, slopes_N=SLOPES / 8, round_alibi=True, sinks_N=SINKS),
    "all": ScoreRule(scale=0.2, window=70, softcap=3.0, slopes_N=SLOPES, alibi_scale=0.7, sinks_N=SINKS),
}
TOLERANCES = {torch.float32: 6e-6, torch.float16: 8e-3, torch.bfloat16: 1.6e-2}
SCHEMES = layer_schemes(16)
COMBINATIONS = (
    ("2 bits", "off", "plain"),
    ("3 bits", "token", "window"),
    ("4 bits", "chunk", "softcap"),
    ("8 bits", "window", "rounded alibi and sinks"),
    ("halves", "off, sinks", "all"),
    ("8 and 2 bits", "token, sinks", "window"),
    ("keys only", "chunk, sinks and recent", "plain"),
    ("values only", "window and recent", "all"),
    ("keys along tokens", "chunk, sinks and recent", "window"),
    ("keys along tokens, 3 bits", "window", "plain"),
    ("keys along tokens, exact values", "token, sinks", "rounded alibi and sinks"),
)


@pytest.fixture(autouse=True)
def _checked_memory_and_products(monkeypatch: pytest.MonkeyPatch) -> None:
    repair_products(monkeypatch)
    poison_memory(monkeypatch)


@pytest.fixture
def _short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_attention, "SEGMENT", 64)
    monkeypatch.setattr(triton_attention, "JOINED_TOGETHER", 2)


def attend(step: CacheStep, rule: ScoreRule) -> torch.Tensor:
    tensors = {name: getattr(rule, name) for name in ("slopes_N", "sinks_N")}
    moved = {name: each.to(DEVICE) for name, each in tensors.items() if each is not None}
    return triton_quantized_attention.attend(*step.copy(DEVICE).arguments, replace(rule, **moved)).cpu()


def check(texts: CacheTexts, parts: Sequence[Part], rule: ScoreRule) -> None:
    step = stored(texts.step(parts))
    output = attend(step, rule)
    dtype = step.query_TND.dtype
    assert output.dtype == dtype
    expected = torch.cat([texts.dense(part, rule) for part in parts])
    torch.testing.assert_close(output.double(), expected, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


@pytest.mark.usefixtures("_short_segments")
@pytest.mark.parametrize(("name", "past", "rule"), COMBINATIONS)
def test_schemes_modes_and_rules_in_a_mixed_step_of_several_segments(name, past, rule, monkeypatch):
    """In two ways: a program for each segment, and one for all."""
    monkeypatch.setattr(triton_attention, "TARGET_PROGRAMS", 1024 if len(name) % 2 else 0)
    texts = cache_texts(LENGTHS, SCHEMES[name], PASTS[past], num_kv_heads=1, window=RULES[rule].window, seed=2)
    check(texts, MIX, RULES[rule])


@pytest.mark.parametrize(
    ("bits", "head_dim", "group_size", "num_heads", "num_kv_heads", "page_size", "dtype"),
    [
        (4, 64, 64, 4, 2, 16, torch.bfloat16),
        (8, 32, 32, 7, 1, 32, torch.bfloat16),
        (2, 40, 40, 4, 2, 48, torch.float16),
        (3, 80, 80, 3, 3, 16, torch.float16),
        (3, 96, 96, 4, 1, 16, torch.bfloat16),
        (8, 40, 20, 20, 1, 16, torch.float16),
        (2, 128, 32, 1, 1, 16, torch.bfloat16),
    ],
)
def test_groups_head_sizes_and_pages(bits, head_dim, group_size, num_heads, num_kv_heads, page_size, dtype):
    side = SideScheme(bits=bits, group_size=group_size)
    heads = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim, "page_size": page_size}
    texts = cache_texts((5, 40), LayerScheme(keys=side, values=side), PASTS["token, sinks"], dtype=dtype, **heads)
    check(texts, [(1, 36, 40), (0, 4, 5)], ScoreRule(scale=head_dim**-0.5))


def test_exact_sides_of_16_bits():
    for name in ("keys only", "values only"):
        texts = cache_texts((5, 40), SCHEMES[name], PASTS["window"], dtype=torch.float16, seed=3)
        check(texts, [(1, 30, 40), (0, 4, 5)], ScoreRule(scale=0.3))


def test_sums_of_many_small_weights_are_kept():
    """Weights times scales below the smallest float16 are most of a flat attention over a long text."""
    side = SideScheme(bits=4, group_size=16)
    texts = cache_texts((600,), LayerScheme(keys=side, values=side), PASTS["token"], num_heads=1, num_kv_heads=1)
    query, value = texts.query_LND[0].half() * 0, (texts.value_LKD[0] * 1e-4).half()
    codes = [{"keys": texts.codes[0]["keys"], "values": encode(value, texts.codecs["values"])}]
    small = replace(
        texts, query_LND=[query], key_LKD=[texts.key_LKD[0].half()], value_LKD=[value], codes=codes,
        layout=replace(texts.layout, exact_bytes=2),
    )  # fmt: skip
    step = stored(small.step([(0, 599, 600)]))
    expected = small.dense((0, 599, 600), ScoreRule(scale=0.3))
    error = (attend(step, ScoreRule(scale=0.3)).double() - expected).abs().max()
    assert error <= 0.02 * expected.abs().max()


@pytest.mark.usefixtures("_short_segments")
@pytest.mark.parametrize(
    ("name", "past", "window"),
    [("4 bits", "window", None), ("keys along tokens, 3 bits", "token, sinks", 50)],
)
def test_a_row_does_not_depend_on_cut_batch_or_division(name, past, window, monkeypatch):
    rule = ScoreRule(scale=0.5, window=window, slopes_N=SLOPES[:2], sinks_N=SINKS[:2])
    sizes = {"num_heads": 2, "num_kv_heads": 1, "dtype": torch.float16}
    texts = cache_texts((20, 70), SCHEMES[name], PASTS[past], window=window, **sizes)

    def rows(parts: Sequence[Part], *, split: bool) -> torch.Tensor:
        monkeypatch.setattr(triton_attention, "TARGET_PROGRAMS", 1024 if split else 0)
        return attend(stored(texts.step(parts)), rule)

    whole = rows([(1, 0, 70)], split=False)
    for begin, end, split in ((69, 70, True), (63, 66, False), (30, 51, True)):
        assert torch.equal(rows([(1, begin, end)], split=split), whole[begin:end])
        batched = rows([(0, 17, 20), (1, begin, end)], split=True)
        assert torch.equal(batched[3:], whole[begin:end])


def test_a_token_alone_gives_back_its_value():
    for past in ("token", "chunk", "window"):
        texts = cache_texts((1,), SCHEMES["2 bits"], PASTS[past])
        output = attend(stored(texts.step([(0, 0, 1)])), RULES["plain"])
        assert torch.equal(output[:, ::2], texts.value_LKD[0])


def test_codes_of_keys_that_are_read_exactly_change_nothing():
    texts = cache_texts((40,), SCHEMES["4 bits"], PASTS["token, sinks"])
    step = stored(texts.step([(0, 39, 40)]))
    expected = attend(step, RULES["plain"])
    damaged = step.copy()
    layout, page = texts.layout, damaged.storage.pages_ZB[texts.tables[0][2]]
    # The last token is the eighth of its page, in full precision; so are the first 16, a whole page.
    for head in range(layout.num_kv_heads):
        row = head * layout.head_bytes + 7 * layout.key_row_bytes
        page[row : row + layout.key_row_bytes] = 0xA5
    damaged.storage.pages_ZB[texts.tables[0][0]] = 0xA5
    assert torch.equal(attend(damaged, RULES["plain"]), expected)
    damaged.storage.pages_ZB[texts.tables[0][1]] ^= 0x11
    assert not torch.equal(attend(damaged, RULES["plain"]), expected)


def test_padded_rows_and_unused_entries_change_nothing():
    """A graph's step has more sequences than there are, with no tokens or in page 0, and longer contexts."""
    texts, rule = cache_texts((17, 40), SCHEMES["halves"], PASTS["chunk, sinks and recent"]), RULES["plain"]
    step = stored(texts.step([(0, 16, 17), (1, 39, 40)]))
    expected = attend(step, rule)

    def padded(batch: PagedBatch) -> PagedBatch:
        table_RP = torch.zeros(4, batch.page_table_RP.shape[1], dtype=torch.int32)
        table_RP[:2] = batch.page_table_RP
        return replace(
            batch,
            page_table_RP=table_RP,
            query_start_R1=torch.tensor([0, 1, 2, 2, 3], dtype=torch.int32),
            context_R=torch.tensor([*batch.context_R.tolist(), 0, 1], dtype=torch.int32),
            slot_T=torch.cat([batch.slot_T, torch.zeros(1, dtype=torch.int64)]),
            max_context=600,
        )

    more = {
        name: torch.cat([getattr(step, name), torch.zeros_like(getattr(step, name)[:1])])
        for name in ("query_TND", "key_TKD", "value_TKD")
    }
    batch = replace(
        step.batch,
        pages=padded(step.batch.pages),
        exact=padded(step.batch.exact),
        first_exact_T=torch.cat([step.batch.first_exact_T, torch.zeros(1, dtype=torch.int32)]),
    )
    larger = replace(step, batch=batch, **more).copy(DEVICE)
    triton_quantized_attention.store(*larger.arguments[1:])
    assert torch.equal(larger.storage.pages_ZB[1:].cpu(), step.storage.pages_ZB[1:])
    assert torch.equal(attend(larger, rule)[:2], expected)


def test_an_empty_step():
    step = cache_texts((4,), SCHEMES["4 bits"], PASTS["token"]).step([])
    triton_quantized_attention.store(*step.copy(DEVICE).arguments[1:])
    assert attend(step, RULES["plain"]).shape == (0, 4, 16)
