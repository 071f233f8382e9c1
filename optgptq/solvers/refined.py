"""A solver with the refinement that its settings ask for: scales and codes once more, under the undamped moment.

Shapes: `O` rows, `I` columns, `N` heads, `D` rows of a head.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch

from optgptq.affine_weight import AffineWeight
from optgptq.solvers.coupling import factor_outputs
from optgptq.solvers.losses import row_losses
from optgptq.solvers.problem import LayerProblem, LayerSolution, Solver
from optgptq.solvers.refine import refine, refine_two_sided


@dataclass(frozen=True, slots=True)
class RefinedSolver:
    """Runs `solver`, whose grids are uniform, then refines its solution; the same contract as any solver.

    A solution whose rows were coupled is refined under the output moment. Its losses by row, which leave that moment
    out, may rise for it.
    """

    solver: Solver

    def __call__(self, problem: LayerProblem) -> LayerSolution:
        solution = self.solver(problem)
        settings = problem.settings
        if not settings.scale_refit and not settings.code_sweeps:
            return solution
        if not isinstance(solution.weight, AffineWeight):
            raise TypeError(f"{problem.name}: only uniform grids are refined here")
        started = time.perf_counter()
        if solution.coupled is None:
            refined = refine(problem.weight_OI, problem.input_moment_II, solution.weight, settings)
            weight, row_loss_O = refined.weight, refined.row_loss_O
        else:
            weight = _refine_coupled(problem, solution.weight)
            _, row_loss_O = row_losses(problem, weight)
        seconds = solution.seconds + time.perf_counter() - started
        return replace(solution, weight=weight, row_loss_O=row_loss_O, seconds=seconds)


def _refine_coupled(problem: LayerProblem, weight: AffineWeight) -> AffineWeight:
    """Return the weight refined under the output moments, damped as they were for the solver.

    Without damping, directions that few tokens reached would be free. Heads that were solved one-sided stay so.
    """
    assert problem.output_moment_NDD is not None
    settings, moment_NDD = problem.settings, problem.output_moment_NDD.to(torch.float64)
    diagonal_ND = moment_NDD.diagonal(dim1=1, dim2=2)
    mean_N = diagonal_ND.mean(dim=1)
    damped_NDD = moment_NDD + torch.diag_embed((settings.damp_ratio * mean_N)[:, None].expand_as(diagonal_ND))
    is_coupled_N = factor_outputs(problem, problem.output_moment_NDD).is_coupled_N
    alone_NDD = torch.eye(moment_NDD.shape[1], dtype=torch.float64, device=moment_NDD.device)
    used_NDD = torch.where(is_coupled_N[:, None, None], damped_NDD, alone_NDD)
    target_NDI = problem.weight_OI.reshape(*used_NDD.shape[:2], -1)
    return refine_two_sided(target_NDI, problem.input_moment_II, used_NDD, weight, settings).weight
