"""GPTQ: errors of rounded columns are compensated in the columns that are still free.

Source: GPTQ (arXiv 2210.17323); the walk itself is in `optgptq.solvers.walk`. Beyond the paper: dynamic grids are read
from weights that carry all compensation so far (published code reads them from weights that lack that of the running
block), and with the search `walk` several grids of a group are walked and the one that really costs least is kept.

Arithmetic is in `SolverSettings.dtype`; scales are rounded for storage before any code is chosen on them.

Shapes: `O` rows, `I` columns in the walk's order, `G` groups, `L` columns of a group, `K` candidate grids.
"""

from __future__ import annotations

import time

import torch

from optgptq.affine_weight import AffineWeight
from optgptq.grids.affine import nearest_codes
from optgptq.grids.search import ErrorPrice, find_grids
from optgptq.grids.settings import GridSettings
from optgptq.solvers.factor import Factor, factor_moment
from optgptq.solvers.losses import factored_energy
from optgptq.solvers.problem import LayerProblem, LayerSolution
from optgptq.solvers.walk import ColumnGrids, ColumnWalk

# Grids of a group that are walked where the search asks for it; more gains little (docs/log.md).
NUM_WALKED_GRIDS = 4
# Rows of one walk: bounds its memory, and keeps a group of columns near the processor.
_ROWS = 2048


def solve(problem: LayerProblem) -> LayerSolution:
    """Return the GPTQ solution of one linear.

    Raises:
        NumericalError: the moment is not finite or cannot be factored.
    """
    started = time.perf_counter()
    grid, settings = problem.grid, problem.settings
    weight_OI = problem.weight_OI.to(settings.dtype)
    num_rows, num_columns = weight_OI.shape
    group_size = num_columns if grid.group_size == -1 else grid.group_size
    if settings.order in ("activation", "min_pivot") and grid.group_grids == "dynamic" and group_size < num_columns:
        raise ValueError(f"{settings.order} order scatters groups: it needs static grids")
    factor = factor_moment(
        problem.input_moment_II,
        name=problem.name,
        order=settings.order,
        group_size=group_size,
        damp_ratio=settings.damp_ratio,
        dtype=settings.dtype,
    )
    parts = [
        _Rows(weight_OI[begin : begin + _ROWS], factor, grid, group_size, settings.column_block)
        for begin in range(0, num_rows, _ROWS)
    ]
    losses = [rows.solve() for rows in parts]
    energy_O, loss_O, rtn_loss_O = (torch.cat(part) for part in zip(*losses, strict=True))
    return LayerSolution(
        weight=_collect(parts, grid, group_size),
        row_energy_O=energy_O,
        row_loss_O=loss_O,
        row_rtn_loss_O=rtn_loss_O,
        row_clipped_O=torch.cat([rows.clipped_O for rows in parts]).to(torch.float64) / num_columns,
        damp_ratio_used=factor.damp_ratio_used,
        num_dead_inputs=int(factor.dead_I.sum()),
        seconds=time.perf_counter() - started,
        notes=_notes(problem, factor),
    )


def _num_walked(grid: GridSettings) -> int:
    return NUM_WALKED_GRIDS if grid.search == "walk" and grid.group_grids == "dynamic" else 1


