"""The compiled products with sign planes: the bits of a literal twin, on every path, in every batch, on any threads."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fused_numbers import fused, quantized_blocks, random_rows
from support.packed_binaries import binary_weight, slow_product

from optgptq.binary_weight import BinaryWeight
from optgptq.coefficients import FloatCoefficients
from optgptq.kernels.native_binary import NativeBinary, native_binary_matmul, pack_native_binary
from optgptq.native.binary_products import binary_product
from optgptq.native.products import product_paths
from optgptq.native.row_tiles import unpack_row_tiles

pytestmark = pytest.mark.skipif(not product_paths(), reason="the native library was not built")

PATHS = product_paths()
PLANES = (1, 2, 3, 4)
# Rows, columns and group size: one of each, sizes that fill no tile and no block, several groups and one for a row.
SHAPES = ((1, 1, -1), (1, 200, -1), (33, 1, -1), (16, 32, 32), (37, 96, 32), (50, 384, 128), (17, 2048, 1024))


def twin(x: torch.Tensor, held: NativeBinary, bias_O: torch.Tensor | None) -> torch.Tensor:
    """Return the product, number by number in the order that `source/binary_products_tile.hpp` promises."""
    tiles = held.tiles
    codes_OI = unpack_row_tiles(tiles.codes_TBPX, tiles.num_planes)[: tiles.num_rows].numpy().astype(np.int64)
    alpha_OGP = tiles.alpha_TGPR.permute(0, 3, 1, 2).flatten(0, 1)[: tiles.num_rows].float().numpy()
    offset_OG = tiles.offset_TGR.transpose(1, 2).flatten(0, 1)[: tiles.num_rows].float().numpy()
    ordered = x if held.column_order_I is None else x[:, held.column_order_I]
    x_MI = torch.nn.functional.pad(ordered.float(), (0, codes_OI.shape[1] - x.shape[1])).numpy()
    steps_MBL, scale_MB = quantized_blocks(x_MI)
    blocks = steps_MBL.shape[1] // offset_OG.shape[1]
    results_MO = np.zeros((len(x), tiles.num_rows), np.float32)
    for group in range(offset_OG.shape[1]):
        of_group = range(group * blocks, (group + 1) * blocks)
        sums_M1 = np.zeros((len(x), 1), np.float32)
        for block in of_group:
            sums_M1 = fused(steps_MBL[:, block].sum(1)[:, None].astype(np.float32), scale_MB[:, block, None], sums_M1)
        for plane in range(tiles.num_planes):
            products_MO = np.zeros_like(results_MO)
            for block in of_group:
                bits_OL = codes_OI[:, block * 32 : block * 32 + 32] >> plane & 1
                whole_MO = (steps_MBL[:, block] @ bits_OL.T).astype(np.float32)
                products_MO = fused(whole_MO, scale_MB[:, block, None], products_MO)
            signs_MO = fused(np.float32(2), products_MO, -sums_M1)
            results_MO = fused(alpha_OGP[:, group, plane], signs_MO, results_MO)
        results_MO = fused(offset_OG[:, group], sums_M1, results_MO)
    result = torch.from_numpy(results_MO)
    return (result if bias_O is None else result + bias_O.float()).to(x.dtype)


def run(x: torch.Tensor, held: NativeBinary, *, path: str | None = None, **options: object) -> torch.Tensor:
    return binary_product(x, held.tiles, column_order_I=held.column_order_I, path=path, **options)


@pytest.mark.parametrize("bits", PLANES)
@pytest.mark.parametrize(("rows", "columns", "group_size"), SHAPES)
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 9, 33])
def test_every_path_has_the_bits_of_the_twin(rows: int, columns: int, group_size: int, bits: int, tokens: int) -> None:
    held = pack_native_binary(binary_weight(rows, columns, bits=bits, group_size=group_size))
    x, bias_O = random_rows(tokens, columns), torch.randn(rows)
    expected = twin(x, held, bias_O)
    for path in PATHS:
        assert torch.equal(run(x, held, path=path, bias_O=bias_O), expected), path


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 300),
    blocks=st.sampled_from([1, 2, 4, None]),
    bits=st.integers(1, 4),
    shuffled=st.booleans(),
    tokens=st.integers(1, 20),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_any_size_order_and_type(
    rows: int, columns: int, blocks: int | None, bits: int, shuffled: bool, tokens: int, dtype: torch.dtype
) -> None:
    weight = binary_weight(
        rows, columns, bits=bits, group_size=-1 if blocks is None else 32 * blocks, seed=rows, shuffled=shuffled
    )
    held = pack_native_binary(weight)
    assert torch.equal(held.dequantize(), weight.dequantize())
    x = random_rows(tokens, columns, dtype=dtype)
    expected = twin(x, held, None)
    for path in PATHS:
        assert torch.equal(run(x, held, path=path), expected), path


@pytest.mark.parametrize("bits", PLANES)
def test_rounding_activations_costs_half_a_percent(bits: int) -> None:
    weight = binary_weight(64, 1024, bits=bits, group_size=128)
    x = torch.randn(8, 1024, generator=torch.Generator().manual_seed(3))
    expected = slow_product(x, weight)
    found = native_binary_matmul(x, pack_native_binary(weight)).double()
    assert float((found - expected).norm() / expected.norm()) < 7e-3


@pytest.mark.parametrize("bits", PLANES)
@pytest.mark.parametrize("tokens", [1, 4, 7, 40])
def test_exact_products_are_those_of_float64(bits: int, tokens: int) -> None:
    weight = binary_weight(75, 416, bits=bits, group_size=32, shuffled=True)
    held = pack_native_binary(weight)
    x, bias_O = random_rows(tokens, 416), torch.randn(75)
    expected = slow_product(x, weight) + bias_O.double()
    size = x.double().abs() @ weight.dequantize().double().abs().T + bias_O.abs()
    for path in PATHS:
        found = run(x, held, path=path, bias_O=bias_O, exact=True)
        assert float(((found.double() - expected).abs() / size).max()) < 1e-6
        assert torch.equal(found, run(x, held, path=PATHS[0], bias_O=bias_O, exact=True))


@pytest.mark.parametrize("bits", PLANES)
@pytest.mark.parametrize("path", PATHS)
def test_exact_products_with_units_are_the_weight_to_the_bit(path: str, bits: int) -> None:
    weight = binary_weight(40, 96, bits=bits, group_size=32)
    found = run(torch.eye(96), pack_native_binary(weight), path=path, exact=True)
    assert torch.equal(found.T, weight.dequantize())


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("bits", PLANES)
@pytest.mark.parametrize("exact", [False, True])
def test_a_token_has_the_same_bits_in_every_batch(path: str, bits: int, exact: bool) -> None:
    held = pack_native_binary(binary_weight(50, 256, bits=bits, group_size=64))
    x = random_rows(300, 256)
    together = run(x, held, path=path, exact=exact)
    for some in (slice(0, 1), slice(7, 9), slice(100, 104), slice(30, 90), slice(0, 257)):
        assert torch.equal(run(x[some], held, path=path, exact=exact), together[some])


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("exact", [False, True])
def test_any_number_of_threads_gives_the_same_bits(tokens: int, exact: bool) -> None:
    codes_OI = torch.randint(0, 8, (1500, 1024), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    coefficients = FloatCoefficients(torch.rand(1500, 8, 3), torch.randn(1500, 8))
    held = pack_native_binary(BinaryWeight(codes_OI=codes_OI, coefficients=coefficients, bits=3, group_size=128))
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
@pytest.mark.parametrize("tokens", [4, 6])
def test_what_is_not_finite_spoils_its_own_token_only(path: str, tokens: int) -> None:
    held = pack_native_binary(binary_weight(20, 128, bits=3, group_size=64))
    clean = random_rows(tokens, 128)
    expected = run(clean, held, path=path)
    others = [token for token in range(tokens) if token != 2]
    for place, value in ((3, float("inf")), (70, float("-inf")), (127, float("nan"))):
        x = clean.clone()
        x[2, place] = value
        found = run(x, held, path=path)
        assert found[2].isnan().all()
        assert torch.equal(found[others], expected[others])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("size", [0.0, 1e-42, 1e-38, 1e-37, 1e-30, 1e30])
def test_very_small_and_large_inputs(path: str, size: float) -> None:
    weight = binary_weight(20, 96, bits=4, group_size=32)
    held = pack_native_binary(weight)
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(1)) * size
    found = run(x, held, path=path)
    assert torch.equal(found, twin(x, held, None))
    # Half a step of the largest input of a row, and zero for what is too small.
    alpha_OGP, offset_OG = weight.coefficients.values()
    sizes_O = 32 * (alpha_OGP.double().abs().sum((1, 2)) + offset_OG.double().abs().sum(1))
    limit = (x.double().abs().amax(1, keepdim=True) / 250 + 1e-36) * sizes_O
    assert ((found.double() - slow_product(x, weight)).abs() <= limit).all()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("bits", PLANES)
def test_the_largest_sums_do_not_overflow(path: str, bits: int) -> None:
    weight = binary_weight(16, 64, bits=bits, group_size=64)
    held = pack_native_binary(replace(weight, codes_OI=torch.full_like(weight.codes_OI, (1 << bits) - 1)))
    for sign in (1.0, -1.0):
        x = torch.full((5, 64), sign)
        assert torch.equal(run(x, held, path=path), twin(x, held, None))


def test_rows_may_be_apart_and_none_may_be_given() -> None:
    held = pack_native_binary(binary_weight(30, 64, bits=2, group_size=32))
    wide = random_rows(4, 200)
    assert torch.equal(run(wide[:, 50:114], held), run(wide[:, 50:114].contiguous(), held))
    assert torch.equal(run(wide[:, ::2][:, :64], held), run(wide[:, ::2][:, :64].contiguous(), held))
    assert run(wide[:0, :64], held).shape == (0, 30)
    assert run(wide[:, :64].reshape(2, 2, 64), held).shape == (2, 2, 30)
