"""GPTQ: errors of rounded columns are compensated in the columns that are still free.

Source: GPTQ (arXiv 2210.17323); the walk itself is in `optgptq.solvers.walk`. Beyond the paper: dynamic grids are read
from weights that carry all compensation so far (published code reads them from weights that lack that of the running
block), and with the search `walk` several grids of a group are walked and the one that really costs least is kept.

Arithmetic is in `SolverSettings.dtype`; scales are rounded for storage before any code is chosen on them.

Shapes: `O` rows, `I` columns in the walk's order, `G` groups, `L` columns of a group.
"""

from __future__ import annotations

import time

import torch

from optgptq.affine_weight import AffineWeight
from optgptq.grids.affine import nearest_codes
from optgptq.grids.settings import GridSettings
from optgptq.solvers.factor import Factor, damping_notes, factor_problem
from optgptq.solvers.losses import factored_energy, undamped_energy
from optgptq.solvers.problem import LayerProblem, LayerSolution, SolverSettings
from optgptq.solvers.rounding import (
    RoundedColumns,
    RoundedGroup,
    error_price,
    find_group_grids,
    round_group,
    round_on_grids,
)
from optgptq.solvers.walk import ColumnGrids

# Rows of one walk: bounds its memory, and keeps a group of columns near the processor.
_ROWS = 2048
# Columns on static grids that are rounded in one go.
_STATIC_COLUMNS = 128


def solve(problem: LayerProblem) -> LayerSolution:
    """Return the GPTQ solution of one linear.

    Raises:
        NumericalError: the moment is not finite or cannot be factored.
    """
    started = time.perf_counter()
    grid, settings = problem.grid, problem.settings
    num_columns = problem.weight_OI.shape[1]
    group_size, factor = problem.group_size, factor_problem(problem)
    parts, losses = [], []
    for weight_OI in torch.split(problem.weight_OI, _ROWS):
        parts.append(_Rows(weight_OI.to(settings.dtype), factor, grid, group_size, settings))
        losses.append(parts[-1].solve())
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
        notes=damping_notes(factor, settings.damp_ratio),
    )


