"""What the compiled code writes into a quantized cache: the bytes of torch, and fitted codes that lose no more."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.kv_cache import PASTS, CacheStep, cache_texts, layer_schemes, random_metric
from support.native_paths import native_paths

from optgptq.kernels import quantized_attention as plain
from optgptq.kv_cache.codec import Codes, SideCodec, decode, encode
from optgptq.kv_cache.packing import unpack
from optgptq.kv_cache.page_layout import PageLayout
from optgptq.kv_cache.page_planes import code_plane, parameter_plane
from optgptq.kv_cache.scheme import LayerScheme, SideScheme
from optgptq.kv_cache.setup import SideParameters
from optgptq.native.library import load_library
from optgptq.native.quantized_attention import store

pytestmark = pytest.mark.skipif(load_library() is None, reason="the native library was not built")

CPU = torch.device("cpu")
RANGES = torch.tensor([[1.0, 1.0], [0.9, 0.9], [0.8, 1.0], [0.6, 0.7]])


def with_new(step: CacheStep, key_TKD: torch.Tensor, value_TKD: torch.Tensor) -> CacheStep:
    return replace(step.copy(), key_TKD=key_TKD, value_TKD=value_TKD)


def check_bytes(step: CacheStep, path: str) -> None:
    """Compare all bytes of both pools, those of page 0 apart: tokens that are not kept overwrite each other there."""
    expected, found = step.copy(), step.copy()
    plain.store(*expected.arguments[1:])
    store(*found.arguments[1:], path=path)
    assert torch.equal(found.storage.pages_ZB, expected.storage.pages_ZB)
    for mine, torchs in (
        (found.storage.exact_keys_ZKDY, expected.storage.exact_keys_ZKDY),
        (found.storage.exact_values_ZKYD, expected.storage.exact_values_ZKYD),
    ):
        if mine is not None and torchs is not None:
            torch.testing.assert_close(mine[1:], torchs[1:], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("path", native_paths())
@pytest.mark.parametrize(("past", "head_dim"), [("token", 8), ("window and recent", 24), ("off", 40), ("token", 64)])
def test_the_bytes_are_those_of_torch(path: str, past: str, head_dim: int) -> None:
    """Every scheme; rows with bytes that only fill them up, texts that begin within a group, other dtypes."""
    for number, scheme in enumerate(layer_schemes(head_dim).values()):
        dtype = (torch.float32, torch.bfloat16, torch.float16)[number % 3]
        texts = cache_texts((75, 33, 1), scheme, PASTS[past], dtype=dtype, head_dim=head_dim, page_size=32)
        check_bytes(texts.step([(0, 11, 75), (1, 32, 33), (2, 0, 1)]), path)


@pytest.mark.parametrize("path", native_paths())
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_unusual_numbers(path: str, bits: int) -> None:
    """Constant, zero, tiny and huge groups, one outlier, ties, and what is not finite."""
    side = SideScheme(bits=bits, group_size=12)
    texts = cache_texts((12,), LayerScheme(keys=side, values=side), PASTS["off"], head_dim=24, num_kv_heads=1)
    step = texts.step([(0, 0, 12)])
    x_TKD = torch.randn(12, 1, 24, generator=torch.Generator().manual_seed(4))
    x_TKD[0] = 1.3
    x_TKD[1] = 0.0
    x_TKD[2] *= 1e-7
    x_TKD[3] *= 1e30
    x_TKD[4, 0, 5] = 1e4
    x_TKD[5, 0] = torch.arange(24) * 0.5
    x_TKD[6, 0, 3] = torch.inf
    x_TKD[7, 0, 20] = torch.nan
    x_TKD[8] = x_TKD[8] * 0.01 + 1000.0
    x_TKD[9] = -x_TKD[9].abs() * 6e4
    check_bytes(with_new(step, x_TKD, -x_TKD), path)


@pytest.mark.parametrize("path", native_paths())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_ranges_are_chosen_as_torch_chooses(path: str, data: st.DataObject) -> None:
    seed = data.draw(st.integers(0, 10_000))
    head_dim, parts = data.draw(st.sampled_from([(8, 1), (24, 3), (32, 2), (40, 1), (64, 2), (64, 8)]))
    side = SideScheme(bits=data.draw(st.sampled_from([2, 3, 4])), group_size=head_dim // parts)
    texts = cache_texts((20,), LayerScheme(keys=side, values=side), PASTS["off"], head_dim=head_dim, seed=seed)
    step = texts.step([(0, 3, 20)])
    codec = SideCodec.of(side, SideParameters(ranges_C2=RANGES), CPU)
    storage = replace(step.storage, key_codec=codec, value_codec=codec)
    check_bytes(replace(step, storage=storage), path)


def codes_of(step: CacheStep, path: str | None) -> Codes:
    """Return the codes of keys that the new tokens of a step get, in their order; path None is torch."""
    own = step.copy()
    if path is None:
        plain.store(*own.arguments[1:])
    else:
        store(*own.arguments[1:], path=path)
    layout, slot_T = own.storage.layout, own.batch.pages.slot_T
    page_T, place_T = slot_T // layout.page_size, slot_T % layout.page_size
    rows = code_plane(own.storage.pages_ZB, layout, "keys")[page_T, :, place_T]
    pairs = parameter_plane(own.storage.pages_ZB, layout, "keys")[page_T, :, place_T]
    code_TKD = unpack(rows, layout.scheme.keys.bits, layout.head_dim)
    return Codes(code_TKD=code_TKD, scale_TKG=pairs[..., 0], minimum_TKG=pairs[..., 1])


def loss_of(codes: Codes, step: CacheStep, codec: SideCodec) -> float:
    assert codec.metric_KDD is not None
    error_TKD = (step.key_TKD - decode(codes, codec.scheme)).double()
    return float(torch.einsum("tkd,kde,tke->", error_TKD, codec.metric_KDD.double(), error_TKD))


@pytest.mark.parametrize("path", native_paths())
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("head_dim", "group_size"), [(16, 16), (40, 8), (64, 64), (64, 32)])
def test_fitted_codes_are_those_of_torch(path: str, bits: int, head_dim: int, group_size: int) -> None:
    """But for the order of sums: a few codes differ, and what is lost does not."""
    side = SideScheme(bits=bits, group_size=group_size)
    texts = cache_texts(
        (150,), LayerScheme(keys=side, values=side), PASTS["off"], head_dim=head_dim, is_fitted=True, seed=bits
    )
    step, codec = texts.step([(0, 0, 150)]), texts.codecs["keys"]
    assert codec is not None
    expected, found = codes_of(step, None), codes_of(step, path)
    assert float((found.code_TKD != expected.code_TKD).float().mean()) <= 0.01
    assert float((found.scale_TKG != expected.scale_TKG).float().mean()) <= 0.02
    assert loss_of(found, step, codec) <= 1.001 * loss_of(expected, step, codec)
    nearest = encode(step.key_TKD, replace(codec, metric_KDD=None, feedback_KDD=None))
    assert loss_of(found, step, codec) < 0.9 * loss_of(nearest, step, codec)


@pytest.mark.parametrize("path", native_paths())
def test_fitted_codes_of_a_token_do_not_depend_on_the_others(path: str) -> None:
    side = SideScheme(bits=4, group_size=64)
    texts = cache_texts((40,), LayerScheme(keys=side, values=side), PASTS["off"], head_dim=64, is_fitted=True)
    whole = codes_of(texts.step([(0, 0, 40)]), path)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for begin, end in ((0, 17), (17, 18), (18, 40)):
            part = codes_of(texts.step([(0, begin, end)]), path)
            assert torch.equal(part.code_TKD, whole.code_TKD[begin:end])
            assert torch.equal(part.scale_TKG, whole.scale_TKG[begin:end])
            assert torch.equal(part.minimum_TKG, whole.minimum_TKG[begin:end])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("path", native_paths())
def test_unusual_numbers_are_fitted_safely(path: str) -> None:
    """A metric of nothing, constant vectors, and vectors that are not finite: no crash, and it is seen."""
    side = SideScheme(bits=4, group_size=8)
    texts = cache_texts((6,), LayerScheme(keys=side, values=side), PASTS["off"], head_dim=16)
    step = texts.step([(0, 0, 6)])
    metric_KDD = random_metric(2, 16, torch.Generator().manual_seed(2))
    metric_KDD[1] = 0.0
    codec = SideCodec.of(side, SideParameters(metric_KDD=metric_KDD, ranges_C2=RANGES), CPU)
    key_TKD = step.key_TKD.clone()
    key_TKD[0] = 2.5
    key_TKD[1, 0, 3] = torch.nan
    key_TKD[2, 0, 9] = -torch.inf
    step = replace(step, key_TKD=key_TKD, storage=replace(step.storage, key_codec=codec, value_codec=codec))
    found = decode(codes_of(step, path), side)
    assert torch.equal(found[0], key_TKD[0])
    assert bool(found[1, 0, :8].isnan().all())
    assert bool(found[2, 0, 8:].isnan().all())
    assert bool(found[1:3, 1].isfinite().all())
    assert bool((found[3:] - key_TKD[3:]).abs().max() < 0.6)


@pytest.mark.parametrize("path", native_paths())
def test_no_byte_beside_the_new_tokens_changes(path: str) -> None:
    """Not even bytes between planes, nor other pages."""
    side = SideScheme(bits=3, group_size=24)
    texts = cache_texts((50,), LayerScheme(keys=side, values=side), PASTS["token"], head_dim=24, num_kv_heads=3)
    step = texts.step([(0, 20, 50)])
    before = step.storage.pages_ZB.clone()
    store(*step.arguments[1:], path=path)
    layout: PageLayout = step.storage.layout
    page_T, place_T = step.batch.pages.slot_T // 16, step.batch.pages.slot_T % 16
    after = step.storage.pages_ZB.clone()
    for side_name in ("keys", "values"):
        for plane in (code_plane, parameter_plane):
            rows = plane(after, layout, side_name)
            rows[page_T, :, place_T] = plane(before, layout, side_name)[page_T, :, place_T]
    assert torch.equal(after, before)
