"""Solvers by the name that a recipe gives them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from optgptq.grids.binary_settings import BinarySettings
from optgptq.solvers import binary, coupled_binary, gptq, gptqt, rtn, two_sided
from optgptq.solvers.problem import LayerProblem, LayerSolution, Solver, SolverSettings
from optgptq.solvers.refined import RefinedSolver

__all__ = ["METHODS", "LayerProblem", "LayerSolution", "Method", "Solver", "SolverSettings"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A way to solve linears.

    Attributes:
        solver: what solves one problem.
        sees_attention: queries, keys and values are solved for what attention makes of them.
        binary: what becomes of the settings for binary codes; None: grids are uniform.
    """

    solver: Solver
    sees_attention: bool = False
    binary: Callable[[BinarySettings], BinarySettings] | None = None


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "rtn": Method(solver=RefinedSolver(rtn.solve)),
        "gptq": Method(solver=RefinedSolver(gptq.solve)),
        "attention_aware": Method(solver=RefinedSolver(two_sided.solve), sees_attention=True),
        "gptqt": Method(solver=binary.solve, binary=gptqt.as_published),
        "binary": Method(solver=binary.solve, binary=lambda settings: settings),
        "attention_aware_binary": Method(
            solver=coupled_binary.solve, sees_attention=True, binary=lambda settings: settings
        ),
    }
)
