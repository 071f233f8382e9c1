"""Weights in sign planes for the compiled loops: packed, refused, stacked, chosen."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.binary_weights import STORAGES, plane_layout, random_binary
from support.live_bytes import LiveBytes
from support.packed_binaries import binary_weight, slow_product

from optgptq import kernels
from optgptq.binary_weight import BinaryWeight
from optgptq.coefficients import FloatCoefficients
from optgptq.errors import FormatError
from optgptq.kernels import choose_any_binary_matmul, choose_binary_matmul
from optgptq.kernels.binary import binary_matmul
from optgptq.kernels.native_binary import (
    NativeBinary,
    exact_binary_matmul,
    fits_native_binary,
    native_binary_matmul,
    pack_native_binary,
)
from optgptq.kernels.packed_binary import PackedBinary
from optgptq.native.products import product_paths
from optgptq.runtime.linear import fits_kernel, hold_binary, pack_binary

needs_library = pytest.mark.skipif(not product_paths(), reason="the native library was not built")
CPU = torch.device("cpu")


@pytest.mark.parametrize("storage", STORAGES)
def test_weights_of_every_storage_are_kept_to_the_bit(storage):
    weight = random_binary(plane_layout(rows=37, columns=128, bits=3, coefficients=storage), ordered=True)
    held = pack_native_binary(weight)
    assert torch.equal(held.dequantize(), weight.dequantize())
    assert (held.out_features, held.in_features, held.tiles.num_planes) == (37, 128, 3)


def test_coefficients_that_half_precision_does_not_hold_stay_wide():
    weight = binary_weight(20, 64, bits=2, group_size=32)
    assert pack_native_binary(weight).tiles.offset_TGR.dtype == torch.float16
    alpha_OGP, offset_OG = weight.coefficients.values()
    odd = replace(weight, coefficients=FloatCoefficients(alpha_OGP, offset_OG * 1.0001))
    held = pack_native_binary(odd)
    assert held.tiles.offset_TGR.dtype == held.tiles.alpha_TGPR.dtype == torch.float32
    assert torch.equal(held.dequantize(), odd.dequantize())


def test_packed_planes_take_a_bit_for_each_plane_and_weight():
    held = pack_native_binary(binary_weight(64, 4096, bits=3, group_size=128))
    assert held.nbytes * 8 / (64 * 4096) == 3 + 16 * (3 + 1) / 128


@pytest.mark.parametrize(("bits", "group_size"), [(2, 20), (5, 32)])
def test_what_does_not_fit_is_refused(bits, group_size):
    weight = binary_weight(2, 60, bits=bits, group_size=group_size)
    assert not fits_native_binary(weight)
    with pytest.raises(
        FormatError, match=rf"up to 4 planes, .*{bits} planes and groups of {group_size} columns in rows"
    ):
        pack_native_binary(weight)


@needs_library
@pytest.mark.parametrize("tokens", [1, 5, 15, 16, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_agree_with_float64_and_with_plain_torch(tokens, dtype):
    weight = binary_weight(70, 384, bits=3, group_size=128, shuffled=True)
    held, bias_O = pack_native_binary(weight), torch.randn(70)
    x = torch.randn(tokens, 384, generator=torch.Generator().manual_seed(tokens)).to(dtype)
    expected = slow_product(x, weight) + bias_O.double()
    plain = binary_matmul(x, pack_binary(weight), bias_O=bias_O).double()
    exact = exact_binary_matmul(x, held, bias_O=bias_O.to(dtype)).double()
    rounded = native_binary_matmul(x, held, bias_O=bias_O).double()
    eps = torch.finfo(dtype).eps
    for found, limit in ((plain, eps + 1e-6), (exact, 2 * eps + 1e-6), (rounded, eps + 8e-3)):
        assert float((found - expected).norm() / expected.norm()) < limit


@needs_library
def test_whole_tiles_are_stacked():
    parts = [pack_native_binary(binary_weight(rows, 128, bits=2, group_size=64, seed=rows)) for rows in (32, 16, 48)]
    assert all(parts[0].stacks_with(part) for part in parts[1:])
    x = torch.randn(6, 128)
    joined = NativeBinary.stacked(parts)
    assert torch.equal(
        native_binary_matmul(x, joined), torch.cat([native_binary_matmul(x, part) for part in parts], -1)
    )
    assert joined.nbytes == sum(part.nbytes for part in parts)


def test_what_differs_is_not_stacked():
    whole = pack_native_binary(binary_weight(32, 128, bits=2, group_size=64))
    others = [
        binary_weight(20, 128, bits=2, group_size=64),
        binary_weight(32, 128, bits=3, group_size=64),
        binary_weight(32, 128, bits=2, group_size=32),
        binary_weight(32, 128, bits=2, group_size=64, shuffled=True),
    ]
    assert not any(whole.stacks_with(pack_native_binary(other)) for other in others)


@needs_library
def test_the_whole_dense_weight_is_never_there():
    rows, columns = 2048, 2048
    held = pack_native_binary(binary_weight(rows, columns, bits=2, group_size=128))
    x = torch.randn(32, columns)
    with LiveBytes() as live:
        native_binary_matmul(x, held)
    assert live.peak < 1 << 20
    with LiveBytes() as live:
        exact_binary_matmul(x, held)
    assert live.peak < rows * columns * 5


@needs_library
def test_on_a_processor_the_compiled_products_are_chosen():
    choice = choose_binary_matmul(CPU, torch.bfloat16)
    assert (choice.operation, choice.name, choice.is_makeshift) == ("binary_matmul", product_paths()[0], False)
    assert choice.reason.endswith("on cpu in bfloat16, activations in 8 bits with a scale for each 32")
    assert (choice.call, choice.weight_type) == (native_binary_matmul, NativeBinary)
    exact = choose_binary_matmul(CPU, torch.float32, exact=True)
    assert exact.reason.endswith("activations as they are")
    assert exact.call is exact_binary_matmul
    assert choose_binary_matmul(CPU, torch.float64).call is binary_matmul


def test_without_the_library_the_choice_says_what_is_lost(monkeypatch):
    monkeypatch.setattr(kernels, "takes_native", lambda device, dtype: False)
    choice = choose_binary_matmul(CPU, torch.float32)
    assert (choice.name, choice.is_makeshift, choice.call) == ("torch", True, binary_matmul)
    assert "install where there is a C++ compiler" in choice.reason


@needs_library
def test_many_planes_go_to_the_kernel_that_takes_them():
    weight: BinaryWeight = binary_weight(20, 64, bits=5, group_size=32)
    native, other = choose_binary_matmul(CPU, torch.float32), choose_any_binary_matmul(CPU, torch.float32)
    assert not fits_kernel(weight, native)
    assert fits_kernel(weight, other)
    assert isinstance(hold_binary(weight, other, CPU), PackedBinary)
    assert isinstance(hold_binary(binary_weight(20, 64, bits=4, group_size=32), native, CPU), NativeBinary)