class _Rows:
    """Some rows of a weight on their way through the walk; columns are in the walk's order."""

    def __init__(
        self, weight_OI: torch.Tensor, factor: Factor, grid: GridSettings, group_size: int, settings: SolverSettings
    ) -> None:
        num_rows, num_columns = weight_OI.shape
        self.grid = grid
        self.group_size = group_size
        self.settings = settings
        self.factor = factor
        self.upper_II = factor.upper_II
        self.weight_IO = weight_OI.T[factor.order_I].contiguous()
        # Sums `sum_i D_i P_ij` over the columns whose errors are known and were handed on so far.
        self.pending_IO = torch.zeros_like(self.weight_IO)
        self.error_IO = torch.empty_like(self.weight_IO)
        self.codes_IO = torch.empty(num_columns, num_rows, dtype=torch.uint8, device=weight_OI.device)
        self.clipped_O = torch.zeros(num_rows, dtype=torch.int64, device=weight_OI.device)
        self.damped_loss_O = torch.zeros(num_rows, dtype=torch.float64, device=weight_OI.device)
        self.scale_GO = weight_OI.new_empty(num_columns // group_size, num_rows)
        self.zero_point_GO = torch.empty_like(self.scale_GO)
        self.group_of_column = (factor.order_I // group_size).tolist()

    def solve(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Round all columns and return the losses; codes and grids are left."""
        num_columns = len(self.group_of_column)
        if self.grid.group_grids == "static":
            self._find_static_grids()
            self._walk(0, num_columns, _STATIC_COLUMNS)
        else:
            self._walk(0, num_columns, self.group_size)
        losses = self._losses()
        # Each takes as much as the rows in the arithmetic of the solve, and other rows are still to come.
        del self.weight_IO, self.pending_IO, self.error_IO
        return losses

    def original_codes(self) -> torch.Tensor:
        """Return the codes `[O, I]` with columns in the model's order."""
        codes_IO = torch.empty_like(self.codes_IO)
        codes_IO[self.factor.order_I] = self.codes_IO
        return codes_IO.T

    def _walk(self, begin: int, end: int, step: int) -> None:
        """Round columns `begin .. end`, `step` at a time; the right half gets the left half's errors in one product."""
        num_steps = -(-(end - begin) // step)
        if num_steps == 1:
            self._round(begin, end)
            return
        middle = begin + num_steps // 2 * step
        self._walk(begin, middle, step)
        self.pending_IO[middle:end].addmm_(self.upper_II[begin:middle, middle:end].T, self.error_IO[begin:middle])
        self._walk(middle, end, step)

    def _round(self, begin: int, end: int) -> None:
        weight_LO, pending_LO = self.weight_IO[begin:end], self.pending_IO[begin:end]
        upper_LL = self.upper_II[begin:end, begin:end]
        block, backend = self.settings.column_block, self.settings.backend
        rounded: RoundedColumns | RoundedGroup
        if self.grid.group_grids == "static":
            grids = ColumnGrids(
                scale_GR=self.scale_GO,
                zero_point_GR=self.zero_point_GO,
                grid_of_column=self.group_of_column[begin:end],
                max_code=self.grid.max_code,
            )
            rounded = round_on_grids(weight_LO, pending_LO, upper_LL, grids, column_block=block, backend=backend)
        else:
            rounded = round_group(weight_LO, pending_LO, upper_LL, self.grid, column_block=block, backend=backend)
            group = self.group_of_column[begin]
            self.scale_GO[group], self.zero_point_GO[group] = rounded.scale_O, rounded.zero_point_O
        self.error_IO[begin:end] = rounded.error_LO
        self.codes_IO[begin:end] = rounded.codes_LO
        self.clipped_O += rounded.clipped_O
        self.damped_loss_O += rounded.weighted_LO.square().sum(dim=0, dtype=torch.float64)

    def _losses(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return float64 `[O]`: energy of the weight, loss of the solution, loss of the nearest codes on its grids."""
        added_I = self.factor.added_I
        scale_IO, zero_point_IO = self.scale_GO[self.group_of_column], self.zero_point_GO[self.group_of_column]
        codes_IO, _ = nearest_codes(self.weight_IO, scale_IO, zero_point_IO, self.grid.max_code)
        nearest_error_IO = codes_IO.sub_(zero_point_IO).mul_(scale_IO).sub_(self.weight_IO)
        return (
            factored_energy(self.weight_IO, self.upper_II, added_I),
            undamped_energy(self.damped_loss_O, self.error_IO, added_I),
            factored_energy(nearest_error_IO, self.upper_II, added_I),
        )

    def _find_static_grids(self) -> None:
        groups_I = torch.tensor(self.group_of_column, device=self.weight_IO.device)
        for group in range(self.scale_GO.shape[0]):
            columns_L = (groups_I == group).nonzero().squeeze(1)
            upper_LL = self.upper_II[columns_L][:, columns_L]
            self.scale_GO[group], self.zero_point_GO[group] = find_group_grids(
                self.weight_IO[columns_L], error_price(upper_LL), self.grid, backend=self.settings.backend
            )


def _collect(parts: list[_Rows], grid: GridSettings, group_size: int) -> AffineWeight:
    return AffineWeight(
        codes_OI=torch.cat([rows.original_codes() for rows in parts]).contiguous(),
        scale_OG=torch.cat([rows.scale_GO.T for rows in parts]).to(torch.float32).contiguous(),
        zero_point_OG=torch.cat([rows.zero_point_GO.T for rows in parts]).to(torch.int32).contiguous(),
        bits=grid.bits,
        group_size=group_size,
        symmetric=grid.symmetric,
    )
