"""Memory that solvers hold beside the problem they are given, by method.

Numbers of live tensors were counted while the solvers ran (tests/planning/test_solver_memory.py counts them again) and
set against the resident memory of whole solves.

Shapes: `O` output rows, `I` input columns.
"""

from __future__ import annotations

from optgptq.plan import LinearPlan

# Rows that a solver walks at a time (`_ROWS` of the solvers).
ROWS_PER_WALK = 2048
# Matrices `[I, I]` while a moment is damped, ordered and factored: its permutation, the flipped one and the factor.
FACTOR_COPIES = 3.1


def factor_bytes(num_columns: int, itemsize: int) -> int:
    """Return what factoring a moment holds at most, the moment itself not counted."""
    return int(FACTOR_COPIES * num_columns**2 * itemsize)


def solver_bytes(plan: LinearPlan, num_rows: int, *, itemsize: int, coupled: bool = False) -> int:
    """Return what the solve of `num_rows` rows by the method of `plan` holds at most, weight and moment not counted.

    Args:
        plan: method, grid and columns.
        num_rows: of all linears that are solved as one.
        itemsize: of the solver's numbers.
        coupled: the rows of a head are solved together (methods that see attention).
    """
    columns = plan.info.in_features
    weight, moment = num_rows * columns, columns**2
    walked = min(num_rows, ROWS_PER_WALK) * columns
    if plan.method == "rtn":
        numbers = 6.5 * weight
    elif plan.binary is not None:
        numbers = 2 * moment + 1.2 * weight + 7.5 * walked
    elif coupled:
        numbers = moment + 15 * weight
    else:
        numbers = moment + 4.25 * weight + 6.1 * walked
    factoring = 0.0 if plan.method == "rtn" else FACTOR_COPIES * moment + weight
    return int(max(numbers, factoring) * itemsize)
