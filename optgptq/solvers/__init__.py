"""Solvers by the name that a recipe gives them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from optgptq.solvers import gptq, rtn, two_sided
from optgptq.solvers.problem import LayerProblem, LayerSolution, Solver, SolverSettings
from optgptq.solvers.refined import RefinedSolver

__all__ = ["SOLVERS", "LayerProblem", "LayerSolution", "Solver", "SolverSettings"]

SOLVERS: Mapping[str, Solver] = MappingProxyType(
    {
        "rtn": RefinedSolver(rtn.solve),
        "gptq": RefinedSolver(gptq.solve),
        "attention_aware": RefinedSolver(two_sided.solve),
    }
)
