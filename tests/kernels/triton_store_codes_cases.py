"""The triton kernel that stores codes against torch, started by `test_triton_store_codes.py`.

Under `TRITON_INTERPRET=1`, set before triton is imported, numpy runs the kernel on the processor; without it the
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

from optgptq.kernels import triton_quantized_attention, triton_store_codes
from optgptq.kv_cache.packing import unpack
from optgptq.kv_cache.page_planes import SIDES, Side, code_plane, read_vectors
from optgptq.kv_cache.scheme import LayerScheme, SideScheme

SCHEMES = layer_schemes(16)


@pytest.fixture(autouse=True)
def _checked_memory_and_products(monkeypatch: pytest.MonkeyPatch) -> None:
    repair_products(monkeypatch)
    poison_memory(monkeypatch)


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
    check_same_bytes(texts, [*MIX[:4], (3, 60, 65)])


def decoded(step: CacheStep, side: Side) -> torch.Tensor:
    storage = step.storage
    dtype = step.key_TKD.dtype
    return read_vectors(storage.pages_ZB, layout=storage.layout, side=side, exact_dtype=dtype).nan_to_num(9.0)


@pytest.mark.parametrize(
    ("bits", "head_dim", "group_size", "dtype"),
    [
        (2, 40, 40, torch.float16),
        (3, 40, 20, torch.float16),
        (3, 80, 20, torch.bfloat16),
        (4, 80, 80, torch.bfloat16),
        (4, 96, 32, torch.float32),
        (8, 64, 16, torch.float16),
    ],
)
def test_head_sizes_and_groups_that_fill_nothing(bits, head_dim, group_size, dtype):
    """Rows of 3 bits and of 40 features are filled up; with what is nobody's business."""
    side = SideScheme(bits=bits, group_size=group_size)
    texts = cache_texts(
        (18, 9), LayerScheme(keys=side, values=side), PASTS["off"], head_dim=head_dim, page_size=48, dtype=dtype
    )
    expected, found = both_stored(texts.step([(1, 8, 9), (0, 0, 18)]))
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
        texts = cache_texts((50,), scheme, PASTS["window and recent"], num_kv_heads=1, head_dim=32, seed=6)
        step = texts.step([(0, 3, 50)])
        ranges = torch.tensor([[1.0, 1.0], [0.9, 0.9], [0.8, 1.0], [0.7, 0.6]])
        codecs = {name: replace(getattr(step.storage, name), ranges_C2=ranges) for name in ("key_codec", "value_codec")}
        expected, found = both_stored(replace(step, storage=replace(step.storage, **codecs)))
        for name in SIDES:
            differs = (decoded(found, name) != decoded(expected, name)).float().mean()
            assert differs <= 0.005


@pytest.mark.parametrize(("bits", "head_dim", "group_size"), [(4, 8, 8), (2, 16, 8), (3, 24, 24)])
def test_fitted_codes_lose_no_more_than_those_of_torch(bits, head_dim, group_size, monkeypatch):
    monkeypatch.setattr(triton_store_codes, "FITTED_TOGETHER", 64)
    side = SideScheme(bits=bits, group_size=group_size)
    scheme, sizes = LayerScheme(keys=side, values=side), {"num_kv_heads": 1, "head_dim": head_dim}
    texts = cache_texts((64,), scheme, PASTS["off"], is_fitted=True, seed=7, **sizes)
    expected, found = both_stored(texts.step([(0, 0, 64)]))
    for name in SIDES:
        codes = [
            unpack(code_plane(each.storage.pages_ZB, texts.layout, name), bits, head_dim) for each in (found, expected)
        ]
        assert (codes[0] != codes[1]).float().mean() <= 0.01
        losses = [fitted_loss(each, texts, name) for each in (found, expected)]
        assert losses[0] <= 1.001 * losses[1]


def test_fitted_codes_of_a_token_do_not_depend_on_the_others():
    side = SideScheme(bits=4, group_size=8)
    scheme, sizes = LayerScheme(keys=side, values=side), {"num_kv_heads": 1, "head_dim": 8}
    texts = cache_texts((2,), scheme, PASTS["off"], is_fitted=True, **sizes)
    together, alone = both_stored(texts.step([(0, 0, 2)]))[1], both_stored(texts.step([(0, 1, 2)]))[1]
    for name in SIDES:
        slot = int(alone.batch.pages.slot_T[0])
        assert torch.equal(decoded(alone, name)[slot], decoded(together, name)[slot])


def fitted_loss(step: CacheStep, texts: CacheTexts, side: Side) -> float:
    """Return what the errors of all tokens cost by the metric of a side."""
    codec = step.storage.key_codec if side == "keys" else step.storage.value_codec
    exact = step.key_TKD if side == "keys" else step.value_TKD
    error_TKD = exact.double() - decoded(step, side)[step.batch.pages.slot_T].double()
    return float(torch.einsum("tkd,kde,tke->", error_TKD, codec.metric_KDD.double(), error_TKD))
