"""GPTQ: columns are rounded one after the other, and each error moves the columns that are still free.

The walk is kept in look-back form. With `H = P P^T` (`optgptq.solvers.factor`) and `D = W - Q` so far, column `j`
stands at `w_j + sum_{i<j} D_i P_ij / P_jj` when its turn comes, which equals the classic update
`W -= E U` code for code. Source: GPTQ (arXiv 2210.17323), algorithm 1; look-back form: LDLQ (arXiv 2307.13304).

Everything inside is stored by columns (`[I, O]`), so that a column of the weight is contiguous. Arithmetic is in
`SolverSettings.dtype`; grids are read in the same dtype from scales that are already rounded for storage.

Shapes: `O` rows, `I` columns, `G` groups, `L` columns of a group, `C` columns of a block.
"""

from __future__ import annotations

import time

import torch

from optgptq.affine_weight import AffineWeight
from optgptq.grids import affine
from optgptq.grids.search import find_grid
from optgptq.grids.settings import GridSettings
from optgptq.solvers.factor import Factor, factor_moment
from optgptq.solvers.losses import row_losses
from optgptq.solvers.problem import LayerProblem, LayerSolution
from optgptq.solvers.rtn import static_grids


def solve(problem: LayerProblem) -> LayerSolution:
    """Return the GPTQ solution of one linear.

    Raises:
        NumericalError: the moment is not finite or cannot be factored.
    """
    started = time.perf_counter()
    grid, settings = problem.grid, problem.settings
    num_columns = problem.weight_OI.shape[1]
    group_size = num_columns if grid.group_size == -1 else grid.group_size
    factor = factor_moment(
        problem.input_moment_II,
        name=problem.name,
        order=settings.order,
        group_size=group_size,
        damp_ratio=settings.damp_ratio,
        dtype=settings.dtype,
    )
    weight_OI = problem.weight_OI.to(settings.dtype)
    walk = _Walk(weight_OI, factor, grid, group_size)
    walk.run(block_size(settings.column_block, group_size))
    weight = walk.solution()
    rtn = static_grids(weight_OI, problem.input_moment_II.to(settings.dtype), grid)
    energy_O, loss_O, rtn_loss_O = row_losses(problem, weight, rtn)
    return LayerSolution(
        weight=weight,
        row_energy_O=energy_O,
        row_loss_O=loss_O,
        row_rtn_loss_O=rtn_loss_O,
        row_clipped_O=walk.clipped_O.to(torch.float64) / num_columns,
        damp_ratio_used=factor.damp_ratio_used,
        num_dead_inputs=int(factor.dead_I.sum()),
        seconds=time.perf_counter() - started,
        notes=_notes(problem, factor),
    )


def block_size(column_block: int, group_size: int) -> int:
    """Return the columns per block: whole groups where groups are smaller, so that none straddles a block."""
    if group_size >= column_block:
        return column_block
    return column_block // group_size * group_size


