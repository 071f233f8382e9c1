"""GPTQ on moments that say little or nothing: dead columns, few tokens, no tokens, values that are not finite."""

from __future__ import annotations

import pytest
import torch
from support.problems import problem, random_moment, random_weight

from optgptq.errors import NumericalError
from optgptq.solvers import METHODS

gptq = METHODS["gptq"].solver
SEARCHES = ("minmax", "mse", "hessian", "pivot", "walk")


def test_dead_columns_are_rounded_and_leave_the_others_alone() -> None:
    weight_OI, moment_II = random_weight(10, 30), random_moment(30)
    dead = [0, 7, 29]
    live = [column for column in range(30) if column not in dead]
    # Inside the range of the row, so that the grid is the same without them.
    weight_OI[:, dead] *= 0.1
    moment_II[dead] = 0
    moment_II[:, dead] = 0
    for order in ("natural", "activation", "group_aware", "min_pivot"):
        case = problem(weight_OI, moment_II, bits=3, order=order, group_grids="static")
        solution = gptq(case)
        removed = gptq(problem(weight_OI[:, live], moment_II[live][:, live], bits=3, order=order, group_grids="static"))
        assert solution.num_dead_inputs == 3
        assert removed.num_dead_inputs == 0
        assert torch.equal(solution.weight.scale_OG, removed.weight.scale_OG)
        assert torch.equal(solution.weight.codes_OI[:, live], removed.weight.codes_OI)
        scale_O1 = solution.weight.scale_OG.double()
        rounded = ((weight_OI[:, dead] / scale_O1).round() + 4).clamp(0, 7).to(torch.uint8)
        assert torch.equal(solution.weight.codes_OI[:, dead], rounded)
        assert bool(torch.isfinite(solution.row_loss_O).all())
        torch.testing.assert_close(solution.row_loss_O, removed.row_loss_O, rtol=1e-12, atol=0)


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_any_activation_every_weight_is_rounded(search: str, dtype: torch.dtype) -> None:
    weight_OI = random_weight(6, 32)
    solution = gptq(problem(weight_OI, torch.zeros(32, 32), group_size=16, search=search, dtype=dtype))
    assert solution.num_dead_inputs == 32
    assert solution.loss == 0.0
    scale_OI = solution.weight.scale_OG.to(dtype).repeat_interleave(16, dim=1)
    rounded = ((weight_OI.to(dtype) / scale_OI).round() + 8).clamp(0, 15).to(torch.uint8)
    assert torch.equal(solution.weight.codes_OI, rounded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_tokens", [1, 5])
def test_singular_moments_are_solved(num_tokens: int, dtype: torch.dtype) -> None:
    moment_II = random_moment(64, num_tokens=num_tokens)
    weight_OI = random_weight(8, 64)
    before = weight_OI.clone(), moment_II.clone()
    solution = gptq(problem(weight_OI, moment_II, bits=3, group_size=16, search="walk", dtype=dtype))
    assert solution.loss < solution.rtn_loss
    assert solution.notes == ()
    assert torch.equal(weight_OI, before[0])
    assert torch.equal(moment_II, before[1])


def test_raised_damping_is_told() -> None:
    moment_II = random_moment(24)
    moment_II -= 0.05 * float(moment_II.diagonal().mean()) * torch.eye(24, dtype=torch.float64)
    moment_II -= (torch.linalg.eigvalsh(moment_II)[0] + 0.05) * torch.eye(24, dtype=torch.float64)
    solution = gptq(problem(random_weight(4, 24), moment_II, damp_ratio=1e-6))
    assert solution.damp_ratio_used > 1e-6
    assert solution.notes == (
        f"damping was raised from 1e-06 to {solution.damp_ratio_used:g} of the mean diagonal, "
        "because the input moment could not be factored",
    )


def test_a_moment_that_is_not_finite_stops_the_solve() -> None:
    moment_II = random_moment(16)
    moment_II[3, 3] = float("nan")
    with pytest.raises(NumericalError, match="linear: input moment"):
        gptq(problem(random_weight(4, 16), moment_II))
