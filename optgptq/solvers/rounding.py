"""One group of columns: its grids are found, walked, and of every row the cheapest is kept.

This is the inner step of every solver that walks columns (`optgptq.solvers.walk`); rows do not influence each other.
Nothing that is passed in is changed. Arithmetic is in the dtype of the weight.

Shapes: `L` columns of a group, `O` rows, `G` grids, `K` candidate grids.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from optgptq.grids.search import ErrorPrice, ScanSteps, find_grids, scan_steps
from optgptq.grids.settings import GridSettings
from optgptq.native.group import GivenGrids, GridScan, Walked, path_for, search_grids, walk_given, walk_searched
from optgptq.native.library import Backend
from optgptq.solvers.walk import ColumnGrids, ColumnWalk

# Grids of a group that are walked where the search asks for it; more gains little (docs/log.md).
NUM_WALKED_GRIDS = 4
# Half a step, and room for the rounding of float32 where a weight lies in the middle of two levels.
HALF_STEP = 0.5 * (1 + 1e-3)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class RoundedColumns:
    """Columns that were walked on given grids.

    Attributes:
        error_LO: `D`, the weight minus its level.
        codes_LO: uint8.
        weighted_LO: `sum_{i<=j} D_i P_ij` with the pending sums in it: the square is what column `j` costs.
        clipped_O: int64, weights more than half a step from their level when they were rounded.
    """

    error_LO: torch.Tensor
    codes_LO: torch.Tensor
    weighted_LO: torch.Tensor
    clipped_O: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class RoundedGroup:
    """A group that was walked, and the grid that was found for each of its rows.

    Attributes:
        error_LO, codes_LO, weighted_LO, clipped_O: as those of `RoundedColumns`.
        scale_O: storable scale.
        zero_point_O: in the dtype of the scale.
    """

    error_LO: torch.Tensor
    codes_LO: torch.Tensor
    weighted_LO: torch.Tensor
    clipped_O: torch.Tensor
    scale_O: torch.Tensor
    zero_point_O: torch.Tensor


def round_group(
    weight_LO: torch.Tensor,
    pending_LO: torch.Tensor,
    upper_LL: torch.Tensor,
    grid: GridSettings,
    *,
    column_block: int,
    backend: Backend = "auto",
    steps: ScanSteps | None = None,
) -> RoundedGroup:
    """Return the group rounded on the grid that its columns ask for as they stand.

    With dynamic grids and the search `walk`, several grids are walked and of every row the one is kept whose
    weighted errors have the smallest sum of squares.

    Args:
        weight_LO: the dense weight.
        pending_LO: `sum_i D_i P_ij` over the columns before this group.
        upper_LL: the group's block of `P`, upper triangular; entries below the diagonal are zero.
        grid: grid settings.
        column_block: columns that update each other one by one; wider ranges are updated by products.
        backend: who does it; `torch` is the definition of the others.
        steps: those of `scan_steps`, for many calls with little work in each.
    """
    count = num_walked(grid)
    path = path_for(backend, weight_LO, pending_LO, upper_LL)
    if path is not None and grid.search != "hessian":
        scan = grid_scan(upper_LL.diagonal().square(), grid, count, steps)
        walked = walk_searched(path, weight_LO, pending_LO, upper_LL, scan, half_step=HALF_STEP)
        assert walked.scale_O is not None
        assert walked.zero_point_O is not None
        return _with_grids(walked, walked.scale_O, walked.zero_point_O)
    current_LO = weight_LO + torch.linalg.solve_triangular(upper_LL.T, pending_LO, upper=False)
    scale_KO, zero_point_KO = find_grids(current_LO, error_price(upper_LL), grid, count=count)
    if count > 1:
        return _cheapest_walk(weight_LO, pending_LO, upper_LL, (scale_KO, zero_point_KO), grid, column_block)
    grids = ColumnGrids(
        scale_GR=scale_KO, zero_point_GR=zero_point_KO, grid_of_column=[0] * len(weight_LO), max_code=grid.max_code
    )
    single = round_on_grids(weight_LO, pending_LO, upper_LL, grids, column_block=column_block, backend=backend)
    return _with_grids(single, scale_KO[0], zero_point_KO[0])


def round_on_grids(
    weight_LO: torch.Tensor,
    pending_LO: torch.Tensor,
    upper_LL: torch.Tensor,
    grids: ColumnGrids,
    *,
    column_block: int,
    backend: Backend = "auto",
) -> RoundedColumns:
    """Return columns rounded on given grids; arguments as those of `round_group`."""
    path = path_for(backend, weight_LO, pending_LO, upper_LL, grids.scale_GR)
    if path is not None:
        walked = walk_given(
            path,
            weight_LO,
            pending_LO,
            upper_LL,
            GivenGrids(grids.scale_GR, grids.zero_point_GR, grids.grid_of_column, grids.max_code),
            half_step=HALF_STEP,
        )
        return RoundedColumns(
            error_LO=walked.error_LO,
            codes_LO=walked.codes_LO,
            weighted_LO=walked.weighted_LO,
            clipped_O=walked.clipped_O,
        )
    walk = ColumnWalk(weight_LO, upper_LL, pending_LO.clone(), grids, column_block=column_block)
    walk.run()
    weighted_LO = walk.weighted_errors().add_(pending_LO)
    scale_LO = grids.scale_GR[list(grids.grid_of_column)]
    zero_point_LO = grids.zero_point_GR[list(grids.grid_of_column)]
    return RoundedColumns(
        error_LO=walk.error_CR,
        codes_LO=(walk.steps_CR + zero_point_LO).to(torch.uint8),
        weighted_LO=weighted_LO,
        clipped_O=count_clipped(weighted_LO, upper_LL, scale_LO),
    )


def find_group_grids(
    columns_LO: torch.Tensor, price: ErrorPrice, grid: GridSettings, *, backend: Backend = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scale and zero point `[O]`: the best grid of each row for columns that nothing compensates."""
    path = path_for(backend, columns_LO, price.diagonal_L)
    if path is not None and grid.search != "hessian":
        scale_KO, zero_point_KO = search_grids(path, columns_LO, grid_scan(price.diagonal_L, grid, 1))
    else:
        scale_KO, zero_point_KO = find_grids(columns_LO, price, grid, count=1)
    return scale_KO[0], zero_point_KO[0]


