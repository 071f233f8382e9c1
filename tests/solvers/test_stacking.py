"""Solving linears of the same input together, or one linear in parts, is solving each by itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.problems import problem, random_moment, random_weight

from optgptq.solvers import METHODS, LayerProblem, LayerSolution
from optgptq.solvers.stacking import put_together, solve_together


@pytest.mark.parametrize("solver", ["rtn", "gptq"])
@pytest.mark.parametrize("search", ["minmax", "hessian", "walk"])
def test_stacked_rows_have_the_solutions_of_separate_solves(solver: str, search: str) -> None:
    moment_II = random_moment(48)
    problems = [
        replace(
            problem(random_weight(rows, 48, seed=rows), moment_II, bits=3, group_size=16, search=search),
            name=f"linear {rows}",
        )
        for rows in (7, 2, 5)
    ]
    together = solve_together(METHODS[solver].solver, problems)
    for part, single in zip(together, map(METHODS[solver].solver, problems), strict=True):
        assert torch.equal(part.weight.codes_OI, single.weight.codes_OI)
        assert torch.equal(part.weight.scale_OG, single.weight.scale_OG)
        assert torch.equal(part.weight.zero_point_OG, single.weight.zero_point_OG)
        assert part.loss == pytest.approx(single.loss, rel=1e-12)
        assert part.rtn_loss == pytest.approx(single.rtn_loss, rel=1e-12)
        assert part.clip_fraction == pytest.approx(single.clip_fraction)


def test_one_problem_is_handed_on_as_it_is_and_time_is_shared_out_by_rows() -> None:
    seen: list[LayerProblem] = []

    def solver(problem: LayerProblem) -> LayerSolution:
        seen.append(problem)
        return replace(METHODS["rtn"].solver(problem), seconds=12.0)

    first = problem(random_weight(1, 16), random_moment(16))
    second = replace(first, name="other", weight_OI=random_weight(3, 16))
    assert solve_together(solver, [first])[0].seconds == 12.0
    assert seen.pop() is first
    assert [solution.seconds for solution in solve_together(solver, [first, second])] == [3.0, 9.0]
    assert seen[0].name == "linear + other"


@pytest.mark.parametrize("solver", ["rtn", "gptq", "attention_aware"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_that_were_solved_apart_are_put_where_they_belong(solver: str, dtype: torch.dtype) -> None:
    """Every other head, the rest backwards, and one row between them: as the rows of a fused linear lie."""
    whole = problem(random_weight(11, 48), random_moment(48), bits=3, group_size=16, search="walk", dtype=dtype)
    places = [torch.tensor([0, 1, 6, 7]), torch.tensor([10, 9, 3, 2]), torch.tensor([8]), torch.tensor([4, 5])]
    parts = [(rows, METHODS[solver].solver(replace(whole, weight_OI=whole.weight_OI[rows]))) for rows in places]
    found, expected = put_together(parts), METHODS[solver].solver(whole)
    for rows, part in parts:
        assert torch.equal(found.weight.codes_OI[rows], part.weight.codes_OI)
        assert torch.equal(found.weight.dequantize()[rows], part.weight.dequantize())
        for name in ("row_energy_O", "row_loss_O", "row_rtn_loss_O", "row_clipped_O"):
            assert torch.equal(getattr(found, name)[rows], getattr(part, name))
    if dtype == torch.float64:
        assert torch.equal(found.weight.codes_OI, expected.weight.codes_OI)
        assert torch.equal(found.weight.scale_OG, expected.weight.scale_OG)
        assert torch.equal(found.weight.zero_point_OG, expected.weight.zero_point_OG)
    assert found.weight.bits == 3
    assert found.weight.group_size == 16
    assert found.weight.symmetric
    assert found.loss == pytest.approx(expected.loss, rel=1e-9 if dtype == torch.float64 else 0.05)
    assert found.coupled is None


def test_what_parts_say_is_said_once_and_the_worst_of_them_counts() -> None:
    whole = problem(random_weight(5, 16), random_moment(16))
    first, second = (
        METHODS["rtn"].solver(replace(whole, weight_OI=whole.weight_OI[rows])) for rows in ([0, 4], [3, 1, 2])
    )
    first = replace(first, notes=("same", "first"), seconds=1.0, damp_ratio_used=0.01, num_dead_inputs=2)
    second = replace(second, notes=("second", "same"), seconds=2.0, damp_ratio_used=0.1, num_dead_inputs=1)
    found = put_together([(torch.tensor([0, 4]), first), (torch.tensor([3, 1, 2]), second)])
    assert found.notes == ("same", "first", "second")
    assert (found.seconds, found.damp_ratio_used, found.num_dead_inputs) == (3.0, 0.1, 2)


@pytest.mark.parametrize(("rows", "is_kept"), [([0, 1, 2, 3], True), ([2, 3, 0, 1], False)])
def test_losses_of_coupled_rows_stay_while_rows_stand_as_they_were_solved(rows: list[int], is_kept: bool) -> None:
    heads_NDD = torch.stack([random_moment(2, seed=seed) for seed in (1, 2)])
    coupled = replace(problem(random_weight(4, 16), random_moment(16)), output_moment_NDD=heads_NDD)
    solution = METHODS["attention_aware"].solver(coupled)
    assert solution.coupled is not None
    found = put_together([(torch.tensor(rows), solution)])
    assert (found.coupled is solution.coupled) == is_kept
    assert torch.equal(found.weight.codes_OI[rows], solution.weight.codes_OI)
