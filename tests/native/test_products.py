"""The compiled products with codes: the same bits as a literal twin, on every path, in every batch, on any threads."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.packed_affines import affine_weight, slow_product

from optgptq.affine_weight import AffineWeight
from optgptq.kernels.native_affine import NativeAffine, exact_affine_matmul, native_affine_matmul, pack_native_affine
from optgptq.native.products import affine_product, product_paths
from optgptq.native.row_tiles import pack_row_tiles, unpack_row_tiles

pytestmark = pytest.mark.skipif(not product_paths(), reason="the native library was not built")

PATHS = product_paths()
WIDTHS = (2, 3, 4, 8)
# Rows, columns and group size: one of each, sizes that fill no tile and no block, several groups and one for a row, up
# to more blocks than fit the nearest cache.
SHAPES = (
    (1, 1, -1),
    (1, 200, -1),
    (33, 1, -1),
    (16, 32, 32),
    (37, 96, 32),
    (50, 400, 128),
    (17, 1100, 1024),
    (5, 1100, -1),
)


def fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Return `a * b + c` of float32 numbers, rounded once.

    The product is exact in float64. Where the sum there is not, it is rounded to odd first, so that the rounding to
    float32 is the only one that counts.
    """
    a, b, c = (np.asarray(x, dtype=np.float64) for x in np.broadcast_arrays(a, b, c))
    product = a * b
    total = product + c
    back = total - product
    error = (product - (total - back)) + (c - back)
    bits = total.view(np.int64)
    is_even = (bits & 1) == 0
    towards = np.where((error > 0) == (total > 0), 1, -1)
    odd = np.where((error != 0) & is_even & np.isfinite(total), bits + towards, bits)
    return odd.view(np.float64).astype(np.float32)


def twin(x: torch.Tensor, held: NativeAffine, bias_O: torch.Tensor | None) -> torch.Tensor:
    """Return the product, number by number in the order that `source/products.hpp` promises."""
    tiles = held.tiles
    codes_OI = unpack_row_tiles(tiles.codes_TBCX, tiles.bits)[: tiles.num_rows].numpy().astype(np.int64)
    scale_OG = tiles.scale_TGR.transpose(1, 2).flatten(0, 1)[: tiles.num_rows].float().numpy()
    zeros = tiles.zero_point_TGR
    zero_OG = np.full_like(scale_OG, tiles.zero_point)
    if zeros is not None:
        zero_OG = zeros.transpose(1, 2).flatten(0, 1)[: tiles.num_rows].float().numpy()
    ordered = x if held.column_order_I is None else x[:, held.column_order_I]
    x_MI = torch.nn.functional.pad(ordered.float(), (0, codes_OI.shape[1] - x.shape[1])).numpy()
    x_MBL = x_MI.reshape(len(x), -1, 32)
    largest_MB = np.abs(x_MBL).max(-1)
    scale_MB = largest_MB / np.float32(127)
    factor_MB = np.where(largest_MB >= 2.0**-120, np.float32(127) / np.maximum(largest_MB, np.float32(2.0**-120)), 0)
    steps_MBL = np.rint(x_MBL * factor_MB.astype(np.float32)[:, :, None]).astype(np.int64)
    blocks = x_MBL.shape[1] // scale_OG.shape[1]
    results_MO = np.zeros((len(x), tiles.num_rows), np.float32)
    for group in range(scale_OG.shape[1]):
        sums_M1, products_MO = np.zeros((len(x), 1), np.float32), np.zeros_like(results_MO)
        for block in range(group * blocks, (group + 1) * blocks):
            steps_ML, scale_M1 = steps_MBL[:, block], scale_MB[:, block, None]
            sums_M1 = fused(steps_ML.sum(1)[:, None].astype(np.float32), scale_M1, sums_M1)
            whole_MO = steps_ML @ codes_OI[:, block * 32 : block * 32 + 32].T
            products_MO = fused(whole_MO.astype(np.float32), scale_M1, products_MO)
        shifted_MO = fused(-zero_OG[:, group], sums_M1, products_MO)
        results_MO = fused(shifted_MO, scale_OG[:, group], results_MO)
    result = torch.from_numpy(results_MO)
    return (result if bias_O is None else result + bias_O.float()).to(x.dtype)


