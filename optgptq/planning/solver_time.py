"""Seconds that solvers take, from true solves of small problems with the recipe's own settings on this machine.

A solve takes `a O I + b O I^2 + c I^3`: grids and codes, errors that are handed on, and the factor of the moment. The
last comes from the machine's rates; the first two from two solves whose columns differ.

Shapes: `O` output rows, `I` input columns, `N` heads, `D` rows of a head.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace

import torch

from optgptq.plan import LinearPlan
from optgptq.planning.machine import MachineFile, MachineRates, seconds_of
from optgptq.solvers import METHODS, LayerProblem, SolverSettings

# Of a matrix `[I, I]`: copies, permutations and checks beside the factorization, in numbers that are read and written.
_FACTOR_NUMBERS = 20
_ROWS = 512
# Columns of the problems. Wider ones are nearer to real ones, and are taken where the first takes no longer than this.
_FIRST, _NARROW, _WIDE = 256, (256, 512), (512, 1024)
_QUICK_SECONDS = 0.03
_HEAD_SIZE = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class SolverCost:
    """Seconds per weight, per weight and column, and per number of the moment times its columns."""

    per_weight: float
    per_product: float
    per_factor: float
    per_moment: float

    def seconds(self, num_rows: int, num_columns: int) -> float:
        """Return what one solve takes."""
        weights, moment = num_rows * num_columns, num_columns**2
        solving = weights * (self.per_weight + self.per_product * num_columns)
        return solving + moment * (self.per_moment + self.per_factor * num_columns)


def solver_cost(
    plan: LinearPlan,
    settings: SolverSettings,
    rates: MachineRates,
    kept: MachineFile,
    *,
    coupled: bool,
    device: torch.device,
) -> SolverCost:
    """Return the cost of the solver of `plan`; small problems are solved where the machine's file does not know it.

    `coupled`: the rows of a head are solved together.
    """
    name = _name(plan, settings, coupled=coupled, device=device)
    factored = plan.method != "rtn"
    per_factor = 1 / rates.factor_products if factored else 0.0
    per_moment = _FACTOR_NUMBERS / rates.numbers if factored else 0.0
    free = SolverCost(per_weight=0.0, per_product=0.0, per_factor=per_factor, per_moment=per_moment)
    found = kept.get(name, lambda: _measure(plan, settings, free, coupled=coupled, device=device))
    return replace(free, per_weight=found.get("per_weight", 0.0), per_product=found.get("per_product", 0.0))


def _measure(
    plan: LinearPlan, settings: SolverSettings, free: SolverCost, *, coupled: bool, device: torch.device
) -> dict[str, float]:
    """Solve problems of two widths and return the two numbers that explain their times beyond the factor's."""

    def seconds(num_columns: int) -> float:
        problem = _problem(plan, settings, num_columns, coupled=coupled, device=device)
        took = seconds_of(lambda: METHODS[plan.method].solver(problem), device)
        return max(took - free.seconds(0, num_columns), 1e-6)

    with torch.no_grad():
        # The first solve also loads what the others only use.
        first = seconds(_FIRST)
        if first < 2 * _QUICK_SECONDS:
            first = min(first, seconds(_FIRST))
        widths = _WIDE if first < _QUICK_SECONDS else _NARROW
        small, large = (seconds(width) / (_ROWS * width) for width in widths)
    per_product = max((large - small) / (widths[1] - widths[0]), 0.0)
    return {"per_weight": max(large - per_product * widths[1], 0.0), "per_product": per_product}


def _problem(
    plan: LinearPlan, settings: SolverSettings, num_columns: int, *, coupled: bool, device: torch.device
) -> LayerProblem:
    assert plan.grid is not None
    generator = torch.Generator().manual_seed(0)
    inputs_TI = torch.randn(2 * num_columns, num_columns, generator=generator).to(device)
    weight_OI = (torch.randn(_ROWS, num_columns, generator=generator) * 0.02).to(device)
    size = plan.grid.group_size
    grid = plan.grid if size == -1 or num_columns % size == 0 else replace(plan.grid, group_size=-1)
    problem = LayerProblem(
        name="a small problem",
        weight_OI=weight_OI,
        input_moment_II=inputs_TI.T @ inputs_TI / len(inputs_TI),
        num_tokens=len(inputs_TI),
        grid=grid,
        settings=settings,
    )
    if plan.binary is not None:
        problem = replace(problem, binary=plan.binary)
    if not coupled:
        return problem
    heads = _ROWS // _HEAD_SIZE
    scores_NTD = torch.randn(heads, 4 * _HEAD_SIZE, _HEAD_SIZE, generator=generator, dtype=torch.float64).to(device)
    return replace(problem, output_moment_NDD=scores_NTD.mT @ scores_NTD / scores_NTD.shape[1])


def _name(plan: LinearPlan, settings: SolverSettings, *, coupled: bool, device: torch.device) -> str:
    assert plan.grid is not None
    asked = {
        "method": plan.method,
        "grid": asdict(plan.grid),
        "binary": None if plan.binary is None else asdict(plan.binary),
        "settings": asdict(settings),
        "coupled": coupled,
        "device": device.type,
    }
    return f"solve {json.dumps(asked, sort_keys=True, default=str)}"
