"""Linears that read the same input are solved as one, and a linear whose rows are solved apart is put together again.

Rows of different linears do not influence each other, so the codes are those of separate solves.
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


def put_together(parts: Sequence[tuple[torch.Tensor, LayerSolution]]) -> LayerSolution:
    """Return one solution of rows that were solved apart.

    Args:
        parts: for every part the rows it holds, int64, in its own order; together they are every row once.
    """
    place_O = torch.cat([rows for rows, _ in parts]).argsort()
    solutions = [solution for _, solution in parts]
    first = solutions[0]
    weights = [solution.weight for solution in solutions]
    return LayerSolution(
        weight=type(weights[0]).stacked(weights).select(place_O),
        row_energy_O=torch.cat([solution.row_energy_O for solution in solutions])[place_O],
        row_loss_O=torch.cat([solution.row_loss_O for solution in solutions])[place_O],
        row_rtn_loss_O=torch.cat([solution.row_rtn_loss_O for solution in solutions])[place_O],
        row_clipped_O=torch.cat([solution.row_clipped_O for solution in solutions])[place_O],
        damp_ratio_used=max(solution.damp_ratio_used for solution in solutions),
        num_dead_inputs=max(solution.num_dead_inputs for solution in solutions),
        seconds=sum(solution.seconds for solution in solutions),
        coupled=first.coupled if len(parts) == 1 and bool((place_O.diff() > 0).all()) else None,
        notes=tuple(dict.fromkeys(note for solution in solutions for note in solution.notes)),
    )
