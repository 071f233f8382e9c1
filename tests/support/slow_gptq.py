"""GPTQ as the paper writes it down, in float64 and column by column: the reference that the solver is compared with.

Damped Hessian, its inverse, the upper Cholesky factor `U` of the inverse, and for every column `W -= e U` over all
columns behind it. Nothing of `optgptq.solvers` is used. Source: GPTQ (arXiv 2210.17323), algorithm 1.

Shapes: `O` rows, `I` columns, `G` groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class SlowSolution:
    """Result of the slow walk; codes, scales and zero points in the model's column order.

    Attributes:
        errors_OI: `E`, normalised error of each step, in the walk's order.
        upper_II: `U`, in the walk's order.
        damped_II: the damped Hessian in the walk's order.
    """

    codes_OI: torch.Tensor
    scale_OG: torch.Tensor
    zero_point_OG: torch.Tensor
    errors_OI: torch.Tensor
    upper_II: torch.Tensor
    damped_II: torch.Tensor


def slow_gptq(
    weight_OI: torch.Tensor,
    moment_II: torch.Tensor,
    *,
    bits: int,
    symmetric: bool,
    group_size: int,
    order: list[int],
    static: bool = False,
    damp_ratio: float = 0.01,
    grids: tuple[torch.Tensor, torch.Tensor] | None = None,
    smallest_zero_point: int = 0,
) -> SlowSolution:
    """Walk the columns in `order`; `grids` (scale and zero point `[O, G]`) takes the place of min-max grids."""
    num_rows, num_columns = weight_OI.shape
    size = num_columns if group_size == -1 else group_size
    hessian_II = _with_live_diagonal(moment_II.double())
    diagonal_I = moment_II.double().diagonal()
    mean = float(diagonal_I[diagonal_I > 0].mean()) if bool((diagonal_I > 0).any()) else 1.0
    damped_II = hessian_II[order][:, order] + damp_ratio * mean * torch.eye(num_columns, dtype=torch.float64)
    upper_II = torch.linalg.cholesky(torch.linalg.inv(damped_II), upper=True)
    current_OI = weight_OI.double()[:, order].clone()
    codes_OI = torch.empty(num_rows, num_columns, dtype=torch.uint8)
    errors_OI = torch.empty_like(current_OI)
    scale_OG = torch.zeros(num_rows, num_columns // size, dtype=torch.float64)
    zero_point_OG = torch.zeros_like(scale_OG)
    found: set[int] = set()
    for place in range(num_columns):
        group = order[place] // size
        if group not in found:
            found.add(group)
            if grids is not None:
                scale_OG[:, group], zero_point_OG[:, group] = grids[0][:, group], grids[1][:, group]
            else:
                places = [later for later in range(num_columns) if order[later] // size == group]
                columns_OL = weight_OI.double()[:, [order[p] for p in places]] if static else current_OI[:, places]
                scale_OG[:, group], zero_point_OG[:, group] = slow_minmax(
                    columns_OL, bits=bits, symmetric=symmetric, smallest_zero_point=smallest_zero_point
                )
        scale_O, zero_point_O = scale_OG[:, group], zero_point_OG[:, group]
        column_O = current_OI[:, place].clone()
        code_O = ((column_O / scale_O).round() + zero_point_O).clamp(0, 2**bits - 1)
        error_O = (column_O - scale_O * (code_O - zero_point_O)) / upper_II[place, place]
        current_OI[:, place:] -= error_O[:, None] * upper_II[place, place:]
        errors_OI[:, place] = error_O
        codes_OI[:, order[place]] = code_O.to(torch.uint8)
    return SlowSolution(
        codes_OI=codes_OI,
        scale_OG=scale_OG,
        zero_point_OG=zero_point_OG,
        errors_OI=errors_OI,
        upper_II=upper_II,
        damped_II=damped_II,
    )


def slow_minmax(
    columns_OL: torch.Tensor, *, bits: int, symmetric: bool, smallest_zero_point: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scale and zero point of each row of a group, the scale rounded to bfloat16 and float16."""
    scales, zero_points = [], []
    for row_L in columns_OL.tolist():
        low, high = min(0.0, *row_L), max(0.0, *row_L)
        if symmetric:
            scale = _stored(2 * max(-low, high) / (2**bits - 1))
            zero_point = 2 ** (bits - 1)
        else:
            scale = _stored((high - low) / (2**bits - 1))
            zero_point = max(smallest_zero_point, min(2**bits - 1, round(-low / scale)))
        scales.append(scale)
        zero_points.append(float(zero_point))
    return torch.tensor(scales, dtype=torch.float64), torch.tensor(zero_points, dtype=torch.float64)


def slow_order(moment_II: torch.Tensor, order: str, *, group_size: int, damp_ratio: float = 0.01) -> list[int]:
    """Return the original column at each place of the walk."""
    hessian_II = _with_live_diagonal(moment_II.double())
    diagonal = hessian_II.diagonal().tolist()
    columns = list(range(len(diagonal)))
    if order == "natural":
        return columns
    if order == "activation":
        return sorted(columns, key=lambda column: -diagonal[column])
    if order == "group_aware":
        size = len(columns) if group_size == -1 else group_size
        groups = [columns[begin : begin + size] for begin in range(0, len(columns), size)]
        groups = [sorted(group, key=lambda column: -diagonal[column]) for group in groups]
        return [column for group in sorted(groups, key=lambda group: -diagonal[group[0]]) for column in group]
    if order == "min_pivot":
        alive = moment_II.double().diagonal() > 0
        damp = damp_ratio * float(moment_II.double().diagonal()[alive].mean())
        return slow_min_pivot(hessian_II + damp * torch.eye(len(columns), dtype=torch.float64))
    raise ValueError(order)


def slow_min_pivot(damped_II: torch.Tensor) -> list[int]:
    """Eliminate the smallest remaining diagonal entry with an explicit Schur complement, again and again."""
    remaining = list(range(damped_II.shape[0]))
    schur = damped_II.clone()
    eliminated = []
    while remaining:
        place = int(schur.diagonal().argmin())
        eliminated.append(remaining.pop(place))
        keep = [index for index in range(schur.shape[0]) if index != place]
        column = schur[keep, place]
        schur = schur[keep][:, keep] - torch.outer(column, column) / schur[place, place]
    return eliminated[::-1]


def pivots(damped_II: torch.Tensor, order: list[int]) -> torch.Tensor:
    """Return `1 / U_jj**2` in the walk's order: what one squared error of each column costs."""
    upper_II = torch.linalg.cholesky(torch.linalg.inv(damped_II[order][:, order]), upper=True)
    pivots_I: torch.Tensor = upper_II.diagonal().pow(-2)
    return pivots_I


def _with_live_diagonal(moment_II: torch.Tensor) -> torch.Tensor:
    """Give columns without any activation the mean diagonal of the others."""
    hessian_II = moment_II.clone()
    diagonal_I = moment_II.diagonal()
    dead_I = diagonal_I <= 0
    hessian_II.diagonal()[dead_I] = float(diagonal_I[~dead_I].mean()) if not bool(dead_I.all()) else 1.0
    return hessian_II


def _stored(scale: float) -> float:
    rounded = float(torch.tensor(scale, dtype=torch.float32).to(torch.bfloat16).to(torch.float16))
    return rounded if rounded else 2.0**-24
