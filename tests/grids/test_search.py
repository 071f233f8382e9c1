"""The search for the range of a group."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.problems import random_moment, random_weight
from support.slow_gptq import slow_minmax

from optgptq.grids import search as search_module
from optgptq.grids.affine import nearest_codes
from optgptq.grids.search import ErrorPrice, find_grids
from optgptq.grids.settings import GridSettings

SEARCHES = ("mse", "hessian", "pivot", "walk")
BITS = (2, 3, 4, 8)


def settings(**changes: Any) -> GridSettings:
    return GridSettings(**{"bits": 4, "symmetric": True, "group_size": -1, "search": "mse", **changes})


def price(num_columns: int, *, seed: int = 0) -> ErrorPrice:
    upper_LL = torch.linalg.cholesky(random_moment(num_columns, seed=seed)).T.flip(0, 1)
    return ErrorPrice(upper_LL.diagonal().square(), upper_LL @ upper_LL.T)


def cost(
    columns_LO: torch.Tensor, grid: GridSettings, cost_of: ErrorPrice, scale_O: torch.Tensor, zero_point_O: torch.Tensor
) -> torch.Tensor:
    """Return the price `[O]` of the nearest codes under the price that the search of `grid` says it uses."""
    codes_LO, _ = nearest_codes(columns_LO, scale_O, zero_point_O, grid.max_code)
    error_LO = columns_LO - scale_O * (codes_LO - zero_point_O)
    if grid.search == "hessian":
        return ((cost_of.matrix_LL @ error_LO) * error_LO).sum(dim=0)
    weight_L = torch.ones(columns_LO.shape[0]) if grid.search == "mse" else cost_of.diagonal_L
    return (weight_L[:, None] * error_LO.square()).sum(dim=0)


def best(columns_LO: torch.Tensor, grid: GridSettings, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    scale_KO, zero_point_KO = find_grids(columns_LO, price(columns_LO.shape[0], seed=seed), grid, count=1)
    return scale_KO[0], zero_point_KO[0]


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_a_search_is_never_worse_than_the_full_range_under_its_own_price(
    search: str, symmetric: bool, bits: int
) -> None:
    for seed in range(3):
        columns_LO = random_weight(200, 24, seed=seed).T
        grid = settings(bits=bits, symmetric=symmetric, search=search)
        full = settings(bits=bits, symmetric=symmetric, search="minmax")
        cost_of = price(24, seed=seed)
        searched_O = cost(columns_LO, grid, cost_of, *best(columns_LO, grid, seed))
        full_O = cost(columns_LO, grid, cost_of, *best(columns_LO, full, seed))
        assert bool((searched_O <= full_O * (1 + 1e-12)).all())
        assert float(searched_O.sum()) < float(full_O.sum())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_the_full_range_by_hand(symmetric: bool, bits: int) -> None:
    columns_LO = random_weight(20, 17).T
    expected = slow_minmax(columns_LO.T, bits=bits, symmetric=symmetric)
    found = best(columns_LO, settings(bits=bits, symmetric=symmetric, search="minmax"))
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_candidates_come_in_the_order_of_their_price(search: str, symmetric: bool) -> None:
    columns_LO = random_weight(30, 16).T
    grid, cost_of = settings(bits=3, symmetric=symmetric, search=search), price(16)
    scale_KO, zero_point_KO = find_grids(columns_LO, cost_of, grid, count=4)
    assert scale_KO.shape == zero_point_KO.shape == (4, 30)
    costs_KO = torch.stack(
        [cost(columns_LO, grid, cost_of, *pair) for pair in zip(scale_KO, zero_point_KO, strict=True)]
    )
    assert bool((costs_KO.diff(dim=0) >= -1e-9).all())
    # Two grids may cost the same: the cost is compared and not the grid.
    torch.testing.assert_close(cost(columns_LO, grid, cost_of, *best(columns_LO, grid)), costs_KO[0])


@pytest.mark.parametrize("search", ["minmax", *SEARCHES])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("smallest", [0, 1])
def test_every_grid_can_be_stored(search: str, symmetric: bool, smallest: int) -> None:
    columns_LO = torch.cat([random_weight(50, 20), random_weight(50, 20).abs(), -random_weight(50, 20).abs()]).T
    for bits in BITS:
        grid = settings(bits=bits, symmetric=symmetric, search=search, smallest_zero_point=smallest)
        scale_KO, zero_point_KO = find_grids(columns_LO, price(20), grid, count=4)
        assert torch.equal(scale_KO.to(torch.float16).to(torch.bfloat16).double(), scale_KO)
        assert bool((scale_KO != 0).all())
        if symmetric:
            assert bool((zero_point_KO == 2 ** (bits - 1)).all())
        else:
            assert bool((scale_KO > 0).all())
            assert smallest <= int(zero_point_KO.min()) <= int(zero_point_KO.max()) <= 2**bits - 1
            assert torch.equal(zero_point_KO.round(), zero_point_KO)


@pytest.mark.parametrize("search", ["minmax", *SEARCHES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_of_zeros_get_the_smallest_scale_and_stay_zeros(search: str, dtype: torch.dtype, symmetric: bool) -> None:
    columns_LO = torch.zeros(16, 3, dtype=dtype)
    cost_of = ErrorPrice(price(16).diagonal_L.to(dtype), price(16).matrix_LL.to(dtype))
    grid = settings(search=search, symmetric=symmetric)
    scale_KO, zero_point_KO = find_grids(columns_LO, cost_of, grid, count=2)
    assert scale_KO.dtype == dtype
    assert bool((scale_KO.abs() == 2.0**-24).all())
    codes_LO, _ = nearest_codes(columns_LO, scale_KO[0], zero_point_KO[0], grid.max_code)
    assert torch.equal(codes_LO, zero_point_KO[0].expand(16, -1))


@pytest.mark.parametrize("search", ["minmax", *SEARCHES])
@pytest.mark.parametrize("value", [0.37, -0.37, 1e-3, -200.0])
@pytest.mark.parametrize("symmetric", [True, False])
def test_constant_rows_keep_their_value(search: str, value: float, symmetric: bool) -> None:
    columns_LO = torch.full((16, 1), value, dtype=torch.float64)
    grid = settings(search=search, symmetric=symmetric)
    scale_O, zero_point_O = best(columns_LO, grid)
    codes_LO, _ = nearest_codes(columns_LO, scale_O, zero_point_O, grid.max_code)
    error = float((columns_LO - scale_O * (codes_LO - zero_point_O)).abs().max())
    # The full symmetric range has no level at its end: half a step of 2 / 15 of the value is lost there.
    assert error <= abs(value) * (0.07 if search == "minmax" else 0.005)


@pytest.mark.parametrize("search", SEARCHES)
def test_a_single_outlier_is_clipped_where_that_is_cheaper(search: str) -> None:
    columns_LO = random_weight(1, 128, seed=3).T.clamp(-1, 1)
    columns_LO[5] = 6.0
    grid = settings(bits=2, symmetric=False, search=search)
    full_scale_O, _ = best(columns_LO, settings(bits=2, symmetric=False, search="minmax"))
    moment = ErrorPrice(torch.ones(128, dtype=torch.float64), torch.eye(128, dtype=torch.float64))
    scale_KO, zero_point_KO = find_grids(columns_LO, moment, grid, count=1)
    assert float(scale_KO[0]) < 0.8 * float(full_scale_O)
    codes_LO, endless_LO = nearest_codes(columns_LO, scale_KO[0], zero_point_KO[0], 3)
    assert int(endless_LO[5]) > 3 == int(codes_LO[5])


def test_two_bit_symmetric_grids_turn_around_where_the_extra_level_is_needed() -> None:
    positive_L = torch.tensor([2.0, 1.0, 0.0, -1.0, 2.0, 1.0, 2.0, -1.0], dtype=torch.float64)
    columns_LO = torch.stack([positive_L, -positive_L], dim=1)
    for search in SEARCHES:
        scale_O, zero_point_O = best(columns_LO, settings(bits=2, search=search))
        assert float(scale_O[0]) < 0 < float(scale_O[1])
        codes_LO, _ = nearest_codes(columns_LO, scale_O, zero_point_O, 3)
        torch.testing.assert_close(scale_O * (codes_LO - zero_point_O), columns_LO, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("search", ["minmax", *SEARCHES])
@pytest.mark.parametrize("tile", [24, 24 * 7, 1 << 30])
def test_tiles_do_not_change_the_result(search: str, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    columns_LO = random_weight(15, 24).T
    for symmetric in (True, False):
        grid = settings(bits=3, symmetric=symmetric, search=search)
        expected = find_grids(columns_LO, price(24), grid, count=3)
        with monkeypatch.context() as patch:
            patch.setattr(search_module, "_TILE", tile)
            found = find_grids(columns_LO, price(24), grid, count=3)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])


def test_inputs_are_left_as_they_are() -> None:
    columns_LO, cost_of = random_weight(6, 16).T, price(16)
    before = columns_LO.clone(), cost_of.diagonal_L.clone(), cost_of.matrix_LL.clone()
    for search in SEARCHES:
        find_grids(columns_LO, cost_of, settings(search=search), count=2)
    assert torch.equal(columns_LO, before[0])
    assert torch.equal(cost_of.diagonal_L, before[1])
    assert torch.equal(cost_of.matrix_LL, before[2])


def test_settings_derive_the_grid() -> None:
    grid = settings(bits=3)
    assert (grid.max_code, grid.symmetric_zero_point) == (7, 4)
