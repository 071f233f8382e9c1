"""One group of columns: the compiled paths against torch, which defines them, and what holds for both."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.native_paths import native_paths
from support.problems import problem, random_moment, random_weight

from optgptq.grids.search import ErrorPrice, find_grids
from optgptq.grids.settings import GridSettings
from optgptq.native.library import load_library
from optgptq.solvers import METHODS
from optgptq.solvers.factor import reverse_cholesky
from optgptq.solvers.rounding import (
    RoundedColumns,
    RoundedGroup,
    find_group_grids,
    round_group,
    round_on_grids,
)
from optgptq.solvers.walk import ColumnGrids

SEARCHES = ("minmax", "mse", "hessian", "pivot", "walk")
EVERY_PATH = native_paths()


def grid_of(**changes: Any) -> GridSettings:
    return GridSettings(**{"bits": 4, "symmetric": False, "group_size": -1, "search": "walk", **changes})


def group(num_columns: int, num_rows: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Return weight and pending sums `[L, O]` and a block of the factor, with a row of zeros and a dead column."""
    moment_LL = random_moment(num_columns, seed=seed)
    dead = num_columns // 2
    moment_LL[dead] = moment_LL[:, dead] = 0
    moment_LL[dead, dead] = 1
    upper_LL = reverse_cholesky(moment_LL, damp=0.01 * float(moment_LL.diagonal().mean()))
    assert upper_LL is not None
    weight_LO = random_weight(num_rows, num_columns, seed=seed).T.contiguous()
    generator = torch.Generator().manual_seed(seed)
    pending_LO = 0.1 * torch.randn(num_columns, num_rows, generator=generator, dtype=torch.float64)
    weight_LO[:, num_rows // 3] = pending_LO[:, num_rows // 3] = 0
    return [part.to(dtype) for part in (weight_LO, pending_LO, upper_LL)]


def assert_same(found: RoundedGroup | RoundedColumns, expected: RoundedGroup | RoundedColumns) -> None:
    assert torch.equal(found.codes_LO, expected.codes_LO)
    assert torch.equal(found.clipped_O, expected.clipped_O)
    torch.testing.assert_close(found.error_LO, expected.error_LO, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.weighted_LO, expected.weighted_LO, rtol=1e-9, atol=1e-9)
    if isinstance(expected, RoundedGroup):
        assert isinstance(found, RoundedGroup)
        assert torch.equal(found.scale_O, expected.scale_O)
        assert torch.equal(found.zero_point_O, expected.zero_point_O)


@pytest.mark.parametrize("path", EVERY_PATH)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("search", SEARCHES)
def test_every_path_gives_the_codes_of_torch(path: Any, search: str, symmetric: bool) -> None:
    for bits, num_columns, num_rows in [(2, 16, 9), (3, 13, 33), (4, 130, 17), (8, 31, 40), (4, 1, 5), (2, 37, 1)]:
        grid = grid_of(bits=bits, symmetric=symmetric, search=search, smallest_zero_point=bits % 2)
        parts = group(num_columns, num_rows, seed=bits)
        expected = round_group(*parts, grid, column_block=16, backend="torch")
        assert_same(round_group(*parts, grid, column_block=16, backend=path), expected)


@pytest.mark.parametrize("path", EVERY_PATH)
def test_long_groups_give_the_codes_of_torch(path: Any) -> None:
    parts = group(515, 18)
    expected = round_group(*parts, grid_of(), column_block=16, backend="torch")
    assert_same(round_group(*parts, grid_of(), column_block=16, backend=path), expected)


@pytest.mark.parametrize("path", EVERY_PATH)
@settings(deadline=None, max_examples=25)
@given(
    num_columns=st.integers(1, 40),
    num_rows=st.integers(1, 40),
    bits=st.sampled_from([2, 3, 4, 8]),
    symmetric=st.booleans(),
    size=st.sampled_from([1e-9, 1e-6, 1e-3, 1.0, 1e4]),
    seed=st.integers(0, 1000),
)
def test_weights_of_any_size_give_the_codes_of_torch(
    path: Any, num_columns: int, num_rows: int, bits: int, symmetric: bool, size: float, seed: int
) -> None:
    """Small ones have subnormal scales in float16, the largest overflow it.

    Two grids may have the same levels under other codes; then the last bit of their costs decides.
    """
    weight_LO, pending_LO, upper_LL = group(num_columns, num_rows, seed=seed)
    grid = grid_of(bits=bits, symmetric=symmetric)
    parts = weight_LO * size, pending_LO * size, upper_LL
    expected = round_group(*parts, grid, column_block=16, backend="torch")
    found = round_group(*parts, grid, column_block=16, backend=path)
    torch.testing.assert_close(found.error_LO / size, expected.error_LO / size, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(found.weighted_LO / size, expected.weighted_LO / size, rtol=1e-9, atol=1e-9)
    alike_O = (found.scale_O == expected.scale_O) & (found.zero_point_O == expected.zero_point_O)
    assert torch.equal(found.clipped_O[alike_O], expected.clipped_O[alike_O])
    assert torch.equal(found.codes_LO[:, alike_O], expected.codes_LO[:, alike_O])


@pytest.mark.parametrize("path", EVERY_PATH)
def test_rows_that_do_not_lie_side_by_side_and_unaligned_ones_are_read_right(path: Any) -> None:
    weight_LO, pending_LO, upper_LL = group(20, 35)
    expected = round_group(weight_LO, pending_LO, upper_LL, grid_of(), column_block=16, backend="torch")
    wide_II, around_LO = torch.full((23, 27), 9.0, dtype=torch.float64), torch.full((21, 40), 9.0, dtype=torch.float64)
    wide_II[3:, 1:21], around_LO[1:, 3:38] = upper_LL, pending_LO
    transposed_LO = weight_LO.T.contiguous().T
    before = around_LO.clone()
    found = round_group(transposed_LO, around_LO[1:, 3:38], wide_II[3:, 1:21], grid_of(), column_block=16, backend=path)
    assert_same(found, expected)
    assert torch.equal(around_LO, before)


@pytest.mark.parametrize("path", EVERY_PATH)
def test_given_grids_are_walked_alike(path: Any) -> None:
    weight_LO, pending_LO, upper_LL = group(26, 19)
    scale_GO = 0.1 + torch.rand(3, 19, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grids = ColumnGrids(
        scale_GR=scale_GO * torch.tensor([[1.0], [-1.0], [1.0]]),
        zero_point_GR=torch.tensor([[8.0], [7.0], [0.0]], dtype=torch.float64).expand(3, 19),
        grid_of_column=[column % 3 for column in range(26)],
        max_code=15,
    )
    before = pending_LO.clone()
    expected = round_on_grids(weight_LO, pending_LO, upper_LL, grids, column_block=7, backend="torch")
    assert_same(round_on_grids(weight_LO, pending_LO, upper_LL, grids, column_block=7, backend=path), expected)
    assert torch.equal(pending_LO, before)


@pytest.mark.parametrize("path", EVERY_PATH)
@pytest.mark.parametrize("search", SEARCHES)
def test_searches_without_a_walk_find_the_grids_of_torch(path: Any, search: str) -> None:
    for symmetric in (True, False):
        columns_LO, _, upper_LL = group(24, 50)
        price = ErrorPrice(upper_LL.diagonal().square(), upper_LL @ upper_LL.T)
        grid = grid_of(search=search, symmetric=symmetric, group_grids="static")
        scale_KO, zero_point_KO = find_grids(columns_LO, price, grid, count=1)
        # As `rtn` hands them over: rows of the matrix are columns of the weight.
        scale_O, zero_point_O = find_group_grids(columns_LO.T.contiguous().T, price, grid, backend=path)
        assert torch.equal(scale_O, scale_KO[0])
        assert torch.equal(zero_point_O, zero_point_KO[0])


@pytest.mark.parametrize("path", EVERY_PATH)
@pytest.mark.parametrize("search", ["pivot", "walk"])
def test_float32_loses_as_much_as_torch_does(path: Any, search: str) -> None:
    parts = group(128, 300, dtype=torch.float32)
    for bits in (2, 4):
        grid = grid_of(bits=bits, search=search)
        found, expected = (round_group(*parts, grid, column_block=16, backend=who) for who in (path, "torch"))
        assert float(found.weighted_LO.square().sum()) == pytest.approx(
            float(expected.weighted_LO.square().sum()), rel=1e-3
        )
        assert float((found.codes_LO != expected.codes_LO).double().mean()) < 0.02


@pytest.fixture
def threads_of_torch() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads_of_torch")
@pytest.mark.parametrize("path", EVERY_PATH)
def test_the_number_of_threads_changes_no_bit(path: Any) -> None:
    parts = group(128, 400, dtype=torch.float32)
    results = []
    for num_threads in (1, 2, 5):
        torch.set_num_threads(num_threads)
        results.append(round_group(*parts, grid_of(), column_block=16, backend=path))
    for result in results[1:]:
        assert torch.equal(result.weighted_LO, results[0].weighted_LO)
        assert torch.equal(result.codes_LO, results[0].codes_LO)
        assert torch.equal(result.scale_O, results[0].scale_O)


@pytest.mark.parametrize("path", ["torch", *EVERY_PATH])
def test_no_rows_are_no_work(path: Any) -> None:
    parts = group(12, 3)
    empty = round_group(parts[0][:, :0], parts[1][:, :0], parts[2], grid_of(), column_block=16, backend=path)
    assert empty.codes_LO.shape == (12, 0)
    assert empty.scale_O.shape == (0,)


def test_the_torch_path_is_the_default_where_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = group(12, 5)
    expected = round_group(*parts, grid_of(), column_block=16, backend="torch")
    monkeypatch.setattr("optgptq.native.group.load_library", lambda: None)
    assert_same(round_group(*parts, grid_of(), column_block=16), expected)
    with pytest.raises(ValueError, match="the native path avx2 is not there"):
        round_group(*parts, grid_of(), column_block=16, backend="avx2")


def test_bfloat16_is_no_arithmetic_of_the_compiled_paths() -> None:
    if load_library() is None:
        pytest.skip("the compiled inner loops are not built")
    parts = group(12, 5, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="the native path portable is not there"):
        round_group(*parts, grid_of(), column_block=16, backend="portable")


@pytest.mark.parametrize("path", ["torch", *EVERY_PATH])
def test_weighted_errors_are_the_errors_by_the_factor_with_what_was_pending(path: Any) -> None:
    weight_LO, pending_LO, upper_LL = group(29, 18)
    rounded = round_group(weight_LO, pending_LO, upper_LL, grid_of(bits=3), column_block=16, backend=path)
    level_LO = rounded.scale_O * (rounded.codes_LO - rounded.zero_point_O)
    torch.testing.assert_close(rounded.error_LO, weight_LO - level_LO, rtol=1e-12, atol=1e-12)
    weighted_LO = pending_LO + upper_LL.T @ rounded.error_LO
    torch.testing.assert_close(rounded.weighted_LO, weighted_LO, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("path", EVERY_PATH)
@pytest.mark.parametrize("group_grids", ["dynamic", "static"])
@pytest.mark.parametrize("solver", ["gptq", "rtn"])
def test_whole_solves_agree_with_torch(path: Any, group_grids: str, solver: str) -> None:
    for search in ("pivot", "walk"):
        base = {"bits": 3, "symmetric": False, "group_size": 24, "search": search, "group_grids": group_grids}
        native, reference = (
            METHODS[solver].solver(problem(random_weight(21, 96), random_moment(96), backend=who, **base))
            for who in (path, "torch")
        )
        assert torch.equal(native.weight.codes_OI, reference.weight.codes_OI)
        assert torch.equal(native.weight.scale_OG, reference.weight.scale_OG)
        assert torch.equal(native.row_clipped_O, reference.row_clipped_O)
        torch.testing.assert_close(native.row_loss_O, reference.row_loss_O, rtol=1e-8, atol=1e-12)