def random_rows(tokens: int, columns: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return rows whose blocks differ in size by orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.rand(tokens, columns, generator=generator).mul(4).sub(2).exp()
    return (torch.randn(tokens, columns, generator=generator) * sizes).to(dtype)


def run(x: torch.Tensor, held: NativeAffine, *, path: str | None = None, **options: object) -> torch.Tensor:
    return affine_product(x, held.tiles, column_order_I=held.column_order_I, path=path, **options)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize(("rows", "columns", "group_size"), SHAPES)
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 6, 9, 16, 33])
def test_every_path_has_the_bits_of_the_twin(rows: int, columns: int, group_size: int, bits: int, tokens: int) -> None:
    symmetric = (rows + bits) % 2 == 0
    weight = affine_weight(rows, columns, bits=bits, group_size=group_size, symmetric=symmetric, negative=True)
    held = pack_native_affine(weight)
    x, bias_O = random_rows(tokens, columns), torch.randn(rows)
    expected = twin(x, held, bias_O)
    for path in PATHS:
        assert torch.equal(run(x, held, path=path, bias_O=bias_O), expected), path


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 300),
    blocks=st.sampled_from([1, 2, 4, None]),
    bits=st.integers(1, 8),
    symmetric=st.booleans(),
    shuffled=st.booleans(),
    tokens=st.integers(1, 20),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_any_size_order_and_type(
    rows: int,
    columns: int,
    blocks: int | None,
    bits: int,
    symmetric: bool,
    shuffled: bool,
    tokens: int,
    dtype: torch.dtype,
) -> None:
    group_size = -1 if blocks is None else 32 * blocks
    weight = affine_weight(
        rows, columns, bits=bits, group_size=group_size, symmetric=symmetric, shuffled=shuffled and columns % 32 == 0
    )
    held = pack_native_affine(weight)
    assert torch.equal(held.dequantize(), weight.dequantize())
    x = random_rows(tokens, columns, dtype=dtype)
    expected = twin(x, held, None)
    for path in PATHS:
        assert torch.equal(run(x, held, path=path), expected), path


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("tokens", [1, 4, 7, 40])
def test_exact_products_are_those_of_float64(bits: int, tokens: int) -> None:
    weight = affine_weight(75, 416, bits=bits, group_size=32, shuffled=True)
    held = pack_native_affine(weight)
    x, bias_O = random_rows(tokens, 416), torch.randn(75)
    expected = slow_product(x, weight) + bias_O.double()
    size = x.double().abs() @ weight.dequantize().double().abs().T
    for path in PATHS:
        found = run(x, held, path=path, bias_O=bias_O, exact=True)
        assert float(((found.double() - expected).abs() / size).max()) < 1e-6
        assert torch.equal(found, run(x, held, path=PATHS[0], bias_O=bias_O, exact=True))
    found = exact_affine_matmul(x, held, bias_O=bias_O)
    assert float(((found.double() - expected).abs() / size).max()) < 1e-6


@pytest.mark.parametrize("bits", WIDTHS)
def test_rounding_activations_costs_half_a_percent(bits: int) -> None:
    weight = affine_weight(64, 1024, bits=bits, group_size=128, symmetric=True)
    x = torch.randn(8, 1024, generator=torch.Generator().manual_seed(3))
    expected = slow_product(x, weight)
    found = native_affine_matmul(x, pack_native_affine(weight)).double()
    assert float((found - expected).norm() / expected.norm()) < 6e-3


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("exact", [False, True])
def test_a_token_has_the_same_bits_in_every_batch(path: str, exact: bool) -> None:
    held = pack_native_affine(affine_weight(90, 256, bits=4, group_size=64))
    x = random_rows(300, 256)
    together = run(x, held, path=path, exact=exact)
    for some in (slice(0, 1), slice(7, 9), slice(100, 104), slice(30, 90), slice(0, 257)):
        assert torch.equal(run(x[some], held, path=path, exact=exact), together[some])


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("exact", [False, True])
def test_any_number_of_threads_gives_the_same_bits(tokens: int, exact: bool) -> None:
    held = pack_native_affine(affine_weight(1500, 1024, bits=3, group_size=128))
    x = random_rows(tokens, 1024)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(run(x, held, exact=exact))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("path", PATHS)
