"""Binary codes with coupled rows against one row solved after another, written out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.binary_problems import binary_problem
from support.problems import random_moment, random_weight
from support.slow_two_sided import damped, descending, output_moments

from optgptq.solvers import binary, coupled_binary
from optgptq.solvers.problem import LayerProblem


def coupled_problem(num_heads: int, head_size: int, *, group_size: int = 8, seed: int = 0) -> LayerProblem:
    """Return a float64 problem of 24 columns whose rows meet."""
    weight_OI = random_weight(num_heads * head_size, 24, seed=seed)
    moment_NDD = output_moments(num_heads, head_size, seed=seed)
    case = binary_problem(weight_OI, random_moment(24, seed=seed), group_size=group_size)
    return replace(case, output_moment_NDD=moment_NDD)


def reverse_factor(moment_DD: torch.Tensor) -> torch.Tensor:
    """Return upper triangular `P` with `P P^T` equal to the moment."""
    flipped: torch.Tensor = torch.linalg.cholesky(moment_DD.flip(0, 1)).flip(0, 1)
    return flipped


def one_after_another(case: LayerProblem) -> torch.Tensor:
    """Return the dequantized weight `[O, I]` of each head's rows solved by themselves for targets that move."""
    assert case.output_moment_NDD is not None
    num_heads, head_size, _ = case.output_moment_NDD.shape
    level_NDI = torch.zeros(num_heads, head_size, case.weight_OI.shape[1], dtype=torch.float64)
    for head, moment_DD in enumerate(case.output_moment_NDD):
        order = descending(moment_DD)
        upper_DD = reverse_factor(damped(moment_DD)[order][:, order])
        weight_DI = case.weight_OI.view_as(level_NDI)[head]
        for place, row in enumerate(order):
            target_I = weight_DI[row].clone()
            for earlier in range(place):
                error_I = weight_DI[order[earlier]] - level_NDI[head, order[earlier]]
                target_I += upper_DD[earlier, place] / upper_DD[place, place] * error_I
            alone = replace(case, weight_OI=target_I[None], output_moment_NDD=None)
            level_NDI[head, row] = binary.solve(alone).weight.dequantize(torch.float64)[0]
    return level_NDI.flatten(0, 1)


@pytest.mark.parametrize(("num_heads", "head_size", "group_size"), [(1, 5, -1), (3, 4, 8), (2, 7, 12)])
def test_each_row_makes_up_for_those_before_it(num_heads: int, head_size: int, group_size: int) -> None:
    case = coupled_problem(num_heads, head_size, group_size=group_size, seed=head_size)
    found_OI = coupled_binary.solve(case).weight.dequantize(torch.float64)
    assert torch.allclose(found_OI, one_after_another(case), atol=1e-9)


def test_losses_are_those_of_the_solution() -> None:
    case = coupled_problem(3, 4)
    solution = coupled_binary.solve(case)
    assert solution.coupled is not None
    assert case.output_moment_NDD is not None
    error_OI = case.weight_OI - solution.weight.dequantize(torch.float64)
    gram_NDD = torch.einsum("ndi,ij,nej->nde", error_OI.view(3, 4, -1), case.input_moment_II, error_OI.view(3, 4, -1))
    head_N = (gram_NDD * case.output_moment_NDD).sum(dim=(1, 2))
    assert torch.allclose(solution.coupled.loss_O.view(3, 4).sum(dim=1), head_N, rtol=1e-6)
    assert torch.allclose(solution.row_loss_O, gram_NDD.diagonal(dim1=1, dim2=2).flatten(), rtol=1e-6)
    assert 0 < solution.coupled.loss < solution.coupled.rtn_loss < 1


def test_coupled_rows_lose_less_together_than_rows_alone() -> None:
    together = alone = 0.0
    for seed in range(4):
        case = coupled_problem(2, 8, seed=seed)
        solution = coupled_binary.solve(case)
        assert solution.coupled is not None
        assert case.output_moment_NDD is not None
        error_NDI = (case.weight_OI - binary.solve(case).weight.dequantize(torch.float64)).view(2, 8, -1)
        gram_NDD = error_NDI @ case.input_moment_II @ error_NDI.transpose(1, 2)
        together += float(solution.coupled.loss_O.sum())
        alone += float((gram_NDD * case.output_moment_NDD).sum())
    assert together < 0.9 * alone


def test_without_coupling_rows_are_solved_one_sided_and_a_note_says_so() -> None:
    case = coupled_problem(2, 4)
    alone = binary.solve(replace(case, output_moment_NDD=None))
    assert torch.equal(
        coupled_binary.solve(replace(case, output_moment_NDD=None)).weight.codes_OI, alone.weight.codes_OI
    )
    diagonal_NDD = torch.eye(4, dtype=torch.float64).expand(2, -1, -1)
    solution = coupled_binary.solve(replace(case, output_moment_NDD=diagonal_NDD))
    assert torch.equal(solution.weight.codes_OI, alone.weight.codes_OI)
    assert solution.coupled is None
    assert solution.notes
