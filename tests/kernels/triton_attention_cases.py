"""The triton kernels for attention over pages against float64, for a run that `test_triton_attention.py` starts.

Under `TRITON_INTERPRET=1`, set before triton is imported, numpy runs the kernels on the processor; without it the
machine's GPU does. Pages hold NaN where nothing is stored, and so does memory that a kernel is to fill.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support.interpreted_triton import repair_bfloat16
from support.paged import PagedStep, PagedTexts, Part, paged_texts

from optgptq.kernels import paged_attention as plain
from optgptq.kernels import triton_attention
from optgptq.kernels.paged_attention import ScoreRule, paged_attention_literal

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
HEADS = 4
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])
SINKS = torch.tensor([-1.0, 0.0, 2.0, 9.0])
RULES = {
    "plain": ScoreRule(scale=0.3),
    "window": ScoreRule(scale=0.3, window=21),
    "window of one": ScoreRule(scale=0.3, window=1),
    "softcap": ScoreRule(scale=0.3, softcap=2.0),
    "alibi": ScoreRule(scale=0.3, slopes_N=SLOPES),
    "rounded alibi": ScoreRule(scale=0.3, slopes_N=SLOPES, alibi_scale=0.37, round_alibi=True),
    "sinks": ScoreRule(scale=0.3, sinks_N=SINKS),
    "rounded alibi and sinks": ScoreRule(scale=0.3, slopes_N=SLOPES / 8, round_alibi=True, sinks_N=SINKS),
    "all": ScoreRule(scale=0.2, window=70, softcap=3.0, slopes_N=SLOPES, alibi_scale=0.7, sinks_N=SINKS),
}
LENGTHS = (1, 5, 16, 17, 77, 130)
MIX: list[Part] = [(0, 0, 1), (5, 127, 130), (1, 3, 5), (2, 15, 16), (3, 14, 17), (4, 76, 77)]
TOLERANCES = {torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@pytest.fixture(autouse=True)
def _interpreted_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64, rounded: in what order a library adds up a row of float32 depends on the number of rows."""
    if not INTERPRETED:
        return
    repair_bfloat16(monkeypatch)
    product = np.matmul

    def wide_product(left: Any, right: Any) -> Any:
        return product(left.astype(np.float64), right.astype(np.float64)).astype(np.float32)

    monkeypatch.setattr(np, "matmul", wide_product)


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is never written, or read where it should not be, shows up as NaN."""
    new_empty, empty = torch.Tensor.new_empty, torch.empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *sizes, **kinds: _poisoned(new_empty(*sizes, **kinds)))
    monkeypatch.setattr(torch, "empty", lambda *sizes, **kinds: _poisoned(empty(*sizes, **kinds)))


def _poisoned(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor


def attend(step: PagedStep, rule: ScoreRule) -> torch.Tensor:
    tensors = {name: getattr(rule, name) for name in ("slopes_N", "sinks_N")}
    moved = {name: each.to(DEVICE) for name, each in tensors.items() if each is not None}
    return triton_attention.paged_attention(*step.to(DEVICE).arguments, replace(rule, **moved)).cpu()


def check(texts: PagedTexts, parts: Sequence[Part], rule: ScoreRule, dtype: torch.dtype) -> None:
    step = texts.step(parts).to("cpu", dtype)
    output = attend(step, rule)
    assert output.dtype == dtype
    expected = paged_attention_literal(*step.arguments, rule)
    torch.testing.assert_close(output.double(), expected, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


def mixed_texts(dtype: torch.dtype, window: int | None, **sizes: int) -> PagedTexts:
    wanted = {"num_heads": HEADS, "num_kv_heads": 2, "head_dim": 16, "page_size": 16, "seed": 3} | sizes
    return paged_texts(LENGTHS, **wanted, dtype=dtype, window=window)


@pytest.fixture
def _short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_attention, "SEGMENT", 64)
    monkeypatch.setattr(triton_attention, "JOINED_TOGETHER", 2)


@pytest.mark.usefixtures("_short_segments")
@pytest.mark.parametrize(
    ("name", "split"), [*((name, True) for name in RULES), ("plain", False), ("window", False), ("all", False)]
)
def test_every_rule_in_a_mixed_step_of_several_segments(name, split, monkeypatch):
    monkeypatch.setattr(triton_attention, "TARGET_PROGRAMS", 1024 if split else 0)
    rule = RULES[name]
    check(mixed_texts(torch.float32, rule.window), MIX, rule, torch.float32)


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "page_size", "dtype"),
    [
        (1, 1, 32, 16, torch.float16),
        (4, 2, 64, 8, torch.bfloat16),
        (4, 1, 80, 32, torch.float16),
        (16, 2, 96, 16, torch.bfloat16),
        (7, 1, 128, 128, torch.float16),
        (3, 3, 10, 24, torch.bfloat16),
        (20, 1, 256, 16, torch.bfloat16),
    ],
)
def test_groups_head_sizes_and_pages(num_heads, num_kv_heads, head_dim, page_size, dtype):
    """Groups of 7 and 20 fill no tile, features of 10, 80 and 96 are padded, pages of 24 and 128 are no part of one."""
    texts = mixed_texts(
        dtype, None, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, page_size=page_size
    )
    check(texts, [(0, 0, 1), (3, 13, 17), (4, 70, 77)], ScoreRule(scale=head_dim**-0.5), dtype)


def test_segments_as_they_are():
    texts = paged_texts((300, 257), num_heads=2, num_kv_heads=1, head_dim=16, page_size=16, dtype=torch.float16)
    check(texts, [(0, 297, 300), (1, 256, 257)], ScoreRule(scale=0.3), torch.float16)


@pytest.mark.usefixtures("_short_segments")
@pytest.mark.parametrize(("dtype", "window"), [(torch.float16, None), (torch.bfloat16, 30)])
def test_a_row_does_not_depend_on_cut_batch_or_division(dtype, window, monkeypatch):
    rule = ScoreRule(scale=0.5, window=window, slopes_N=SLOPES[:2], sinks_N=SINKS[:2])
    texts = mixed_texts(dtype, window, num_heads=2, num_kv_heads=1)

    def rows(parts: Sequence[Part], *, split: bool) -> torch.Tensor:
        monkeypatch.setattr(triton_attention, "TARGET_PROGRAMS", 1024 if split else 0)
        return attend(texts.step(parts).to("cpu", dtype), rule)

    whole = rows([(5, 0, 130)], split=False)
    for begin, end in ((129, 130), (63, 65), (100, 117)):
        for split in (True, False):
            assert torch.equal(rows([(5, begin, end)], split=split), whole[begin:end])
        batched = rows([(4, 75, 77), (5, begin, end), (1, 4, 5)], split=True)
        assert torch.equal(batched[2:-1], whole[begin:end])


def test_padded_rows_and_unused_entries_change_nothing():
    """A graph's step has more sequences than there are, with no tokens or in page 0, and longer contexts."""
    texts, rule = mixed_texts(torch.float16, None), ScoreRule(scale=0.3)
    step = texts.step([(3, 16, 17), (4, 76, 77)]).to("cpu", torch.float16)
    expected = attend(step, rule)
    batch = step.batch
    table_RP = torch.full((4, batch.page_table_RP.shape[1]), 10_000, dtype=torch.int32)
    table_RP[:2, :2], table_RP[1, :5] = batch.page_table_RP[:, :2], batch.page_table_RP[1, :5]
    table_RP[3] = 0
    padded = replace(
        batch,
        page_table_RP=table_RP,
        query_start_R1=torch.tensor([0, 1, 2, 2, 3], dtype=torch.int32),
        context_R=torch.tensor([*batch.context_R.tolist(), 0, 1], dtype=torch.int32),
    )
    query_TND = torch.cat([step.query_TND, torch.zeros_like(step.query_TND[:1])])
    output = attend(replace(step, query_TND=query_TND, batch=padded), rule)
    assert torch.equal(output[:2], expected)
    longer = attend(replace(step, batch=replace(batch, max_context=900)), rule)
    assert torch.equal(longer, expected)


