"""The output moments of heads: which of them couple rows, and their factors.

An output moment `B` `[D, D]` says how errors of the rows of one head meet: the head loses `tr(B X H X^T)` for an error
`X` of its weight. `B = P P^T` is ordered, damped and factored like an input moment (`optgptq.solvers.factor`).
Source: BoA (arXiv 2406.13474), section 3.

Shapes: `N` heads, `D` rows of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from optgptq.errors import NumericalError
from optgptq.solvers.factor import Factor, factor_moment
from optgptq.solvers.problem import LayerProblem

# Below this share of the diagonal, what rows could do for each other is lost in the grids.
SMALLEST_COUPLING = 1e-3
# Of the head dimension. Fewer directions than that were seen: what damping puts into the others would decide.
SMALLEST_RANK_SHARE = 0.5
# Eigenvalues below this share of the largest are rounding errors of a float32 sum.
_RANK_TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class OutputFactors:
    """Factors of the damped, permuted output moments.

    Attributes:
        order_ND: int64, original row at each place of the walk, head by head.
        upper_NDD: `P`, upper triangular, in the walk's order and the solver's dtype; diagonal for a head that is solved
            without its moment.
        moment_NDD: float64, the moments themselves in the walk's order.
        is_coupled_N: bool, heads whose moment is used.
        notes: what a user must hear, in plain sentences.
    """

    order_ND: torch.Tensor
    upper_NDD: torch.Tensor
    moment_NDD: torch.Tensor
    is_coupled_N: torch.Tensor
    notes: tuple[str, ...]


def coupling(output_moment_NDD: torch.Tensor) -> torch.Tensor:
    """Return float64 `[N]`: the norm of what stands beside the diagonal over that of the diagonal, 0 without one."""
    moment_NDD = output_moment_NDD.to(torch.float64)
    diagonal_ND = moment_NDD.diagonal(dim1=1, dim2=2)
    beside_N = (moment_NDD - torch.diag_embed(diagonal_ND)).flatten(1).norm(dim=1)
    size_N = diagonal_ND.norm(dim=1)
    return torch.where(size_N > 0, beside_N / size_N, 0.0)


def ranks(output_moment_NDD: torch.Tensor) -> torch.Tensor:
    """Return int64 `[N]`: how many eigenvalues are more than the rounding of a float32 sum."""
    eigenvalues_ND = torch.linalg.eigvalsh(output_moment_NDD.to(torch.float64))
    smallest_N1 = _RANK_TOLERANCE * eigenvalues_ND[:, -1:].clamp(min=0)
    return torch.count_nonzero(eigenvalues_ND > smallest_N1, dim=1)


def factor_outputs(problem: LayerProblem, output_moment_NDD: torch.Tensor) -> OutputFactors:
    """Order, damp and factor the output moments of all heads; heads that are not worth it keep their diagonal.

    Raises:
        NumericalError: a moment is not finite or cannot be factored.
    """
    if not bool(torch.isfinite(output_moment_NDD).all()):
        raise NumericalError(
            f"{problem.name}: output moment",
            expected="finite values",
            found="NaN or infinity",
            action="Check the model's weights and the calibration text; an overflow in float16 is the usual cause.",
        )
    moment_NDD = output_moment_NDD.to(torch.float64)
    head_size = moment_NDD.shape[1]
    is_diagonal_N = coupling(moment_NDD) < SMALLEST_COUPLING
    is_poor_N = ~is_diagonal_N & (ranks(moment_NDD) < SMALLEST_RANK_SHARE * head_size)
    is_coupled_N = ~(is_diagonal_N | is_poor_N)
    diagonal_NDD = torch.diag_embed(moment_NDD.diagonal(dim1=1, dim2=2))
    used_NDD = torch.where(is_coupled_N[:, None, None], moment_NDD, diagonal_NDD)
    factors = [_factor_head(problem, head, used_DD) for head, used_DD in enumerate(used_NDD.unbind())]
    order_ND = torch.stack([factor.order_I for factor in factors])
    heads_N11 = torch.arange(len(factors), device=order_ND.device)[:, None, None]
    return OutputFactors(
        order_ND=order_ND,
        upper_NDD=torch.stack([factor.upper_II for factor in factors]).to(problem.settings.dtype),
        moment_NDD=moment_NDD[heads_N11, order_ND[:, :, None], order_ND[:, None, :]],
        is_coupled_N=is_coupled_N,
        notes=_notes(problem, factors, is_diagonal_N, is_poor_N),
    )


def _factor_head(problem: LayerProblem, head: int, moment_DD: torch.Tensor) -> Factor:
    """Factor in float64: it costs nothing at this size, and nothing is lost where the moment is nearly singular."""
    return factor_moment(
        moment_DD,
        name=problem.name,
        order=problem.settings.row_order,
        group_size=len(moment_DD),
        damp_ratio=problem.settings.damp_ratio,
        dtype=torch.float64,
        what=f"output moment of head {head}",
    )


def _notes(
    problem: LayerProblem, factors: list[Factor], is_diagonal_N: torch.Tensor, is_poor_N: torch.Tensor
) -> tuple[str, ...]:
    notes = []
    if num_diagonal := int(is_diagonal_N.sum()):
        notes.append(
            f"{num_diagonal} of {len(factors)} heads were solved without their output moment, "
            "because it is zero or nearly diagonal"
        )
    if num_poor := int(is_poor_N.sum()):
        notes.append(
            f"{num_poor} of {len(factors)} heads were solved without their output moment, "
            "because its rank is less than half of the head dimension"
        )
    asked = problem.settings.damp_ratio
    raised = [factor.damp_ratio_used for factor in factors if factor.damp_ratio_used > asked]
    if raised:
        notes.append(
            f"damping was raised from {asked:g} to as much as {max(raised):g} of the mean diagonal in {len(raised)} of "
            f"{len(factors)} heads, because the output moment could not be factored"
        )
    return tuple(notes)
