"""The best scales for codes that stay as they are.

For a row with levels `Q = s B`, where row `g` of `B` holds the steps (code minus zero point) of group `g` and zeros
beside them, the loss `(t - Q) H (t - Q)^T` is quadratic in the scales `s`: its minimum solves `B H B^T s = B H t^T`.
Source: TurboBoA (arXiv 2602.04929), scale refinement, solved at once instead of by coordinate descent.

Products are in the dtype of the moment, what is solved from them in float64.

Shapes: `I` columns, `C` columns from some group on, `R` rows, `G` groups. Columns of a group are contiguous.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from optgptq.grids.affine import storable_scale

# Of each group's own energy; it pulls towards the scales of before, not towards zero.
_RIDGE = 1e-6
# A scale that moves by more than this factor says that the group has next to no say in the loss.
_LARGEST_CHANGE = 2.0
_ROUNDED_SWEEPS = 2
# Rows of one product: what it makes stays near the processor.
_ROWS = 256


def refit_scales(
    steps_IR: torch.Tensor,
    error_IR: torch.Tensor,
    scale_GR: torch.Tensor,
    moment_II: torch.Tensor,
    groups: Sequence[slice],
) -> torch.Tensor:
    """Return storable scales `[G, R]` that lose no more than the given ones.

    The exact solution is rounded for storage and taken by the rows whose loss it lowers; then every scale in turn
    moves to the storable one that is best beside all others, which makes up for the rounding.

    Args:
        steps_IR: code minus zero point.
        error_IR: `t - Q` with the given scales.
        scale_GR: the scales of before.
        moment_II: undamped, in the dtype of the rest.
        groups: the columns of each group.
    """
    parts = []
    for begin in range(0, steps_IR.shape[1], _ROWS):
        rows = slice(begin, begin + _ROWS)
        normal_RGG, slope_RG = normal_equations(
            steps_IR[:, rows].contiguous(), error_IR[:, rows].contiguous(), moment_II, groups
        )
        before_RG = scale_GR[:, rows].T.to(torch.float64)
        change_RG = scale_change(normal_RGG, slope_RG)
        rounded_RG = _guarded(before_RG, storable_scale(before_RG + change_RG))
        change_RG = rounded_RG - before_RG
        gain_R = ((2 * slope_RG - torch.einsum("rgk,rk->rg", normal_RGG, change_RG)) * change_RG).sum(dim=1)
        taken_RG = torch.where((gain_R > 0)[:, None], rounded_RG, before_RG)
        parts.append(_settled(normal_RGG, slope_RG, before_RG, taken_RG))
    return torch.cat(parts).T.to(scale_GR.dtype).contiguous()


def normal_equations(
    steps_IR: torch.Tensor, error_IR: torch.Tensor, moment_II: torch.Tensor, groups: Sequence[slice]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return float64 `B H B^T` `[R, G, G]` and `B H (t - Q)^T` `[R, G]`, half the descent of the loss by the scales."""
    num_rows, num_groups = steps_IR.shape[1], len(groups)
    normal_GGR = steps_IR.new_empty(num_groups, num_groups, num_rows)
    slope_GR = _group_sums((moment_II @ error_IR).mul_(steps_IR), groups)
    for index, columns in enumerate(groups):
        weighted_CR = moment_II[columns.start :, columns] @ steps_IR[columns]
        weighted_CR *= steps_IR[columns.start :]
        entries_GR = _group_sums(weighted_CR, groups[index:])
        normal_GGR[index, index:] = entries_GR
        normal_GGR[index:, index] = entries_GR
    return normal_GGR.permute(2, 0, 1).to(torch.float64).contiguous(), slope_GR.T.to(torch.float64).contiguous()


def _group_sums(values_CR: torch.Tensor, groups: Sequence[slice]) -> torch.Tensor:
    """Return `[G, R]`, the sum over the columns of each group; the first of the groups begins at the first column."""
    if len(values_CR) % len(groups) == 0 and groups[0].stop - groups[0].start == len(values_CR) // len(groups):
        return values_CR.view(len(groups), -1, values_CR.shape[1]).sum(dim=1)
    first = groups[0].start
    return torch.stack([values_CR[columns.start - first : columns.stop - first].sum(dim=0) for columns in groups])


def scale_change(normal_RGG: torch.Tensor, slope_RG: torch.Tensor) -> torch.Tensor:
    """Return how each row's scales change to lose least, float64 `[R, G]`; zero where nothing tells."""
    energy_RG = normal_RGG.diagonal(dim1=1, dim2=2)
    size_RG = torch.where(energy_RG > 0, energy_RG, 1.0).sqrt()
    # Groups may differ by orders of magnitude: with a diagonal of ones the ridge means the same to each of them.
    scaled_RGG = normal_RGG / (size_RG[:, :, None] * size_RG[:, None, :])
    scaled_RGG.diagonal(dim1=1, dim2=2).copy_(torch.full_like(size_RG, 1 + _RIDGE))
    lower_RGG, failure_R = torch.linalg.cholesky_ex(scaled_RGG)
    change_RG = torch.cholesky_solve((slope_RG / size_RG)[:, :, None], lower_RGG).squeeze(2) / size_RG
    is_known_RG = (failure_R == 0)[:, None] & (energy_RG > 0) & torch.isfinite(change_RG)
    return torch.where(is_known_RG, change_RG, 0.0)


def _guarded(before_RG: torch.Tensor, after_RG: torch.Tensor) -> torch.Tensor:
    """Return the new scales, and the old ones where the sign changed or the size changed too much."""
    ratio_RG = after_RG / before_RG
    is_sane_RG = (ratio_RG >= 1 / _LARGEST_CHANGE) & (ratio_RG <= _LARGEST_CHANGE)
    return torch.where(is_sane_RG, after_RG, before_RG)


def _settled(
    normal_RGG: torch.Tensor, slope_RG: torch.Tensor, before_RG: torch.Tensor, taken_RG: torch.Tensor
) -> torch.Tensor:
    """Let every scale in turn move to the best storable one beside all others; `slope_RG` is that at `before_RG`."""
    scale_GR = taken_RG.T.contiguous()
    slope_RG = slope_RG - torch.einsum("rgk,rk->rg", normal_RGG, taken_RG - before_RG)
    slope_GR = slope_RG.T.contiguous()
    energy_GR = normal_RGG.diagonal(dim1=1, dim2=2).T.contiguous()
    for _ in range(_ROUNDED_SWEEPS):
        for group in range(len(scale_GR)):
            energy_R, old_R = energy_GR[group], scale_GR[group]
            change_R = torch.where(energy_R > 0, slope_GR[group] / energy_R, 0.0)
            # The bound is to the scale of before, so that steps do not add up beyond it.
            new_R = _guarded(before_RG[:, group], storable_scale(old_R + change_R))
            change_R = new_R - old_R
            gains_R = (2 * slope_GR[group] - energy_R * change_R) * change_R > 0
            change_R = torch.where(gains_R, change_R, 0.0)
            scale_GR[group] += change_R
            slope_GR -= normal_RGG[:, :, group].T * change_R
    return scale_GR.T
