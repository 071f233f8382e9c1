"""Rounding to nearest: every weight to the closest level of its group's grid.

Shapes: `O` rows, `I` columns, `G` groups, `L` columns of a group.
"""

from __future__ import annotations

import time

import torch

from optgptq.affine_weight import AffineWeight
from optgptq.grids.affine import nearest_codes
from optgptq.grids.search import ErrorPrice
from optgptq.solvers.losses import row_losses
from optgptq.solvers.problem import LayerProblem, LayerSolution
from optgptq.solvers.rounding import find_group_grids


def solve(problem: LayerProblem) -> LayerSolution:
    """Return the nearest codes on searched grids. The moment only prices the search and measures the loss.

    Column order, damping and group grids mean nothing here. Since nothing compensates an error, `pivot` and `walk`
    pay the moment's diagonal and `hessian` its diagonal block.
    """
    started = time.perf_counter()
    grid, dtype = problem.grid, problem.settings.dtype
    weight_OI = problem.weight_OI.to(dtype)
    moment_II = problem.input_moment_II.to(dtype)
    num_columns = weight_OI.shape[1]
    group_size = problem.group_size
    scales, zero_points = [], []
    for begin in range(0, num_columns, group_size):
        block_LL = moment_II[begin : begin + group_size, begin : begin + group_size]
        price = ErrorPrice(block_LL.diagonal(), block_LL)
        scale_O, zero_point_O = find_group_grids(
            weight_OI[:, begin : begin + group_size].T, price, grid, backend=problem.settings.backend
        )
        scales.append(scale_O)
        zero_points.append(zero_point_O)
    weight, clipped_O = round_to_nearest(
        weight_OI,
        torch.stack(scales, dim=1),
        torch.stack(zero_points, dim=1),
        bits=grid.bits,
        symmetric=grid.symmetric,
    )
    energy_O, loss_O = row_losses(problem, weight)
    return LayerSolution(
        weight=weight,
        row_energy_O=energy_O,
        row_loss_O=loss_O,
        row_rtn_loss_O=loss_O,
        row_clipped_O=clipped_O,
        damp_ratio_used=0.0,
        num_dead_inputs=int((moment_II.diagonal() <= 0).sum()),
        seconds=time.perf_counter() - started,
    )


def round_to_nearest(
    weight_OI: torch.Tensor, scale_OG: torch.Tensor, zero_point_OG: torch.Tensor, *, bits: int, symmetric: bool
) -> tuple[AffineWeight, torch.Tensor]:
    """Return the nearest codes on given grids, and float64 `[O]`, the share of each row outside its grid."""
    num_rows, num_columns = weight_OI.shape
    grouped_OGL = weight_OI.reshape(num_rows, scale_OG.shape[1], -1)
    codes_OGL, endless_OGL = nearest_codes(grouped_OGL, scale_OG[..., None], zero_point_OG[..., None], (1 << bits) - 1)
    clipped_O = (codes_OGL != endless_OGL).sum(dim=(1, 2)).to(torch.float64) / num_columns
    weight = AffineWeight(
        codes_OI=codes_OGL.reshape(num_rows, num_columns).to(torch.uint8),
        scale_OG=scale_OG.to(torch.float32),
        zero_point_OG=zero_point_OG.to(torch.int32),
        bits=bits,
        group_size=grouped_OGL.shape[2],
        symmetric=symmetric,
    )
    return weight, clipped_O
