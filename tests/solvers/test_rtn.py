"""Rounding to nearest: nothing is compensated, the moment prices the search and the loss."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.problems import problem, random_moment, random_weight
from support.slow_gptq import slow_minmax

from optgptq.solvers import METHODS
from optgptq.solvers.rtn import round_to_nearest

rtn = METHODS["rtn"].solver


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_minmax_rounding_by_hand(bits: int, symmetric: bool) -> None:
    weight_OI = random_weight(5, 39)
    solution = rtn(problem(weight_OI, random_moment(39), bits=bits, symmetric=symmetric, group_size=13))
    for group in range(3):
        columns_OL = weight_OI[:, 13 * group : 13 * group + 13]
        scale_O, zero_point_O = slow_minmax(columns_OL, bits=bits, symmetric=symmetric)
        codes_OL = ((columns_OL / scale_O[:, None]).round() + zero_point_O[:, None]).clamp(0, 2**bits - 1)
        assert torch.equal(solution.weight.scale_OG[:, group].double(), scale_O)
        assert torch.equal(solution.weight.zero_point_OG[:, group].double(), zero_point_O)
        assert torch.equal(solution.weight.codes_OI[:, 13 * group : 13 * group + 13], codes_OL.to(torch.uint8))


def test_order_damping_and_group_grids_mean_nothing() -> None:
    case = problem(random_weight(6, 48), random_moment(48), bits=3, group_size=16, search="hessian")
    other = replace(
        case,
        grid=replace(case.grid, group_grids="static"),
        settings=replace(case.settings, order="min_pivot", damp_ratio=0.5, column_block=3),
    )
    assert torch.equal(rtn(case).weight.codes_OI, rtn(other).weight.codes_OI)
    assert rtn(case).damp_ratio_used == 0.0


@pytest.mark.parametrize("search", ["hessian", "pivot", "walk"])
def test_searches_that_know_the_moment_lose_less_than_those_that_do_not(search: str) -> None:
    weight_OI, moment_II = random_weight(64, 64), random_moment(64)
    losses = {
        name: rtn(problem(weight_OI, moment_II, bits=2, group_size=-1, search=name)).loss
        for name in ("minmax", "mse", search)
    }
    assert losses[search] < losses["mse"] < losses["minmax"]


def test_pivot_and_walk_price_errors_alike_where_nothing_compensates() -> None:
    weight_OI, moment_II = random_weight(8, 48), random_moment(48)
    pivot, walk = (rtn(problem(weight_OI, moment_II, group_size=16, search=name)) for name in ("pivot", "walk"))
    assert torch.equal(pivot.weight.codes_OI, walk.weight.codes_OI)


def test_the_loss_is_its_own_rtn_loss_and_dead_inputs_are_counted() -> None:
    moment_II = random_moment(32)
    moment_II[:, 5] = moment_II[5] = 0
    solution = rtn(problem(random_weight(4, 32), moment_II, group_size=16, search="pivot"))
    assert solution.loss == solution.rtn_loss > 0
    assert solution.num_dead_inputs == 1


def test_groups_without_any_activation_keep_their_full_range() -> None:
    weight_OI, moment_II = random_weight(4, 32), random_moment(32)
    moment_II[16:] = moment_II[:, 16:] = 0
    for search in ("hessian", "pivot", "walk"):
        searched = rtn(problem(weight_OI, moment_II, group_size=16, search=search)).weight
        full = rtn(problem(weight_OI, moment_II, group_size=16, search="minmax")).weight
        assert torch.equal(searched.scale_OG[:, 1], full.scale_OG[:, 1])


def test_the_clipped_share_counts_weights_beyond_the_outer_levels() -> None:
    weight_OI = torch.tensor([[-4.0, -3.0, 0.0, 3.0, 3.4, 3.6, 9.0, -9.0]], dtype=torch.float64)
    scale_OG, zero_point_OG = torch.ones(1, 1, dtype=torch.float64), torch.full((1, 1), 4.0, dtype=torch.float64)
    weight, clipped_O = round_to_nearest(weight_OI, scale_OG, zero_point_OG, bits=3, symmetric=True)
    assert weight.codes_OI.tolist() == [[0, 1, 4, 7, 7, 7, 7, 0]]
    assert clipped_O.tolist() == [3 / 8]
