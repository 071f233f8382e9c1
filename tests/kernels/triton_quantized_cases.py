"""The triton kernels for a quantized cache against float64, for a run that `test_triton_quantized.py` starts.

Under `TRITON_INTERPRET=1`, set before triton is imported, numpy runs the kernels on the processor; without it the
machine's GPU does. Pages hold bytes that are not a number where nothing is stored, and so does memory to be filled.
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
from support.kv_cache import PASTS, CacheStep, CacheTexts, cache_texts, layer_schemes
from support.paged import Part

from optgptq.kernels import quantized_attention as plain
from optgptq.kernels import triton_attention, triton_quantized_attention
from optgptq.kernels.paged_attention import ScoreRule
from optgptq.kv_cache.packing import unpack
from optgptq.kv_cache.page_planes import SIDES, Side, code_plane, read_vectors
from optgptq.kv_cache.scheme import LayerScheme, SideScheme

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])
SINKS = torch.tensor([-1.0, 0.0, 2.0, 9.0])
RULES = {
    "plain": ScoreRule(scale=0.3),
    "window": ScoreRule(scale=0.3, window=21),
    "softcap": ScoreRule(scale=0.3, softcap=2.0),
    "rounded alibi and sinks": ScoreRule(scale=0.3, slopes_N=SLOPES / 8, round_alibi=True, sinks_N=SINKS),
    "all": ScoreRule(scale=0.2, window=70, softcap=3.0, slopes_N=SLOPES, alibi_scale=0.7, sinks_N=SINKS),
}
LENGTHS = (1, 5, 17, 77, 130)
MIX: list[Part] = [(0, 0, 1), (4, 127, 130), (1, 3, 5), (2, 14, 17), (3, 76, 77)]
TOLERANCES = {torch.float32: 6e-6, torch.float16: 8e-3, torch.bfloat16: 1.6e-2}
SCHEMES = layer_schemes(16)


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


@pytest.fixture
def _short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_attention, "SEGMENT", 64)
    monkeypatch.setattr(triton_attention, "JOINED_TOGETHER", 2)


def stored(step: CacheStep) -> CacheStep:
    """Return a step whose new tokens are stored, by torch."""
    copy = step.copy()
    plain.store(*copy.arguments[1:])
    return copy


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
@pytest.mark.parametrize("name", list(SCHEMES))
def test_every_scheme_in_a_mixed_step_of_several_segments(name):
    texts = cache_texts(LENGTHS, SCHEMES[name], PASTS["chunk, sinks and recent"], seed=1)
    check(texts, MIX, RULES["plain"])


@pytest.mark.usefixtures("_short_segments")
@pytest.mark.parametrize("past", list(PASTS))
@pytest.mark.parametrize("rule", list(RULES))
def test_every_mode_and_rule(past, rule):
    names = list(SCHEMES)
    scheme = SCHEMES[names[(len(past) + len(rule)) % len(names)]]
    check(cache_texts(LENGTHS, scheme, PASTS[past], window=RULES[rule].window, seed=2), MIX, RULES[rule])


def both_stored(step: CacheStep) -> tuple[CacheStep, CacheStep]:
    """Return the step after torch stored its tokens, and after triton did."""
    found = step.copy(DEVICE)
    triton_quantized_attention.store(*found.arguments[1:])
    return stored(step), found.copy()


def check_same_bytes(texts: CacheTexts, parts: Sequence[Part]) -> None:
    expected, found = both_stored(texts.step(parts))
    assert torch.equal(found.storage.pages_ZB, expected.storage.pages_ZB)
    for name in ("exact_keys_ZKDY", "exact_values_ZKYD"):
        pages, wanted = getattr(found.storage, name), getattr(expected.storage, name)
        assert (pages is None) == (wanted is None)
        if wanted is not None:
            assert torch.equal(pages.nan_to_num(9.0), wanted.nan_to_num(9.0))


@pytest.mark.parametrize("name", list(SCHEMES))
def test_tokens_become_the_bytes_that_torch_writes_and_nothing_else_changes(name):
    texts = cache_texts(LENGTHS, layer_schemes(32)[name], PASTS["chunk, sinks and recent"], head_dim=32, seed=4)
    check_same_bytes(texts, [*MIX[:4], (3, 40, 77)])


def decoded(step: CacheStep, side: Side) -> torch.Tensor:
    storage = step.storage
    dtype = step.key_TKD.dtype
    return read_vectors(storage.pages_ZB, layout=storage.layout, side=side, exact_dtype=dtype).nan_to_num(9.0)


@pytest.mark.parametrize(
    ("head_dim", "group_size", "dtype"),
    [(40, 40, torch.float16), (80, 20, torch.bfloat16), (96, 32, torch.float32), (64, 16, torch.float16)],
)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_head_sizes_and_groups_that_fill_nothing(bits, head_dim, group_size, dtype):
    """Rows of 3 bits and of 40 features are filled up; with what is nobody's business."""
    side = SideScheme(bits=bits, group_size=group_size)
    texts = cache_texts(
        (21, 9), LayerScheme(keys=side, values=side), PASTS["off"], head_dim=head_dim, page_size=48, dtype=dtype
    )
    expected, found = both_stored(texts.step([(1, 8, 9), (0, 3, 21)]))
    for name in SIDES:
        assert torch.equal(decoded(found, name), decoded(expected, name))


