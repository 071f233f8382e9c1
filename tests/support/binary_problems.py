"""Problems for the solver of binary codes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from support.problems import problem

from optgptq.binary_weight import BinaryWeight
from optgptq.grids.binary_settings import BinarySettings
from optgptq.solvers import LayerProblem, LayerSolution


def binary_problem(
    weight_OI: torch.Tensor,
    moment_II: torch.Tensor,
    *,
    bits: int = 2,
    group_size: int = -1,
    dtype: torch.dtype = torch.float64,
    binary: dict[str, Any] | None = None,
    **settings: Any,
) -> LayerProblem:
    """Return a problem whose search tries few scales; `binary` goes to `BinarySettings`."""
    whole = problem(
        weight_OI,
        moment_II,
        bits=bits,
        symmetric=False,
        group_size=group_size,
        dtype=dtype,
        backend="torch",
        **settings,
    )
    chosen = {"scales": (0.6, 1.0, 0.2), "refits": 2, "sweeps": 2, "coefficients": "float", **(binary or {})}
    return replace(whole, binary=BinarySettings(**chosen))


def stored(solution: LayerSolution) -> BinaryWeight:
    """Return the solution's weight, in which nothing that is stored is wrong."""
    assert isinstance(solution.weight, BinaryWeight)
    assert list(solution.weight.problems()) == []
    return solution.weight
