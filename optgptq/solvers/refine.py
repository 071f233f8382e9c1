"""Refinement of a finished solution: better scales for its codes, better codes for its scales, in turn.

Each row's loss `(Q - target) H (Q - target)^T`, with the *undamped* moment, falls or stays. A round is the exact
scales (`optgptq.solvers.refit_scales`), then sweeps of coordinate descent over the codes
(`optgptq.solvers.descend`); the last round is followed by the scales once more. Zero points stay. It asks for codes
and scales only, so it serves every solver, rounding to nearest too.

Rows that meet are refined one after the other: with all others of its head held, a row has a problem of its own
whose target takes their errors in.

Shapes: `O` rows, `I` columns, `G` groups, `R` rows that are refined at once, `N` heads, `D` rows of a head.
Columns and groups are in the walk's order inside, groups contiguous. Arithmetic is in `dtype`, loss sums in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from optgptq.affine_weight import AffineWeight
from optgptq.native.group import path_for
from optgptq.solvers.lanes import Lanes, Plan, WalkColumns
from optgptq.solvers.long_rows import LongRows
from optgptq.solvers.problem import SolverSettings

# Rows refined at once: bounds the memory.
_ROWS = 2048


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Refined:
    """A refined weight.

    Attributes:
        weight: the same grids' zero points with new scales and codes; scales have the dtype they had.
        row_loss_O: float64 `[O]`, loss of each row under the undamped moment; where rows meet, each row's part of
            what its head loses.
    """

    weight: AffineWeight
    row_loss_O: torch.Tensor


def refine(
    target_OI: torch.Tensor,
    moment_II: torch.Tensor,
    weight: AffineWeight,
    settings: SolverSettings,
    *,
    rounds: int = 2,
) -> Refined:
    """Return the weight refined towards a target; no row loses more than before.

    Args:
        target_OI: what the weight should be, `[O, I]`, any float dtype.
        moment_II: undamped input moment; columns without one keep their codes.
        weight: a solution; changed nowhere.
        settings: `scale_refit`, `code_sweeps`, `dtype` and `backend` count.
        rounds: how often scales and codes take turns.

    Raises:
        ValueError: the columns of a group are scattered (`group_index_I`).
    """
    columns, plan = WalkColumns.of(moment_II.to(settings.dtype), weight), _plan(settings, rounds)
    path = path_for(plan.backend, columns.moment_II)
    parts, losses = [], []
    for begin in range(0, weight.out_features, _ROWS):
        old, target_RI = _rows(weight, slice(begin, begin + _ROWS)), target_OI[begin : begin + _ROWS].to(settings.dtype)
        if path is None:
            part, loss_R = _refine_lanes(target_RI, columns, old, plan)
        else:
            part, loss_R = LongRows(target_RI, columns, old).refined(path, plan)
        parts.append(part)
        losses.append(loss_R)
    return Refined(weight=_joined(parts, weight), row_loss_O=torch.cat(losses))


def _refine_lanes(
    target_RI: torch.Tensor, columns: WalkColumns, old: AffineWeight, plan: Plan
) -> tuple[AffineWeight, torch.Tensor]:
    """Return some rows refined, and float64 `[R]`, what they lose."""
    target_IR, lanes = columns.arranged(target_RI), columns.lanes(old, target_RI.dtype)
    before_R = columns.losses(target_IR - lanes.levels(columns))
    lanes.improve(target_IR, columns, plan)
    after_R = columns.losses(target_IR - lanes.levels(columns))
    # Also what is lower by less than the arithmetic can tell is no gain.
    is_better_R = after_R < before_R
    return columns.weight(lanes, old, is_better_R), torch.where(is_better_R, after_R, before_R)


def refine_two_sided(
    target_NDI: torch.Tensor,
    input_moment_II: torch.Tensor,
    output_moment_NDD: torch.Tensor,
    weight: AffineWeight,
    settings: SolverSettings,
    *,
    rounds: int = 1,
) -> Refined:
    """Return the weight refined under `tr(B X H X^T)` of each head; no head loses more than before.

    Row `i` of every head is refined at once, for `i` from first to last, `rounds` times, towards
    `w_i - sum_{k != i} B_ik / B_ii (Q_k - w_k)`. Further arguments as those of `refine`.

    Args:
        target_NDI: what the weight should be.
        input_moment_II: `H`, undamped.
        output_moment_NDD: `B`, undamped; a row without one is refined by itself.
        weight: a solution, `O = N * D` rows, head by head.

    Raises:
        ValueError: the columns of a group are scattered (`group_index_I`).
    """
    shape_NDI, head_size = target_NDI.shape, target_NDI.shape[1]
    columns, plan = WalkColumns.of(input_moment_II.to(settings.dtype), weight), _plan(settings, 1)
    lanes = columns.lanes(weight, settings.dtype)
    target_IR = columns.arranged(target_NDI.flatten(0, 1).to(settings.dtype))
    error_NDI = (target_IR - lanes.levels(columns)).T.reshape(shape_NDI)
    before_ND = columns.coupled_losses(error_NDI, output_moment_NDD)
    share_NDD = _shares(output_moment_NDD).to(settings.dtype)
    target_DIN = target_IR.view(len(target_IR), -1, head_size).permute(2, 0, 1).contiguous()
    lanes_D = lanes.interleaved(head_size)
    for _ in range(rounds):
        changed = False
        for row, row_lanes in enumerate(lanes_D):
            others_NI = torch.bmm(share_NDD[:, row : row + 1], error_NDI)[:, 0]
            changed |= row_lanes.improve(target_DIN[row] + others_NI.T, columns, plan)
            error_NDI[:, row] = (target_DIN[row] - row_lanes.levels(columns)).T
        if not changed:
            break
    after_ND = columns.coupled_losses(error_NDI, output_moment_NDD)
    is_better_N = after_ND.sum(dim=1) < before_ND.sum(dim=1)
    taken_O = is_better_N.repeat_interleave(head_size)
    refined = _joined([columns.weight(Lanes.joined(lanes_D), weight, taken_O)], weight)
    loss_ND = torch.where(is_better_N[:, None], after_ND, before_ND)
    return Refined(weight=refined, row_loss_O=loss_ND.reshape(-1))


def _plan(settings: SolverSettings, rounds: int) -> Plan:
    return Plan(
        scale_refit=settings.scale_refit,
        code_sweeps=settings.code_sweeps,
        rounds=rounds,
        backend=settings.backend,
    )


def _shares(output_moment_NDD: torch.Tensor) -> torch.Tensor:
    """Return float64 `B_ik / B_ii` with zeros on the diagonal, `[N, D, D]`; rows without a moment are zero."""
    moment_NDD = output_moment_NDD.to(torch.float64)
    diagonal_ND1 = moment_NDD.diagonal(dim1=1, dim2=2)[:, :, None]
    share_NDD = torch.where(diagonal_ND1 > 0, moment_NDD / diagonal_ND1, 0.0)
    share_NDD.diagonal(dim1=1, dim2=2).zero_()
    return share_NDD


def _rows(weight: AffineWeight, rows: slice) -> AffineWeight:
    return replace(
        weight,
        codes_OI=weight.codes_OI[rows],
        scale_OG=weight.scale_OG[rows],
        zero_point_OG=weight.zero_point_OG[rows],
    )


def _joined(parts: Sequence[AffineWeight], weight: AffineWeight) -> AffineWeight:
    return replace(
        weight,
        codes_OI=torch.cat([part.codes_OI for part in parts]).contiguous(),
        scale_OG=torch.cat([part.scale_OG for part in parts]).contiguous(),
        zero_point_OG=torch.cat([part.zero_point_OG for part in parts]).contiguous(),
    )
