"""Compiled loops for binary codes against torch, which defines them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.native_paths import native_paths
from support.problems import problem, random_moment, random_weight

from optgptq.grids.binary_settings import BinarySettings
from optgptq.grids.codebook import codebook
from optgptq.native.library import load_library
from optgptq.solvers import LayerProblem
from optgptq.solvers.binary import solve
from optgptq.solvers.binary_codes import find_codes, price_shapes
from optgptq.solvers.binary_group import CodedGroup, code_group
from optgptq.solvers.binary_sweep import ImprovedGroup, improve_group
from optgptq.solvers.factor import reverse_cholesky
from optgptq.solvers.levels import half_precision, nearest_error, shape_table, sign_table

EVERY_PATH = native_paths()
FACTORS = BinarySettings().factors


@pytest.fixture
def threads_of_torch() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def random_codes(num_columns: int, num_rows: int, num_levels: int, *, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, num_levels, (num_columns, num_rows), generator=generator, dtype=torch.uint8)


def random_table(bits: int, num_rows: int, *, is_shape: bool, seed: int) -> torch.Tensor:
    like = torch.zeros((), dtype=torch.float64)
    if not is_shape:
        return sign_table(bits, like)
    generator = torch.Generator().manual_seed(seed)
    return shape_table(torch.randint(1, 20, (bits, num_rows), generator=generator).to(torch.float64))


def starts(bits: int, num_rows: int, count: int, *, is_shape: bool, seed: int) -> list[torch.Tensor]:
    num_coefficients = 2 if is_shape else bits + 1
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(count, num_coefficients, num_rows, generator=generator, dtype=torch.float64))


def upper_factor(num_columns: int, seed: int) -> torch.Tensor:
    upper_LL = reverse_cholesky(random_moment(num_columns, seed=seed), damp=0.01)
    assert upper_LL is not None
    return upper_LL


def assert_same_group(found: CodedGroup, expected: CodedGroup) -> None:
    assert torch.equal(found.codes_LO, expected.codes_LO)
    assert torch.equal(found.coefficient_BO, expected.coefficient_BO)
    assert torch.equal(found.error_LO, expected.error_LO)
    torch.testing.assert_close(found.weighted_LO, expected.weighted_LO, rtol=1e-9, atol=1e-11)


def assert_same_step(found: ImprovedGroup, expected: ImprovedGroup) -> None:
    assert torch.equal(found.codes_LO, expected.codes_LO)
    assert torch.equal(found.coefficient_BO, expected.coefficient_BO)
    torch.testing.assert_close(found.change_LO, expected.change_LO, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("path", EVERY_PATH)
@settings(deadline=None, max_examples=12)
@given(
    num_rows=st.integers(1, 40),
    num_columns=st.integers(1, 60),
    widths=st.sampled_from([(1, 2), (1, 5), (2, 3), (2, 4), (2, 5), (3, 4), (4, 5)]),
    size=st.sampled_from([1e-6, 1e-2, 1.0, 1e4]),
    seed=st.integers(0, 1000),
)
def test_every_path_finds_the_codes_of_torch(
    path: Any, num_rows: int, num_columns: int, widths: tuple[int, int], size: float, seed: int
) -> None:
    columns_LO = size * random_weight(num_columns, num_rows, seed=seed)
    columns_LO[:, num_rows // 2] = 0
    columns_LO[:, num_rows // 3] = size
    price_L = random_weight(1, num_columns, seed=seed + 1)[0].square()
    expected = find_codes(columns_LO, price_L, codebook(*widths), FACTORS[::3], backend="torch")
    found = find_codes(columns_LO, price_L, codebook(*widths), FACTORS[::3], backend=path)
    assert torch.equal(found.index_O, expected.index_O)
    assert torch.equal(found.scale_O, expected.scale_O)
    assert torch.equal(found.zero_O, expected.zero_O)
    room = 1e-10 * float((price_L.sum() * expected.scale_O.square()).max()) * codebook(*widths).max_number ** 2
    torch.testing.assert_close(found.cost_O, expected.cost_O, rtol=1e-9, atol=room)


@pytest.mark.parametrize("path", EVERY_PATH)
@settings(deadline=None, max_examples=12)
@given(
    num_rows=st.integers(1, 40),
    num_columns=st.integers(1, 60),
    widths=st.sampled_from([(1, 2), (1, 5), (2, 3), (2, 4), (3, 4), (3, 5), (4, 5)]),
    size=st.sampled_from([1e-6, 1.0, 1e4]),
    seed=st.integers(0, 1000),
)
def test_every_path_prices_shapes_and_searches_given_ones_as_torch(
    path: Any, num_rows: int, num_columns: int, widths: tuple[int, int], size: float, seed: int
) -> None:
    codes, columns_LO = codebook(*widths), size * random_weight(num_columns, num_rows, seed=seed)
    columns_LO[:, num_rows // 2] = 0
    price_L = random_weight(1, num_columns, seed=seed + 1)[0].square()
    shape_O = torch.randint(0, len(codes.steps_SP), (num_rows,), generator=torch.Generator().manual_seed(seed))
    expected, found = (
        find_codes(columns_LO, price_L, codes, FACTORS[::3], shape_O=shape_O, backend=backend)
        for backend in ("torch", path)
    )
    assert torch.equal(found.index_O, expected.index_O)
    assert torch.equal(found.scale_O, expected.scale_O)
    assert torch.equal(found.zero_O, expected.zero_O)
    room = 1e-10 * float((price_L.sum() * expected.scale_O.square()).max()) * codes.max_number**2
    torch.testing.assert_close(found.cost_O, expected.cost_O, rtol=1e-9, atol=room)
    expected_SO, found_SO = (
        price_shapes(columns_LO, price_L, codes, FACTORS[::3], backend=backend) for backend in ("torch", path)
    )
    torch.testing.assert_close(found_SO, expected_SO, rtol=1e-9, atol=room)


@pytest.mark.parametrize("path", EVERY_PATH)
@pytest.mark.parametrize(("bits", "intermediate_bits"), [(2, 4), (3, 5)])
def test_float32_finds_codes_that_cost_the_same(path: Any, bits: int, intermediate_bits: int) -> None:
    columns_LO, price_L = random_weight(128, 70).float(), random_weight(1, 128)[0].square().float()
    codes = codebook(bits, intermediate_bits)
    expected = find_codes(columns_LO, price_L, codes, FACTORS, backend="torch")
    found = find_codes(columns_LO, price_L, codes, FACTORS, backend=path)
    torch.testing.assert_close(found.cost_O, expected.cost_O, rtol=5e-4, atol=0)
    exact = find_codes(columns_LO.double(), price_L.double(), codes, FACTORS, backend=path)
    torch.testing.assert_close(found.cost_O.double(), exact.cost_O, rtol=5e-4, atol=0)
    is_other_O = (found.index_O != expected.index_O) | (found.scale_O != expected.scale_O)
    assert int(is_other_O.sum()) < 10


@pytest.mark.parametrize("path", EVERY_PATH)
@settings(deadline=None, max_examples=12)
@given(
    num_rows=st.integers(1, 40),
    num_columns=st.integers(1, 45),
    bits=st.integers(1, 4),
    is_shape=st.booleans(),
    count=st.integers(1, 3),
    refits=st.integers(0, 3),
    seed=st.integers(0, 1000),
)
def test_every_path_walks_and_fits_as_torch(
    path: Any, num_rows: int, num_columns: int, bits: int, is_shape: bool, count: int, refits: int, seed: int
) -> None:
    weight_LO = random_weight(num_columns, num_rows, seed=seed)
    pending_LO = 0.3 * random_weight(num_columns, num_rows, seed=seed + 1)
    weight_LO[:, num_rows // 2], pending_LO[:, num_rows // 2] = 0, 0
    upper_LL, table_KBO = upper_factor(num_columns, seed), random_table(bits, num_rows, is_shape=is_shape, seed=seed)
    begin = starts(bits, num_rows, count, is_shape=is_shape, seed=seed)
    expected, found = (
        code_group(
            weight_LO, pending_LO, upper_LL, table_KBO, starts=begin, refits=refits, column_block=16, backend=backend
        )
        for backend in ("torch", path)
    )
    assert_same_group(found, expected)


@pytest.mark.parametrize("path", EVERY_PATH)
@settings(deadline=None, max_examples=12)
@given(
    num_rows=st.integers(1, 40),
    num_columns=st.integers(1, 45),
    bits=st.integers(1, 4),
    is_shape=st.booleans(),
    in_units=st.booleans(),
    forced=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_every_path_improves_as_torch(
    path: Any, num_rows: int, num_columns: int, bits: int, is_shape: bool, in_units: bool, forced: bool, seed: int
) -> None:
    moment_II = random_moment(num_columns + 9, seed=seed)
    moment_II[3], moment_II[:, 3] = 0, 0
    moment_LL = moment_II[2 : num_columns + 2, 2 : num_columns + 2]
    gradient_LO = moment_II[2 : num_columns + 2] @ random_weight(num_columns + 9, num_rows, seed=seed)
    codes_LO = random_codes(num_columns, num_rows, 1 << bits, seed=seed)
    table_KBO = random_table(bits, num_rows, is_shape=is_shape, seed=seed)
    coefficient_BO = half_precision(starts(bits, num_rows, 1, is_shape=is_shape, seed=seed)[0])
    unit_O = half_precision(random_weight(1, num_rows, seed=seed)[0].abs() / 50 + 1e-3) if in_units else None
    group = (gradient_LO, moment_LL, codes_LO, coefficient_BO, table_KBO)
    expected = improve_group(*group, unit_O=unit_O, forced=forced, backend="torch")
    assert_same_step(improve_group(*group, unit_O=unit_O, forced=forced, backend=path), expected)


@pytest.mark.parametrize("path", EVERY_PATH)
@pytest.mark.parametrize("value", [0.0, 1e-9, 3e-8, 6e-5, 6.2e-5, 0.1, 1.0, 2049.0, 65519.0, 65521.0, 1e6, 1e30])
def test_coefficients_are_rounded_as_float16(path: Any, value: float) -> None:
    """A start that is walked and not fitted comes back rounded."""
    start_BO = torch.tensor([[value], [-value]], dtype=torch.float64)
    zeros = torch.zeros(1, 1, dtype=torch.float64)
    table_KBO = sign_table(1, start_BO)
    coded = code_group(zeros, zeros, zeros + 1, table_KBO, starts=[start_BO], refits=0, column_block=1, backend=path)
    assert torch.equal(coded.coefficient_BO, half_precision(start_BO))


@pytest.mark.parametrize("path", EVERY_PATH)
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_every_path_finds_the_nearest_levels(path: Any, bits: int) -> None:
    weight_LO, level_KO = random_weight(13, 37), random_weight(1 << bits, 37, seed=1)
    level_KO[:, 5] = 0.25
    expected = nearest_error(weight_LO, level_KO, backend="torch")
    assert torch.equal(nearest_error(weight_LO, level_KO, backend=path), expected)


def layer(num_rows: int, num_columns: int, group_size: int, bits: int, **binary: Any) -> LayerProblem:
    weight_OI, moment_II = random_weight(num_rows, num_columns), random_moment(num_columns)
    weight_OI[num_rows // 3] = 0
    moment_II[5], moment_II[:, 5] = 0, 0
    case = problem(weight_OI, moment_II, bits=bits, group_size=group_size, symmetric=False, order="group_aware")
    return replace(case, binary=BinarySettings(**binary))


@pytest.mark.parametrize("path", EVERY_PATH)
@pytest.mark.parametrize(
    ("bits", "group_size", "binary"),
    [
        (1, 32, {"intermediate_bits": 3, "uniform_start": False}),
        (2, 32, {}),
        (2, 96, {"coefficients": "float", "weighting": "none"}),
        (2, -1, {"coefficients": "steps"}),
        (2, 32, {"coefficients": "steps", "uniform_start": False}),
        (3, 32, {"coefficients": "steps", "intermediate_bits": 5}),
        (3, 32, {"intermediate_bits": 5}),
        (4, 48, {"intermediate_bits": 5, "weighting": "diagonal"}),
    ],
)
def test_a_whole_solution_is_that_of_torch(path: Any, bits: int, group_size: int, binary: Any) -> None:
    case = layer(21, 96, group_size, bits, **binary)
    found, expected = (
        solve(replace(case, settings=replace(case.settings, backend=backend))) for backend in (path, "torch")
    )
    assert torch.equal(found.weight.dequantize(), expected.weight.dequantize())
    torch.testing.assert_close(found.row_loss_O, expected.row_loss_O, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.row_rtn_loss_O, expected.row_rtn_loss_O, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("path", EVERY_PATH)
@pytest.mark.parametrize("bits", [2, 3])
def test_float32_loses_what_it_loses_in_torch(path: Any, bits: int) -> None:
    case = layer(90, 256, 128, bits)
    settings_32 = replace(case.settings, dtype=torch.float32)
    found, expected = (
        solve(replace(case, settings=replace(settings_32, backend=backend))).loss for backend in (path, "torch")
    )
    assert found == pytest.approx(expected, rel=5e-3)


@pytest.mark.usefixtures("threads_of_torch")
def test_neither_threads_nor_the_rows_beside_a_row_change_a_bit() -> None:
    if load_library() is None:
        pytest.skip("the compiled inner loops are not built")
    weight_LO, upper_LL = random_weight(128, 300).float(), upper_factor(128, 0).float()
    pending_LO, moment_LL = 0.2 * random_weight(128, 300, seed=1).float(), random_moment(128).float()
    table_KBO, codes = sign_table(3, weight_LO), codebook(3, 5)
    results = []
    for num_threads, rows in [(1, slice(None)), (2, slice(None)), (3, slice(None)), (1, slice(100, 105))]:
        torch.set_num_threads(num_threads)
        weight_LR, pending_LR = weight_LO[:, rows], pending_LO[:, rows]
        found = find_codes(weight_LR, upper_LL.diagonal().square(), codes, FACTORS)
        alpha_PR, offset_R = found.coefficients(codes)
        begin = [torch.cat([alpha_PR, offset_R[None]])]
        coded = code_group(weight_LR, pending_LR, upper_LL, table_KBO, starts=begin, refits=2, column_block=16)
        group = (weight_LR, moment_LL, coded.codes_LO, coded.coefficient_BO, table_KBO)
        better = improve_group(*group, unit_O=None, forced=False)
        results.append(
            [found.index_O, found.cost_O, coded.codes_LO, coded.weighted_LO, better.coefficient_BO, better.change_LO]
        )
    alone = results[0]
    assert all(torch.equal(one, other) for result in results[1:3] for one, other in zip(result, alone, strict=True))
    few = [values[..., 100:105] for values in alone]
    assert all(torch.equal(one, other) for one, other in zip(results[3], few, strict=True))