class _Walk:
    """State of one pass over the columns, in the walk's order."""

    def __init__(self, weight_OI: torch.Tensor, factor: Factor, grid: GridSettings, group_size: int) -> None:
        num_rows, num_columns = weight_OI.shape
        self.grid = grid
        self.group_size = group_size
        self.order_I = factor.order_I
        self.upper_II = factor.upper_II
        self.weight_IO = weight_OI.T[factor.order_I].contiguous()
        self.error_IO = torch.empty_like(self.weight_IO)
        self.codes_IO = torch.empty(num_columns, num_rows, dtype=torch.uint8, device=weight_OI.device)
        self.clipped_O = torch.zeros(num_rows, dtype=torch.int64, device=weight_OI.device)
        num_groups = num_columns // group_size
        self.scale_GO = torch.empty(num_groups, num_rows, dtype=weight_OI.dtype, device=weight_OI.device)
        self.zero_point_GO = torch.empty_like(self.scale_GO)
        self.group_I = (factor.order_I // group_size).tolist()
        self.dynamic = grid.group_grids == "dynamic"
        if not self.dynamic:
            self._read_static_grids()

    def run(self, block: int) -> None:
        num_columns = self.weight_IO.shape[0]
        begin = 0
        while begin < num_columns:
            # A block ends where its group ends, so that a dynamic grid is read from columns that are up to date.
            end = min(begin + block, num_columns)
            if self.group_size > block:
                end = min(end, (begin // self.group_size + 1) * self.group_size)
            self._run_block(begin, end)
            begin = end

    def solution(self) -> AffineWeight:
        codes_IO = torch.empty_like(self.codes_IO)
        codes_IO[self.order_I] = self.codes_IO
        return AffineWeight(
            codes_OI=codes_IO.T.contiguous(),
            scale_OG=self.scale_GO.T.to(torch.float32).contiguous(),
            zero_point_OG=self.zero_point_GO.T.to(torch.int32).contiguous(),
            bits=self.grid.bits,
            group_size=self.group_size,
            symmetric=self.grid.symmetric,
        )

    def _read_static_grids(self) -> None:
        for group in range(self.scale_GO.shape[0]):
            places_L = (self.order_I // self.group_size == group).nonzero().squeeze(1)
            self._find_group_grid(group, self.weight_IO[places_L], places_L)

    def _find_group_grid(self, group: int, columns_LO: torch.Tensor, places_L: torch.Tensor) -> None:
        factor_LL = self.upper_II[places_L][:, places_L]
        self.scale_GO[group], self.zero_point_GO[group] = find_grid(columns_LO, factor_LL, self.grid)

    def _run_block(self, begin: int, end: int) -> None:
        """Round columns `begin .. end`; on entry all earlier errors are known but not yet applied here."""
        pending_CO = self.upper_II[:begin, begin:end].T @ self.error_IO[:begin]
        factor_CC = self.upper_II[begin:end, begin:end]
        divisors = factor_CC.diagonal().tolist()
        for place in range(begin, end):
            if self.dynamic and place % self.group_size == 0:
                self._read_dynamic_grid(place, pending_CO[place - begin :])
            offset = place - begin
            group = self.group_I[place]
            scale_O, zero_point_O = self.scale_GO[group], self.zero_point_GO[group]
            current_O = torch.add(self.weight_IO[place], pending_CO[offset], alpha=1.0 / divisors[offset])
            code_O = current_O.div_(scale_O).round_().add_(zero_point_O)
            inside_O = code_O.clamp(0, self.grid.max_code)
            self.clipped_O += code_O != inside_O
            self.codes_IO[place] = inside_O.to(torch.uint8)
            level_O = inside_O.sub_(zero_point_O).mul_(scale_O)
            error_O = torch.sub(self.weight_IO[place], level_O, out=self.error_IO[place])
            if place + 1 < end:
                pending_CO[offset + 1 :].addr_(factor_CC[offset, offset + 1 :], error_O)

    def _read_dynamic_grid(self, place: int, pending_CO: torch.Tensor) -> None:
        """Find the grid of the group that starts at `place` from its columns as they stand now."""
        end = place + self.group_size
        if pending_CO.shape[0] < self.group_size:
            pending_LO = self.upper_II[:place, place:end].T @ self.error_IO[:place]
        else:
            pending_LO = pending_CO[: self.group_size]
        factor_LL = self.upper_II[place:end, place:end]
        shift_LO = torch.linalg.solve_triangular(factor_LL.T, pending_LO, upper=False)
        columns_LO = self.weight_IO[place:end] + shift_LO
        places_L = torch.arange(place, end, device=columns_LO.device)
        self._find_group_grid(self.group_I[place], columns_LO, places_L)


def _notes(problem: LayerProblem, factor: Factor) -> tuple[str, ...]:
    notes = []
    if factor.damp_ratio_used > problem.settings.damp_ratio:
        notes.append(
            f"damping was raised from {problem.settings.damp_ratio:g} to {factor.damp_ratio_used:g} of the mean "
            "diagonal, because the input moment could not be factored"
        )
    return tuple(notes)