def num_walked(grid: GridSettings) -> int:
    """Return how many grids of a group are walked."""
    return NUM_WALKED_GRIDS if grid.search == "walk" and grid.group_grids == "dynamic" else 1


def error_price(upper_LL: torch.Tensor) -> ErrorPrice:
    """Return what GPTQ pays for errors in a group with this block of `P`."""
    return ErrorPrice(upper_LL.diagonal().square(), upper_LL @ upper_LL.T)


def grid_scan(diagonal_L: torch.Tensor, grid: GridSettings, count: int, steps: ScanSteps | None = None) -> GridScan:
    """Return what compiled code is told of the search for grids; `diagonal_L` is what errors in each column cost."""
    shares_K, factors_K = scan_steps(grid, diagonal_L.dtype) if steps is None else steps
    return GridScan(
        price_L=torch.ones_like(diagonal_L) if grid.search == "mse" else diagonal_L,
        shares_K=shares_K[:0] if grid.search == "minmax" else shares_K,
        factors_K=factors_K,
        symmetric=grid.symmetric,
        max_code=grid.max_code,
        smallest_zero_point=grid.smallest_zero_point,
        symmetric_zero_point=grid.symmetric_zero_point,
        count=count,
    )


def count_clipped(weighted_LO: torch.Tensor, upper_LL: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return int64 `[O]`; a weighted error over `P_jj` is how far column `j` stood from its level.

    `scale` is `[O]` or `[L, O]`.
    """
    distance_LO = weighted_LO / upper_LL.diagonal()[:, None]
    return (distance_LO.abs_() > scale.abs() * HALF_STEP).sum(dim=0)


def _cheapest_walk(
    weight_LO: torch.Tensor,
    pending_LO: torch.Tensor,
    upper_LL: torch.Tensor,
    grids_KO: tuple[torch.Tensor, torch.Tensor],
    grid: GridSettings,
    column_block: int,
) -> RoundedGroup:
    """Walk every candidate (scales, zero points) and return of each row the walk that costs least."""
    scale_KO, zero_point_KO = grids_KO
    count = len(scale_KO)
    grids = ColumnGrids(
        scale_GR=scale_KO.reshape(1, -1),
        zero_point_GR=zero_point_KO.reshape(1, -1),
        grid_of_column=[0] * len(weight_LO),
        max_code=grid.max_code,
    )
    # Each row stands there `count` times: [L, O] -> [L, K * O].
    weight_LR, pending_LR = weight_LO.repeat(1, count), pending_LO.repeat(1, count)
    walk = ColumnWalk(weight_LR, upper_LL, pending_LR, grids, column_block=column_block)
    walk.run()
    weighted_LKO = walk.weighted_errors().view(len(weight_LO), count, -1).add_(pending_LO[:, None])
    best_O = weighted_LKO.square().sum(dim=0).argmin(dim=0)
    scale_O, zero_point_O = _of_candidate(scale_KO, best_O), _of_candidate(zero_point_KO, best_O)
    steps_LO = _of_candidate(walk.steps_CR.view_as(weighted_LKO), best_O)
    weighted_LO = _of_candidate(weighted_LKO, best_O)
    return RoundedGroup(
        error_LO=_of_candidate(walk.error_CR.view_as(weighted_LKO), best_O),
        codes_LO=(steps_LO + zero_point_O).to(torch.uint8),
        weighted_LO=weighted_LO,
        clipped_O=count_clipped(weighted_LO, upper_LL, scale_O),
        scale_O=scale_O,
        zero_point_O=zero_point_O,
    )


def _with_grids(walked: RoundedColumns | Walked, scale_O: torch.Tensor, zero_point_O: torch.Tensor) -> RoundedGroup:
    return RoundedGroup(
        error_LO=walked.error_LO,
        codes_LO=walked.codes_LO,
        weighted_LO=walked.weighted_LO,
        clipped_O=walked.clipped_O,
        scale_O=scale_O,
        zero_point_O=zero_point_O,
    )


def _of_candidate(values: torch.Tensor, best_O: torch.Tensor) -> torch.Tensor:
    """Return `[..., O]` of `[..., K, O]`: for every row the entry of its best candidate."""
    index = best_O.expand(*values.shape[:-2], 1, -1)
    return values.gather(-2, index).squeeze(-2)
