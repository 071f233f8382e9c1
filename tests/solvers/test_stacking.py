"""Solving linears of the same input together is solving each by itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.problems import problem, random_moment, random_weight

from optgptq.solvers import SOLVERS, LayerProblem, LayerSolution
from optgptq.solvers.stacking import solve_together


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
    together = solve_together(SOLVERS[solver], problems)
    for part, single in zip(together, map(SOLVERS[solver], problems), strict=True):
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
        return replace(SOLVERS["rtn"](problem), seconds=12.0)

    first = problem(random_weight(1, 16), random_moment(16))
    second = replace(first, name="other", weight_OI=random_weight(3, 16))
    assert solve_together(solver, [first])[0].seconds == 12.0
    assert seen.pop() is first
    assert [solution.seconds for solution in solve_together(solver, [first, second])] == [3.0, 9.0]
    assert seen[0].name == "linear + other"
