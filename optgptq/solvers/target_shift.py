"""The target shift: what a weight should become when its inputs already carry the errors of earlier layers.

With inputs `x` of the quantized stream and `y` of the full-precision one, the output to reach is `W y`. For
`H = E[x x^T]` and `D = E[(y - x) x^T]`, the minimum of `E|V x - W y|^2 + damp |V - W|^2` is

    V = W (I + D H_damped^-1)

and for any `Q`, without damping, `E|Q x - W y|^2 = E|(Q - V) x|^2 + what Q cannot change`. Any solver then runs on
`V` unchanged, its grids searched on `V`. A share `alpha` of the shift may generalize better than all of it.
Source: the ridge solution; GPTAQ (arXiv 2504.02692) approximates it column by column.

Shapes: `O` output rows, `I` input columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from optgptq.solvers.factor import damping_notes, factor_moment


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class ShiftDirection:
    """The whole shift of a weight; `weight + alpha * direction_OI` is the target.

    Attributes:
        direction_OI: `W D H_damped^-1` in the dtype of the gap; zero where no input was seen.
        damp_ratio_used: damping with which the moment could be factored.
        notes: what a user must hear, in plain sentences; empty when the asked damping was enough.
    """

    direction_OI: torch.Tensor
    damp_ratio_used: float
    notes: tuple[str, ...]


def shifted_target(
    weight_OI: torch.Tensor, moment_II: torch.Tensor, cross_II: torch.Tensor, *, alpha: float, damp_ratio: float
) -> torch.Tensor:
    """Return `W (I + alpha D H_damped^-1)` `[O, I]`; arithmetic and result are in the dtype of the moment.

    For one alpha, where nobody is to be told about raised damping; else take `shift_direction`.

    Args:
        weight_OI: `W`.
        moment_II: `H`, undamped, float32 or float64.
        cross_II: `D`, the mean of `(y - x) x^T`: its rows belong to `y - x`.
        alpha: share of the shift; 0 gives the weight itself.
        damp_ratio: as that of `shift_direction`.

    Raises:
        NumericalError: as `shift_direction`.
    """
    weight_OI = weight_OI.to(moment_II.dtype)
    if alpha == 0:
        return weight_OI
    gap_OI = weight_OI @ cross_II.to(moment_II.dtype)
    return weight_OI + alpha * shift_direction(gap_OI, moment_II, damp_ratio=damp_ratio).direction_OI


def shift_direction(
    gap_OI: torch.Tensor, moment_II: torch.Tensor, *, damp_ratio: float, name: str = "target shift"
) -> ShiftDirection:
    """Return `gap H_damped^-1`, in the dtype of the gap, and the damping it took.

    The gap is any mean of `(wanted output - W x) x^T`, `W D` for the drift of the inputs; rows of several linears
    that read the same input may stand one below the other. Inputs that no token reached do not change.

    Args:
        gap_OI: float32 or float64.
        moment_II: `H`, undamped.
        damp_ratio: share of the moment's mean diagonal that is added; more where it cannot be factored otherwise.
        name: module name, for messages.

    Raises:
        NumericalError: the moment is not finite or cannot be factored.
    """
    factor = factor_moment(
        moment_II,
        name=name,
        order="natural",
        group_size=len(moment_II),
        damp_ratio=damp_ratio,
        dtype=gap_OI.dtype,
    )
    # H = P P^T with P upper triangular: first P, then its transpose.
    half_IO = torch.linalg.solve_triangular(factor.upper_II, gap_OI.T, upper=True)
    direction_IO = torch.linalg.solve_triangular(factor.upper_II.T, half_IO, upper=False)
    direction_IO[factor.dead_I] = 0
    return ShiftDirection(
        direction_OI=direction_IO.T.contiguous(),
        damp_ratio_used=factor.damp_ratio_used,
        notes=damping_notes(factor, damp_ratio),
    )
