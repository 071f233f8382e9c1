"""Damping, column orders and the one factorization of an input moment.

`H = P P^T` with `P` upper triangular, by one reverse Cholesky: flip both axes, factor, flip back. The inverse is
never formed. `P` relates to the usual factor `U` of `H^-1 = U^T U` by `P = U^-1`, so `P_jj = 1 / U_jj`.
Source: GPTQ (arXiv 2210.17323), section 3.3, in the look-back form of LDLQ (arXiv 2307.13304).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from optgptq.errors import NumericalError
from optgptq.solvers.problem import ColumnOrder, LayerProblem

# Tried in turn after the asked ratio when the factorization fails.
DAMPING_LADDER = (0.01, 0.03, 0.1, 0.3, 1.0)


@dataclass(frozen=True, slots=True, eq=False)
class Factor:
    """Factor of a damped, permuted moment.

    Attributes:
        order_I: int64 `[I]`, original column at each place of the walk.
        upper_II: `P`, `[I, I]` upper triangular, in the walk's order.
        damp_ratio_used: damping with which it succeeded.
        dead_I: bool `[I]`, original columns that no calibration token reached.
        added_I: `[I]`, what stands on the diagonal beyond the moment, in the walk's order.
    """

    order_I: torch.Tensor
    upper_II: torch.Tensor
    damp_ratio_used: float
    dead_I: torch.Tensor
    added_I: torch.Tensor


def factor_moment(
    moment_II: torch.Tensor,
    *,
    name: str,
    order: ColumnOrder,
    group_size: int,
    damp_ratio: float,
    dtype: torch.dtype,
    what: str = "input moment",
) -> Factor:
    """Order, damp and factor a moment `[I, I]`; `name` and `what` are for messages.

    Raises:
        NumericalError: the moment is not finite, or no damping up to the mean diagonal makes it positive definite.
    """
    # A NaN is the smallest and the largest of all; isfinite of every number took twenty times as long.
    if not bool(torch.isfinite(torch.stack(moment_II.aminmax())).all()):
        raise NumericalError(
            f"{name}: {what}",
            expected="finite values",
            found="NaN or infinity",
            action="Check the model's weights and the calibration text; an overflow in float16 is the usual cause.",
        )
    moment_II = moment_II.to(dtype)
    diagonal_I = moment_II.diagonal()
    dead_I = diagonal_I <= 0
    # Dead columns do not count: they must not change what becomes of the others.
    mean_diagonal = float(diagonal_I[~dead_I].mean()) if bool((~dead_I).any()) else 1.0
    alive_II = moment_II.clone()
    alive_II.diagonal()[dead_I] = mean_diagonal
    order_I = column_order(alive_II, order, group_size, damp=damp_ratio * mean_diagonal)
    permuted_II = alive_II.index_select(0, order_I).index_select(1, order_I)
    # Each copy of a wide moment takes gigabytes.
    del alive_II
    ratios = (damp_ratio, *(ratio for ratio in DAMPING_LADDER if ratio > damp_ratio))
    for ratio in ratios:
        upper_II = reverse_cholesky(permuted_II, damp=ratio * mean_diagonal)
        if upper_II is not None:
            added_I = (dead_I.to(dtype) + ratio)[order_I] * mean_diagonal
            return Factor(order_I, upper_II, ratio, dead_I, added_I)
    raise NumericalError(
        f"{name}: {what}",
        expected="a matrix that damping makes positive definite",
        found=f"a failed factorization at each of the damping ratios {ratios}",
        action="Use more calibration text, or calibration.moment_dtype=float64.",
    )


def factor_problem(problem: LayerProblem) -> Factor:
    """Return the factor that a walk over the columns of a problem needs.

    Raises:
        NumericalError: as `factor_moment`.
        ValueError: the order visits columns of different groups in turn, but grids are read when a group begins.
    """
    grid, settings, group_size = problem.grid, problem.settings, problem.group_size
    scatters = settings.order in ("activation", "min_pivot") and group_size < problem.weight_OI.shape[1]
    if scatters and grid.group_grids == "dynamic":
        raise ValueError(f"{settings.order} order scatters groups: it needs static grids")
    return factor_moment(
        problem.input_moment_II,
        name=problem.name,
        order=settings.order,
        group_size=group_size,
        damp_ratio=settings.damp_ratio,
        dtype=settings.dtype,
    )


def damping_notes(factor: Factor, damp_ratio: float) -> tuple[str, ...]:
    """Return a sentence where more damping than the asked ratio was needed."""
    if factor.damp_ratio_used <= damp_ratio:
        return ()
    return (
        f"damping was raised from {damp_ratio:g} to {factor.damp_ratio_used:g} of the mean diagonal, "
        "because the input moment could not be factored",
    )


def reverse_cholesky(moment_II: torch.Tensor, *, damp: float) -> torch.Tensor | None:
    """Return upper triangular `P` with `P P^T = moment + damp * 1`, or None where it is not positive definite."""
    flipped_II = moment_II.flip(0, 1)
    flipped_II.diagonal().add_(damp)
    lower_II: torch.Tensor
    lower_II, failure = torch.linalg.cholesky_ex(flipped_II)
    # Each copy of a wide moment takes gigabytes.
    del flipped_II
    if int(failure) != 0 or not bool(torch.isfinite(lower_II.diagonal()).all()):
        return None
    upper_II = lower_II.flip(0, 1)
    del lower_II
    return upper_II.contiguous()


def column_order(moment_II: torch.Tensor, order: ColumnOrder, group_size: int, *, damp: float) -> torch.Tensor:
    """Return int64 `[I]`: the original column at each place of the walk.

    `group_aware` sorts columns inside each group by descending moment, then groups by their largest moment, so that
    groups stay contiguous. `min_pivot` eliminates the column with the smallest remaining Schur diagonal first and
    quantizes it last. Ties keep the natural order.
    """
    num_columns = moment_II.shape[0]
    if order == "natural":
        return torch.arange(num_columns, device=moment_II.device)
    diagonal_I = moment_II.diagonal()
    if order == "activation" or (order == "group_aware" and group_size == num_columns):
        return diagonal_I.argsort(descending=True, stable=True)
    if order == "group_aware":
        grouped_GL = diagonal_I.reshape(-1, group_size)
        inside_GL = grouped_GL.argsort(dim=1, descending=True, stable=True)
        groups_G = grouped_GL.amax(dim=1).argsort(descending=True, stable=True)
        first_G = torch.arange(0, num_columns, group_size, device=moment_II.device)
        return (inside_GL + first_G[:, None])[groups_G].reshape(-1)
    return _min_pivot_order(moment_II, damp)


def _min_pivot_order(moment_II: torch.Tensor, damp: float) -> torch.Tensor:
    """Pivoted left-looking Cholesky in float64, smallest pivot first; the walk is the reverse of the elimination."""
    damped_II = moment_II.to(torch.float64).clone()
    damped_II.diagonal().add_(damp)
    num_columns = damped_II.shape[0]
    factor_II = torch.zeros_like(damped_II)
    eliminated_I = torch.empty(num_columns, dtype=torch.int64, device=moment_II.device)
    pivots_I = damped_II.diagonal().clone()
    smallest = torch.finfo(torch.float64).eps * float(pivots_I.max())
    for step in range(num_columns):
        column = pivots_I.argmin()
        eliminated_I[step] = column
        done_IK = factor_II[:, :step]
        schur_I = damped_II[:, column] - done_IK @ done_IK[column]
        schur_I /= schur_I[column].clamp(min=smallest).sqrt()
        factor_II[:, step] = schur_I
        pivots_I -= schur_I.square()
        pivots_I[eliminated_I[: step + 1]] = torch.inf
    return eliminated_I.flip(0)
