"""Some columns of all heads, rounded row after row: each row receives the errors of the rows of its head before it.

What the rows hand to each other is explained in `optgptq.solvers.two_sided`. On processors rows on known grids, and
rows on grids of their own, are one call of compiled code, in whatever order was asked for: the codes are the same.

Shapes: `L` columns, `D` rows of a head in the walk's order, `N` heads, `B` some rows of each head, `G` grids.
Arithmetic is in the dtype of the weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from optgptq.grids.search import scan_steps
from optgptq.grids.settings import GridSettings
from optgptq.native.group import path_for
from optgptq.native.panel import PanelRows, path_for_heads, round_panel_given, round_panel_searched
from optgptq.solvers.coupled_losses import gram
from optgptq.solvers.problem import SolverSettings
from optgptq.solvers.rounding import (
    HALF_STEP,
    RoundedColumns,
    RoundedGroup,
    count_clipped,
    grid_scan,
    num_walked,
    round_group,
    round_on_grids,
)
from optgptq.solvers.walk import ColumnGrids
from optgptq.solvers.wavefront import CoupledRows, round_wavefront

# Rows of one wavefront: more take fewer steps in all, but each step then updates more that is far away.
_WAVE_ROWS = 128


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class PanelGrids:
    """Grids of a panel's columns; the tensors are written to where `grid` is dynamic, and read where it is static.

    Attributes:
        grid: grid settings; dynamic grids are one group.
        scale_GDN, zero_point_GDN: of each grid and row, in the dtype of the weight.
        grid_of_column: index into `G` for each of the `L` columns.
    """

    grid: GridSettings
    scale_GDN: torch.Tensor
    zero_point_GDN: torch.Tensor
    grid_of_column: Sequence[int]

    def of_rows(self, begin: int, end: int) -> ColumnGrids:
        """Return the grids of rows `begin .. end` of all heads, a row `[B, N]` flattened."""
        return ColumnGrids(
            scale_GR=self.scale_GDN[:, begin:end].flatten(1),
            zero_point_GR=self.zero_point_GDN[:, begin:end].flatten(1),
            grid_of_column=self.grid_of_column,
            max_code=self.grid.max_code,
        )


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class PanelResults:
    """What a panel writes.

    Attributes:
        error_LDN: `X`, the weight minus its level, in the dtype of the weight.
        codes_LDN: uint8.
    """

    error_LDN: torch.Tensor
    codes_LDN: torch.Tensor


class Panel:
    """Columns on their way through the walk.

    Attributes:
        clipped_DN: int64, weights more than half a step from their level when they were rounded.
    """

    def __init__(
        self,
        weight_LDN: torch.Tensor,
        pending_LDN: torch.Tensor,
        upper_LL: torch.Tensor,
        output_NDD: torch.Tensor,
        grids: PanelGrids,
        results: PanelResults,
        settings: SolverSettings,
    ) -> None:
        num_columns, head_size, num_heads = weight_LDN.shape
        self.weight_LDN = weight_LDN
        self.pending_LDN = pending_LDN
        self.upper_LL = upper_LL
        self.output_NDD = output_NDD
        self.inverse_DN1 = output_NDD.diagonal(dim1=1, dim2=2).T.reciprocal()[:, :, None]
        self.grids = grids
        self.results = results
        self.settings = settings
        self.steps = scan_steps(grids.grid, weight_LDN.dtype)
        self.row_block = head_size if settings.row_block == -1 else settings.row_block
        self.clipped_DN = torch.empty(head_size, num_heads, dtype=torch.int64, device=weight_LDN.device)
        # `A`, and the sums `R` over the rows that were handed on so far.
        self.own_NDL = weight_LDN.new_empty(num_heads, head_size, num_columns)
        self.earlier_NDL = torch.zeros_like(self.own_NDL)
        self.path = self._path()

    def round(self) -> None:
        """Round all rows."""
        self._walk(0, self.weight_LDN.shape[1], has_grids=self.grids.grid.group_grids == "static")

    def gram(self) -> torch.Tensor:
        """Return `A A^T` of each head, float64 `[N, D, D]`: the panel's part of `X H X^T` with the damped moment."""
        return gram(self.own_NDL)

    def _walk(self, begin: int, end: int, *, has_grids: bool) -> None:
        """Round rows `begin .. end`, which have received the errors of all rows before them."""
        num_rows = end - begin
        if not has_grids and 1 < num_rows <= self.row_block:
            self._find_grids(begin, end)
            has_grids = True
        step = self._rows_at_once(has_grids=has_grids)
        if num_rows <= step:
            if self.path is not None:
                self._round_native(self.path, begin, end, has_grids=has_grids)
            elif has_grids and self.settings.row_mode == "wavefront":
                self._round_wavefront(begin, end)
            else:
                self._round_row(begin, has_grids=has_grids)
            return
        middle = begin + -(-num_rows // step) // 2 * step
        self._walk(begin, middle, has_grids=has_grids)
        self.earlier_NDL[:, middle:end].baddbmm_(
            self.output_NDD[:, begin:middle, middle:end].transpose(1, 2), self.own_NDL[:, begin:middle]
        )
        self._walk(middle, end, has_grids=has_grids)

    def _rows_at_once(self, *, has_grids: bool) -> int:
        if self.path is not None and (has_grids or self.row_block == 1):
            return self.weight_LDN.shape[1]
        if not has_grids:
            return self.row_block
        return _WAVE_ROWS if self.settings.row_mode == "wavefront" else 1

    def _path(self) -> str | None:
        """Return the compiled path that rounds the rows, or None: torch does."""
        backend = self.settings.backend
        path = path_for(backend, self.weight_LDN, self.pending_LDN, self.upper_LL, self.output_NDD)
        if path is None or self.grids.grid.search == "hessian":
            return None
        return path_for_heads(path, self.weight_LDN) if backend == "auto" else path

    def _round_native(self, path: str, begin: int, end: int, *, has_grids: bool) -> None:
        """Round rows one after the other in one call; without grids, each on those that its columns ask for."""
        part, grids = slice(begin, end), self.grids
        own_LDN = torch.empty_like(self.results.error_LDN)
        rows = PanelRows(
            weight_LBN=self.weight_LDN[:, part],
            pending_LBN=self.pending_LDN[:, part],
            upper_LL=self.upper_LL,
            output_BBN=self.output_NDD[:, part, part].permute(1, 2, 0).contiguous(),
            earlier_LBN=self.earlier_NDL[:, part].permute(2, 1, 0).contiguous() if begin else None,
            error_LBN=self.results.error_LDN[:, part],
            own_LBN=own_LDN[:, part],
            codes_LBN=self.results.codes_LDN[:, part],
            clipped_BN=self.clipped_DN[part],
            scale_GBN=grids.scale_GDN[:, part],
            zero_point_GBN=grids.zero_point_GDN[:, part],
        )
        if has_grids:
            round_panel_given(path, rows, grids.grid_of_column, grids.grid.max_code, half_step=HALF_STEP)
        else:
            price_L = self.upper_LL.diagonal().square()
            scan = grid_scan(price_L, grids.grid, num_walked(grids.grid), self.steps)
            round_panel_searched(path, rows, scan, half_step=HALF_STEP)
        self.own_NDL[:, part] = rows.own_LBN.permute(2, 1, 0)

    def _round_row(self, row: int, *, has_grids: bool) -> None:
        """Round one row of all heads; without grids, on those that its columns ask for as they stand."""
        earlier_NL, inverse_N1 = self.earlier_NDL[:, row], self.inverse_DN1[row]
        weight_LN = self.weight_LDN[:, row]
        pending_LN = torch.addcmul(self.pending_LDN[:, row], earlier_NL.T, inverse_N1.T)
        block, backend = self.settings.column_block, self.settings.backend
        rounded: RoundedColumns | RoundedGroup
        if has_grids:
            grids = self.grids.of_rows(row, row + 1)
            rounded = round_on_grids(weight_LN, pending_LN, self.upper_LL, grids, column_block=block, backend=backend)
        else:
            rounded = round_group(
                weight_LN,
                pending_LN,
                self.upper_LL,
                self.grids.grid,
                column_block=block,
                backend=backend,
                steps=self.steps,
            )
            self.grids.scale_GDN[0, row] = rounded.scale_O
            self.grids.zero_point_GDN[0, row] = rounded.zero_point_O
        self.results.error_LDN[:, row] = rounded.error_LO
        self.results.codes_LDN[:, row] = rounded.codes_LO
        self.clipped_DN[row] = rounded.clipped_O
        # What this row hands on are its own errors: without those that it received.
        torch.addcmul(rounded.weighted_LO.T, earlier_NL, inverse_N1, value=-1, out=self.own_NDL[:, row])

    def _find_grids(self, begin: int, end: int) -> None:
        """Find the grids of some rows from their columns as they stand, as if the rows did not meet each other."""
        earlier_LBN, inverse_BN = self.earlier_NDL[:, begin:end].permute(2, 1, 0), self.inverse_DN1[begin:end, :, 0]
        pending_LBN = torch.addcmul(self.pending_LDN[:, begin:end], earlier_LBN, inverse_BN)
        rounded = round_group(
            self.weight_LDN[:, begin:end].flatten(1),
            pending_LBN.flatten(1),
            self.upper_LL,
            self.grids.grid,
            column_block=self.settings.column_block,
            backend=self.settings.backend,
            steps=self.steps,
        )
        self.grids.scale_GDN[0, begin:end] = rounded.scale_O.view_as(inverse_BN)
        self.grids.zero_point_GDN[0, begin:end] = rounded.zero_point_O.view_as(inverse_BN)

    def _round_wavefront(self, begin: int, end: int) -> None:
        rows = CoupledRows(
            weight_LBN=self.weight_LDN[:, begin:end],
            pending_LBN=self.pending_LDN[:, begin:end],
            earlier_LBN=self.earlier_NDL[:, begin:end].permute(2, 1, 0),
            upper_LL=self.upper_LL,
            output_NBB=self.output_NDD[:, begin:end, begin:end],
        )
        grids = self.grids.of_rows(begin, end)
        rounded = round_wavefront(rows, grids)
        grid_of_column = list(self.grids.grid_of_column)
        scale_LR, zero_point_LR = grids.scale_GR[grid_of_column], grids.zero_point_GR[grid_of_column]
        level_LR = (rows.weight_LBN - rounded.error_LBN).flatten(1)
        codes_LR = level_LR.div_(scale_LR).round_().add_(zero_point_LR).to(torch.uint8)
        weighted_LBN = rounded.coupled_LBN * self.inverse_DN1[begin:end, :, 0]
        clipped_R = count_clipped(weighted_LBN.flatten(1), self.upper_LL, scale_LR)
        self.results.error_LDN[:, begin:end] = rounded.error_LBN
        self.results.codes_LDN[:, begin:end] = codes_LR.view_as(rounded.error_LBN)
        self.clipped_DN[begin:end] = clipped_R.view(end - begin, -1)
        self.own_NDL[:, begin:end] = rounded.own_LBN.permute(2, 1, 0)