def test_what_is_not_finite_spoils_its_own_token_only(path: str) -> None:
    held = pack_native_affine(affine_weight(20, 128, bits=4, group_size=64))
    clean = random_rows(6, 128)
    expected = run(clean, held, path=path)
    for place, value in ((3, float("inf")), (70, float("-inf")), (127, float("nan"))):
        x = clean.clone()
        x[2, place] = value
        found = run(x, held, path=path)
        assert found[2].isnan().all()
        others = [0, 1, 3, 4, 5]
        assert torch.equal(found[others], expected[others])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("size", [0.0, 1e-42, 1e-38, 1e-37, 1e-30, 1e30])
def test_very_small_and_large_inputs(path: str, size: float) -> None:
    weight = affine_weight(20, 96, bits=8, group_size=32)
    held = pack_native_affine(weight)
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(1)) * size
    found = run(x, held, path=path)
    assert torch.equal(found, twin(x, held, None))
    # Half a step of the largest input of a row, and zero for what is too small.
    weights = weight.dequantize().double().abs().sum(1)
    limit = (x.double().abs().amax(1, keepdim=True) / 250 + 1e-36) * weights
    assert ((found.double() - slow_product(x, weight)).abs() <= limit).all()


@pytest.mark.parametrize("path", PATHS)
def test_the_largest_codes_do_not_overflow(path: str) -> None:
    weight = affine_weight(16, 64, bits=8, group_size=64, symmetric=True)
    full = replace(weight, codes_OI=torch.full_like(weight.codes_OI, 255), zero_point_OG=weight.zero_point_OG * 0)
    held = pack_native_affine(full)
    for sign in (1.0, -1.0):
        x = torch.full((5, 64), sign)
        assert torch.equal(run(x, held, path=path), twin(x, held, None))


def test_rows_may_be_apart_and_none_may_be_given() -> None:
    held = pack_native_affine(affine_weight(30, 64, bits=4, group_size=32))
    wide = random_rows(4, 200)
    assert torch.equal(run(wide[:, 50:114], held), run(wide[:, 50:114].contiguous(), held))
    assert torch.equal(run(wide[:, ::2][:, :64], held), run(wide[:, ::2][:, :64].contiguous(), held))
    assert run(wide[:0, :64], held).shape == (0, 30)
    assert run(wide[:, :64].reshape(2, 2, 64), held).shape == (2, 2, 30)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_tiles_are_unpacked_again(bits: int) -> None:
    codes_OI = torch.randint(0, 1 << bits, (37, 160), generator=torch.Generator().manual_seed(bits)).to(torch.uint8)
    packed = pack_row_tiles(codes_OI, bits)
    assert packed.shape == (3, 5, bits, 64)
    unpacked = unpack_row_tiles(packed, bits)
    assert torch.equal(unpacked[:37], codes_OI)
    assert not unpacked[37:].any()


def test_scales_that_half_precision_does_not_hold_stay_wide() -> None:
    weight = affine_weight(20, 64, bits=4, group_size=32)
    odd = replace(weight, scale_OG=weight.scale_OG.float() * 1.0001)
    held = pack_native_affine(odd)
    assert held.tiles.scale_TGR.dtype == torch.float32
    x = random_rows(3, 64)
    assert torch.equal(run(x, held), twin(x, held, None))


def stacked_weights(rows: tuple[int, ...], **fields: object) -> list[AffineWeight]:
    return [affine_weight(count, 128, bits=4, group_size=64, seed=seed, **fields) for seed, count in enumerate(rows)]


def test_whole_tiles_are_stacked() -> None:
    parts = [pack_native_affine(weight) for weight in stacked_weights((32, 16, 48))]
    assert all(parts[0].stacks_with(part) for part in parts[1:])
    x = random_rows(6, 128)
    joined = NativeAffine.stacked(parts)
    assert torch.equal(run(x, joined), torch.cat([run(x, part) for part in parts], -1))
    assert joined.nbytes == sum(part.nbytes for part in parts)


def test_what_differs_is_not_stacked() -> None:
    whole, torn = (pack_native_affine(weight) for weight in stacked_weights((32, 20)))
    symmetric = pack_native_affine(stacked_weights((32,), symmetric=True)[0])
    shuffled = pack_native_affine(stacked_weights((32,), shuffled=True)[0])
    assert not any(whole.stacks_with(other) for other in (torn, symmetric, shuffled))