def test_more_sequences_than_one_step_of_the_search():
    """Most of them without new tokens."""
    texts, rule = mixed_texts(torch.float16, None, num_heads=1, num_kv_heads=1), ScoreRule(scale=0.4)
    step = texts.step([(1, 4, 5), (3, 14, 17)]).to("cpu", torch.float16)
    expected = attend(step, rule)
    table_RP = torch.zeros(132, step.batch.page_table_RP.shape[1], dtype=torch.int32)
    table_RP[[1, 130]] = step.batch.page_table_RP
    starts = torch.zeros(133, dtype=torch.int32)
    starts[2:131], starts[131:] = 1, 4
    context_R = torch.zeros(132, dtype=torch.int32)
    context_R[[1, 130]] = step.batch.context_R
    batch = replace(step.batch, page_table_RP=table_RP, query_start_R1=starts, context_R=context_R)
    assert torch.equal(attend(replace(step, batch=batch), rule), expected)


def test_queries_of_a_joint_projection_and_pages_of_another_dtype():
    texts, rule = mixed_texts(torch.bfloat16, None), ScoreRule(scale=0.3)
    step = texts.step([(1, 2, 5), (2, 15, 16)]).to("cpu", torch.float32)
    expected = attend(step, rule)
    joint = torch.randn(4, HEADS + 3, 16)
    joint[:, :HEADS] = step.query_TND
    interleaved = torch.stack([step.query_TND, step.query_TND * 2], dim=2)
    for query_TND in (joint[:, :HEADS], interleaved[:, :, 0]):
        assert torch.equal(attend(replace(step, query_TND=query_TND), rule), expected)
    literal = paged_attention_literal(*step.arguments, rule)
    torch.testing.assert_close(expected.double(), literal, rtol=4e-6, atol=4e-6)


def test_an_empty_step():
    step = mixed_texts(torch.float16, None).step([]).to("cpu", torch.float16)
    assert attend(step, ScoreRule(scale=1.0)).shape == (0, HEADS, 16)


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize(("head_dim", "page_size"), [(16, 16), (80, 8), (10, 24)])
def test_tokens_go_to_their_slots_and_nowhere_else(dtype, head_dim, page_size):
    texts = mixed_texts(dtype, None, head_dim=head_dim, page_size=page_size)
    step = texts.step(MIX)
    pages = [torch.full_like(each, torch.nan).to(DEVICE) for each in (step.keys_ZKDY, step.values_ZKYD)]
    expected = [torch.full_like(each, torch.nan) for each in (step.keys_ZKDY, step.values_ZKYD)]
    joint = torch.cat([step.key_TKD, step.value_TKD, step.key_TKD], dim=1).to(DEVICE)
    key_TKD, value_TKD = joint[:, :2], joint[:, 2:4]
    triton_attention.store_tokens(key_TKD, value_TKD, *pages, step.batch.slot_T.to(DEVICE))
    plain.store_tokens(step.key_TKD, step.value_TKD, *expected, step.batch.slot_T)
    for found, wanted in zip(pages, expected, strict=True):
        assert torch.equal(found.cpu().nan_to_num(9.0), wanted.nan_to_num(9.0))
