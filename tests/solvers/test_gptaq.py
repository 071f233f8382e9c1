"""The published rule of GPTAQ against a literal version, and what it has in common with GPTQ."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.problems import problem, random_moment, random_weight

from optgptq.solvers import LayerProblem, gptaq, gptq
from optgptq.solvers.factor import factor_moment

ROWS, COLUMNS = 6, 30


def random_cross(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7 + seed)
    return 0.1 * torch.randn(COLUMNS, COLUMNS, generator=generator, dtype=torch.float64) @ random_moment(COLUMNS)


def case(**keywords: Any) -> LayerProblem:
    return problem(random_weight(ROWS, COLUMNS), random_moment(COLUMNS), **{"group_size": 10, **keywords})


def slow_gptaq(
    case: LayerProblem, cross_II: torch.Tensor, alpha: float, *, grids: tuple[torch.Tensor, torch.Tensor], **how: Any
) -> torch.Tensor:
    """Return codes `[O, I]` of the published loop: work on a copy `W1` of the block, then update what is behind it."""
    order, block_size, published = how["order"], how["block_size"], how["published"]
    moment_II = case.input_moment_II
    damp = 0.01 * moment_II.diagonal().mean() * torch.eye(COLUMNS, dtype=torch.float64)
    inverse_II = torch.linalg.cholesky(torch.linalg.inv((moment_II + damp)[order][:, order]), upper=True)
    drift_II = alpha * torch.triu(cross_II[order][:, order] @ inverse_II.T, diagonal=1) @ inverse_II
    weight_OI = case.weight_OI[:, order].clone()
    scale_OI, zero_point_OI = (grid_OG.double().repeat_interleave(10, dim=1)[:, order] for grid_OG in grids)
    codes_OI = torch.empty(ROWS, COLUMNS, dtype=torch.uint8)
    for begin in range(0, COLUMNS, block_size):
        end = min(begin + block_size, COLUMNS)
        block_OC = weight_OI[:, begin:end].clone()
        handed_OC, error_OC = torch.zeros_like(block_OC), torch.zeros_like(block_OC)
        for i in range(end - begin):
            column = begin + i
            weight_O = block_OC[:, i].clone()
            code_O = (weight_O / scale_OI[:, column] + zero_point_OI[:, column]).round().clamp(0, case.grid.max_code)
            level_O = (code_O - zero_point_OI[:, column]) * scale_OI[:, column]
            codes_OI[:, order[column]] = code_O.to(torch.uint8)
            error_O = (weight_O - level_O) / inverse_II[column, column]
            block_OC[:, i:] -= torch.outer(error_O, inverse_II[column, column:end])
            block_OC[:, i:] += torch.outer(weight_O, drift_II[column, column:end])
            error_OC[:, i] = error_O
            handed_OC[:, i] = level_O if published else weight_O
        weight_OI[:, end:] -= error_OC @ inverse_II[begin:end, end:] - handed_OC @ drift_II[begin:end, end:]
    return codes_OI


@pytest.mark.parametrize("order", ["natural", "activation", "group_aware"])
def test_drift_factor_is_that_of_each_column_by_itself(order: Any) -> None:
    """Row `q` is `D[q, q+1:]` times the inverse of the damped moment without the columns up to `q`."""
    moment_II, cross_II = random_moment(COLUMNS), random_cross()
    factor = factor_moment(moment_II, name="linear", order=order, group_size=10, damp_ratio=0.01, dtype=torch.float64)
    drift_II = gptaq.drift_factor(factor, cross_II, 0.5)
    damp = 0.01 * moment_II.diagonal().mean() * torch.eye(COLUMNS, dtype=torch.float64)
    damped_II = (moment_II + damp)[factor.order_I][:, factor.order_I]
    cross_II = cross_II[factor.order_I][:, factor.order_I]
    for column in range(COLUMNS):
        behind = slice(column + 1, None)
        expected_I = torch.zeros(COLUMNS, dtype=torch.float64)
        expected_I[behind] = 0.5 * cross_II[column, behind] @ torch.linalg.inv(damped_II[behind, behind])
        torch.testing.assert_close(drift_II[column], expected_I)


@pytest.mark.parametrize("published", [True, False])
@pytest.mark.parametrize(("order", "group_grids"), [("natural", "dynamic"), ("activation", "static")])
@pytest.mark.parametrize("block_size", [5, 10, 20, 128])
def test_codes_are_those_of_the_literal_loop(order: Any, group_grids: Any, block_size: int, published: bool) -> None:
    linear = case(bits=3, symmetric=False, order=order, group_grids=group_grids)
    cross_II = random_cross()
    solution = gptaq.solve(linear, cross_II, 0.25, published_blocks=published, block_size=block_size)
    columns = list(range(COLUMNS))
    diagonal_I = linear.input_moment_II.diagonal()
    codes_OI = slow_gptaq(
        linear,
        cross_II,
        0.25,
        grids=(solution.weight.scale_OG, solution.weight.zero_point_OG),
        order=columns if order == "natural" else sorted(columns, key=lambda column: -float(diagonal_I[column])),
        block_size=block_size,
        published=published,
    )
    assert torch.equal(solution.weight.codes_OI, codes_OI)


def test_blocks_matter_only_to_the_published_form() -> None:
    linear, cross_II = case(bits=2), random_cross()
    published = [gptaq.solve(linear, cross_II, 1.0, block_size=size).weight.codes_OI for size in (10, 30)]
    consistent = [
        gptaq.solve(linear, cross_II, 1.0, published_blocks=False, block_size=size).weight.codes_OI for size in (10, 30)
    ]
    assert not torch.equal(*published)
    assert torch.equal(*consistent)


@pytest.mark.parametrize("search", ["minmax", "mse", "pivot"])
@pytest.mark.parametrize("group_size", [10, -1])
def test_without_drift_it_is_gptq(search: Any, group_size: int) -> None:
    linear = case(bits=3, search=search, group_size=group_size)
    cross_II = random_cross()
    expected = gptq.solve(linear)
    for solution in (gptaq.solve(linear, cross_II, 0.0), gptaq.solve(linear, 0 * cross_II, 1.0)):
        assert torch.equal(solution.weight.codes_OI, expected.weight.codes_OI)
        assert torch.equal(solution.weight.scale_OG, expected.weight.scale_OG)
        torch.testing.assert_close(solution.row_loss_O, expected.row_loss_O)
        torch.testing.assert_close(solution.row_rtn_loss_O, expected.row_rtn_loss_O)
        torch.testing.assert_close(solution.row_clipped_O, expected.row_clipped_O, rtol=0, atol=0.02)


def test_scattered_or_unnested_groups_need_static_grids() -> None:
    with pytest.raises(ValueError, match="scatters groups"):
        gptaq.solve(case(order="activation"), random_cross(), 0.25)
    with pytest.raises(ValueError, match="groups of 10 columns and blocks of 16 do not nest"):
        gptaq.solve(case(), random_cross(), 0.25, block_size=16)
