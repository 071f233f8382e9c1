"""Products with packed dense weights beside float64, and where they are used."""

from __future__ import annotations

import pytest
import torch

from optgptq.bundled import bundled_path
from optgptq.kernels import packed_dense
from optgptq.kernels.packed_dense import PackedDense, TiledDense, pack_dense, packs
from optgptq.models.linear import Linear
from optgptq.native.dense_products import has_dense_products
from optgptq.runtime import packed_linears
from optgptq.runtime.load import load_model
from optgptq.runtime.packed_linears import pack_linears

CPU = torch.device("cpu")
ERRORS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
needs_packing = pytest.mark.skipif(not packs(CPU, torch.float32), reason="this build of torch has no oneDNN")


def test_other_devices_and_dtypes_are_not_packed():
    assert not packs(torch.device("cuda"), torch.float32)
    assert not packs(CPU, torch.float64)
    assert not packs(CPU, torch.float16)


@needs_packing
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [False, True])
def test_products_of_any_shape(dtype, with_bias):
    if not packs(CPU, dtype):
        pytest.skip("this processor multiplies bfloat16 no faster")
    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(67, 130, generator=generator).to(dtype)
    bias_O = torch.randn(67, generator=generator).to(dtype) if with_bias else None
    packed = pack_dense(weight_OI, bias_O)
    for shape in ((1, 130), (3, 130), (1, 17, 130), (2, 3, 130), (0, 130)):
        x = torch.randn(shape, generator=generator).to(dtype)
        expected = x.double() @ weight_OI.double().T + (0 if bias_O is None else bias_O.double())
        found = packed(x)
        assert found.shape == expected.shape
        assert found.dtype == dtype
        assert found.numel() == 0 or float((found - expected).abs().max() / expected.abs().max()) < ERRORS[dtype]
    strided = torch.randn(5, 260, generator=generator).to(dtype)[:, ::2]
    torch.testing.assert_close(packed(strided), packed(strided.contiguous()))


@needs_packing
def test_large_linears_are_packed_and_small_ones_are_not(monkeypatch):
    decoder = load_model(bundled_path("bundled:story-llama"))
    tokens_BS = torch.arange(2, 20).unsqueeze(0)
    expected = decoder.logits(tokens_BS)
    pack_linears(decoder)
    assert all(isinstance(linear, Linear) for layer in decoder.layers for linear in layer.linears.values())
    monkeypatch.setattr(packed_dense, "_SMALLEST_WEIGHT", 128 * 384)
    pack_linears(decoder)
    kinds = {name: type(linear) for name, linear in decoder.layers[0].linears.items()}
    assert kinds["mlp.down_proj"] is PackedDense
    assert kinds["self_attn.k_proj"] is Linear
    assert isinstance(decoder.head.project, PackedDense)
    torch.testing.assert_close(decoder.logits(tokens_BS), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not has_dense_products(), reason="no compiled loops, or a processor without AVX512_BF16")
def test_bfloat16_goes_to_our_own_loops_whatever_its_size():
    decoder = load_model(bundled_path("bundled:story-llama"), dtype=torch.bfloat16)
    tokens_BS = torch.arange(2, 20).unsqueeze(0)
    expected = decoder.logits(tokens_BS)
    pack_linears(decoder)
    assert all(isinstance(linear, TiledDense) for layer in decoder.layers for linear in layer.linears.values())
    assert isinstance(decoder.head.project, TiledDense)
    torch.testing.assert_close(decoder.logits(tokens_BS), expected, rtol=0.02, atol=0.1)


@needs_packing
def test_a_large_head_that_shares_its_weight_stays(monkeypatch):
    decoder = load_model(bundled_path("bundled:story-llama"))
    monkeypatch.setattr(packed_dense, "_SMALLEST_WEIGHT", 1)
    monkeypatch.setattr(packed_linears, "_LARGEST_COPY_BYTES", 1)
    pack_linears(decoder)
    assert isinstance(decoder.head.project, Linear)
