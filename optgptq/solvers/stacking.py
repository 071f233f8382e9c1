"""Linears that read the same input are solved as one: one factorization, one walk over the columns.

Rows do not influence each other, so the codes are those of separate solves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from optgptq.solvers.problem import LayerProblem, LayerSolution, Solver


def solve_together(solver: Solver, problems: Sequence[LayerProblem]) -> list[LayerSolution]:
    """Return the solutions of problems that differ in name and weight only.

    Raises:
        NumericalError: as the solver does.
    """
    first = problems[0]
    if len(problems) == 1:
        return [solver(first)]
    stacked = replace(
        first,
        name=" + ".join(problem.name for problem in problems),
        weight_OI=torch.cat([problem.weight_OI for problem in problems]),
    )
    solution = solver(stacked)
    solutions, begin = [], 0
    for problem in problems:
        end = begin + problem.weight_OI.shape[0]
        solutions.append(solution.rows(begin, end))
        begin = end
    return solutions
