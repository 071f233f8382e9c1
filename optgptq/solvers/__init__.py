"""Solvers by the name that a recipe gives them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from optgptq.solvers import gptq, rtn
from optgptq.solvers.problem import LayerProblem, LayerSolution, Solver, SolverSettings

__all__ = ["SOLVERS", "LayerProblem", "LayerSolution", "Solver", "SolverSettings"]

SOLVERS: Mapping[str, Solver] = MappingProxyType({"rtn": rtn.solve, "gptq": gptq.solve})