class _Rows:
    """Some rows of a weight on their way through the walk; columns are in the walk's order."""

    def __init__(
        self, weight_OI: torch.Tensor, factor: Factor, grid: GridSettings, group_size: int, column_block: int
    ) -> None:
        num_rows, num_columns = weight_OI.shape
        self.grid = grid
        self.group_size = group_size
        self.column_block = column_block
        self.order_I = factor.order_I
        self.upper_II = factor.upper_II
        self.added_I = factor.added_I
        self.weight_IO = weight_OI.T[factor.order_I].contiguous()
        self.error_IO = torch.empty_like(self.weight_IO)
        self.codes_IO = torch.empty(num_columns, num_rows, dtype=torch.uint8, device=weight_OI.device)
        self.clipped_O = torch.zeros(num_rows, dtype=torch.int64, device=weight_OI.device)
        self.scale_GO = weight_OI.new_empty(num_columns // group_size, num_rows)
        self.zero_point_GO = torch.empty_like(self.scale_GO)
        self.group_of_column = (factor.order_I // group_size).tolist()

    def solve(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Round all columns; return the losses."""
        if self.grid.group_grids == "static":
            self._walk_static()
        else:
            for begin in range(0, self.weight_IO.shape[0], self.group_size):
                self._walk_group(begin)
        return self._losses()

    def _walk_static(self) -> None:
        self._find_static_grids()
        grids = ColumnGrids(
            scale_GR=self.scale_GO,
            zero_point_GR=self.zero_point_GO,
            grid_of_column=self.group_of_column,
            max_code=self.grid.max_code,
        )
        pending_IO = torch.zeros_like(self.weight_IO)
        walk = ColumnWalk(self.weight_IO, self.upper_II, pending_IO, grids, column_block=self.column_block)
        walk.run()
        scale_IO, zero_point_IO = self.scale_GO[self.group_of_column], self.zero_point_GO[self.group_of_column]
        self.codes_IO.copy_(walk.steps_CR + zero_point_IO)
        self.error_IO.copy_(walk.error_CR)
        self._count_clipped(0, walk.weighted_errors(), scale_IO)

    def original_codes(self) -> torch.Tensor:
        """Return the codes `[O, I]` with columns in the model's order."""
        codes_IO = torch.empty_like(self.codes_IO)
        codes_IO[self.order_I] = self.codes_IO
        return codes_IO.T

    def _losses(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return float64 `[O]`: energy of the weight, loss of the solution, loss of the nearest codes on its grids."""
        scale_IO, zero_point_IO = self.scale_GO[self.group_of_column], self.zero_point_GO[self.group_of_column]
        codes_IO, _ = nearest_codes(self.weight_IO, scale_IO, zero_point_IO, self.grid.max_code)
        nearest_error_IO = codes_IO.sub_(zero_point_IO).mul_(scale_IO).sub_(self.weight_IO)
        energy_O, loss_O, rtn_loss_O = (
            factored_energy(part_IO, self.upper_II, self.added_I)
            for part_IO in (self.weight_IO, self.error_IO, nearest_error_IO)
        )
        return energy_O, loss_O, rtn_loss_O

    def _find_static_grids(self) -> None:
        groups_I = torch.tensor(self.group_of_column, device=self.weight_IO.device)
        for group in range(self.scale_GO.shape[0]):
            columns_L = (groups_I == group).nonzero().squeeze(1)
            upper_LL = self.upper_II[columns_L][:, columns_L]
            scale_KO, zero_point_KO = find_grids(self.weight_IO[columns_L], _price(upper_LL), self.grid, count=1)
            self.scale_GO[group], self.zero_point_GO[group] = scale_KO[0], zero_point_KO[0]

    def _walk_group(self, begin: int) -> None:
        """Find the grid of the group that starts at column `begin` from its columns as they stand, and walk it."""
        end = begin + self.group_size
        upper_LL = self.upper_II[begin:end, begin:end]
        weight_LO = self.weight_IO[begin:end]
        pending_LO = self.upper_II[:begin, begin:end].T @ self.error_IO[:begin]
        current_LO = weight_LO + torch.linalg.solve_triangular(upper_LL.T, pending_LO, upper=False)
        count = _num_walked(self.grid)
        scale_KO, zero_point_KO = find_grids(current_LO, _price(upper_LL), self.grid, count=count)
        grids = ColumnGrids(
            scale_GR=scale_KO.reshape(1, -1),
            zero_point_GR=zero_point_KO.reshape(1, -1),
            grid_of_column=[0] * self.group_size,
            max_code=self.grid.max_code,
        )
        # Each row stands there `count` times: [L, O] -> [L, K * O].
        weight_LR, pending_LR = weight_LO.repeat(1, count), pending_LO.repeat(1, count)
        walk = ColumnWalk(weight_LR, upper_LL, pending_LR, grids, column_block=self.column_block)
        walk.run()
        # Errors of earlier columns and of this group together, in units of what they cost.
        weighted_LKO = walk.weighted_errors().view(self.group_size, count, -1).add_(pending_LO[:, None])
        best_O = weighted_LKO.square().sum(dim=0).argmin(dim=0)
        group = self.group_of_column[begin]
        self.scale_GO[group] = _of_candidate(scale_KO, best_O)
        self.zero_point_GO[group] = _of_candidate(zero_point_KO, best_O)
        self.error_IO[begin:end] = _of_candidate(walk.error_CR.view(self.group_size, count, -1), best_O)
        steps_LO = _of_candidate(walk.steps_CR.view(self.group_size, count, -1), best_O)
        self.codes_IO[begin:end] = steps_LO + self.zero_point_GO[group]
        self._count_clipped(begin, _of_candidate(weighted_LKO, best_O), self.scale_GO[group])

    def _count_clipped(self, begin: int, weighted_CO: torch.Tensor, scale: torch.Tensor) -> None:
        """Count weights more than half a step from their level when they were rounded.

        `weighted_CO` is `sum_{i<=j} D_i P_ij`; over `P_jj` it is how far column `j` stood from its level. `scale` is
        `[O]` or `[C, O]`.
        """
        end = begin + weighted_CO.shape[0]
        distance_CO = weighted_CO / self.upper_II.diagonal()[begin:end, None]
        self.clipped_O += (distance_CO.abs_() > scale.abs() * _HALF_STEP).sum(dim=0)


# Half a step, and room for the rounding of float32 where a weight lies in the middle of two levels.
_HALF_STEP = 0.5 * (1 + 1e-3)


def _price(upper_LL: torch.Tensor) -> ErrorPrice:
    return ErrorPrice(upper_LL.diagonal().square(), upper_LL @ upper_LL.T)


def _of_candidate(values: torch.Tensor, best_O: torch.Tensor) -> torch.Tensor:
    """Return `[..., O]` of `[..., K, O]`: for every row the entry of its best candidate."""
    index = best_O.expand(*values.shape[:-2], 1, -1)
    return values.gather(-2, index).squeeze(-2)


def _collect(parts: list[_Rows], grid: GridSettings, group_size: int) -> AffineWeight:
    return AffineWeight(
        codes_OI=torch.cat([rows.original_codes() for rows in parts]).contiguous(),
        scale_OG=torch.cat([rows.scale_GO.T for rows in parts]).to(torch.float32).contiguous(),
        zero_point_OG=torch.cat([rows.zero_point_GO.T for rows in parts]).to(torch.int32).contiguous(),
        bits=grid.bits,
        group_size=group_size,
        symmetric=grid.symmetric,
    )


def _notes(problem: LayerProblem, factor: Factor) -> tuple[str, ...]:
    if factor.damp_ratio_used <= problem.settings.damp_ratio:
        return ()
    return (
        f"damping was raised from {problem.settings.damp_ratio:g} to {factor.damp_ratio_used:g} of the mean diagonal, "
        "because the input moment could not be factored",
    )