def test_numbers_that_are_equal_huge_or_not_finite():
    side = SideScheme(bits=4, group_size=8)
    texts = cache_texts((12,), LayerScheme(keys=side, values=side), PASTS["off"], seed=5)
    step = texts.step([(0, 0, 12)])
    for place, number in enumerate((torch.inf, -torch.inf, torch.nan, 1e5, -3e38, 65504.0, 1e-7, 0.0)):
        step.key_TKD[place, 0, place] = number
        step.value_TKD[place, 1, 8:] = number
    expected, found = both_stored(step)
    assert torch.equal(found.storage.pages_ZB, expected.storage.pages_ZB)


def test_ranges_are_chosen_as_torch_does():
    """A sum may differ in its last place, and with it which of two ranges loses least."""
    side, tokens = SideScheme(bits=3, group_size=16), SideScheme(bits=2, group_size=16, axis="token")
    for scheme in (LayerScheme(keys=side, values=side), LayerScheme(keys=tokens, values=side)):
        texts = cache_texts((170,), scheme, PASTS["window and recent"], head_dim=32, seed=6)
        step = texts.step([(0, 3, 170)])
        ranges = torch.tensor([[1.0, 1.0], [0.9, 0.9], [0.8, 1.0], [0.7, 0.6]])
        codecs = {
            name: replace(getattr(step.storage, name), ranges_C2=ranges) for name in ("key_codec", "value_codec")
        }
        expected, found = both_stored(replace(step, storage=replace(step.storage, **codecs)))
        for name in SIDES:
            differs = (decoded(found, name) != decoded(expected, name)).float().mean()
            assert differs <= 0.005


@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (2, 16), (3, 32), (8, 32)])
def test_fitted_codes_lose_no_more_than_those_of_torch(bits, group_size):
    side = SideScheme(bits=bits, group_size=group_size)
    texts = cache_texts(
        (60,), LayerScheme(keys=side, values=side), PASTS["off"], head_dim=32, is_fitted=True, fill=0, seed=7
    )
    expected, found = both_stored(texts.step([(0, 0, 60)]))
    for name in SIDES:
        codes = [unpack(code_plane(each.storage.pages_ZB, texts.layout, name), bits, 32) for each in (found, expected)]
        assert (codes[0] != codes[1]).float().mean() <= 0.01
        losses = [fitted_loss(each, texts, name) for each in (found, expected)]
        assert losses[0] <= 1.001 * losses[1]


def fitted_loss(step: CacheStep, texts: CacheTexts, side: Side) -> float:
    """Return what the errors of all tokens cost by the metric of a side."""
    codec = step.storage.key_codec if side == "keys" else step.storage.value_codec
    exact = step.key_TKD if side == "keys" else step.value_TKD
    error_TKD = exact.double() - decoded(step, side)[step.batch.pages.slot_T].double()
    return float(torch.einsum("tkd,kde,tke->", error_TKD, codec.metric_KDD.double(), error_TKD))
