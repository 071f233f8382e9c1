"""Two-sided GPTQ: errors of rounded weights are compensated in later columns and in later rows of the same head.

With `B = P_out P_out^T` and `H = P_in P_in^T`, a head loses `tr(B X H X^T) = sum((P_out^T X P_in)^2)` for an error `X`.
Entry `(i, j)` stands at

    w_ij + (R_ij / P_out_ii + sum_{j'<j} X_ij' P_in_j'j) / P_in_jj,   R = sum_{i'<i} P_out_i'i A_i',   A = X P_in

when its turn comes, in any order that respects rows and columns: the codes are those of GPTQ on the Kronecker product.
So one row is an ordinary walk whose pending sums have `R / P_out_ii` in them, all heads at once. Columns go group by
group and inside a group row by row, so that every grid is read from weights that carry all compensation so far.

`R` is gathered by halves, as the sums over columns are. Source: BoA (arXiv 2406.13474), section 3; the order of the
steps and the anti-diagonals of `optgptq.solvers.wavefront` are derived in docs/math/two-sided.md.

Shapes: `O` rows, `I` columns in the walk's order, `N` heads, `D` rows of a head in the walk's order, `G` groups,
`L` columns of a panel, `B` some rows of each head. Arithmetic is in `SolverSettings.dtype`.
"""

from __future__ import annotations

import time
from dataclasses import replace

import torch

from optgptq.affine_weight import AffineWeight
from optgptq.grids.affine import nearest_codes
from optgptq.solvers import gptq
from optgptq.solvers.coupled_losses import factored_gram, row_shares, undamped_gram
from optgptq.solvers.coupling import OutputFactors, factor_outputs
from optgptq.solvers.factor import Factor, damping_notes, factor_problem
from optgptq.solvers.panel import Panel, PanelGrids, PanelResults
from optgptq.solvers.problem import CoupledLosses, LayerProblem, LayerSolution
from optgptq.solvers.rounding import error_price, find_group_grids

# Columns on static grids that are rounded in one go.
_STATIC_COLUMNS = 128


def solve(problem: LayerProblem) -> LayerSolution:
    """Return the two-sided solution of one linear, or that of GPTQ where no head couples its rows.

    Raises:
        NumericalError: a moment is not finite or cannot be factored.
    """
    started = time.perf_counter()
    if problem.output_moment_NDD is None:
        return gptq.solve(problem)
    outputs = factor_outputs(problem, problem.output_moment_NDD)
    if not bool(outputs.is_coupled_N.any()):
        solution = gptq.solve(problem)
        return replace(solution, notes=(*solution.notes, *outputs.notes), seconds=time.perf_counter() - started)
    factor = factor_problem(problem)
    heads = _Heads(problem, factor, outputs, problem.group_size)
    heads.round()
    solution = heads.solution()
    notes = (*damping_notes(factor, problem.settings.damp_ratio), *outputs.notes)
    return replace(solution, notes=notes, seconds=time.perf_counter() - started)


class _Heads:
    """All heads of a weight on their way through the walk; columns and rows are in the walk's order."""

    def __init__(self, problem: LayerProblem, factor: Factor, outputs: OutputFactors, group_size: int) -> None:
        self.problem = problem
        self.factor = factor
        self.outputs = outputs
        self.group_size = group_size
        num_heads, head_size = outputs.order_ND.shape
        weight_NDI = problem.weight_OI.to(problem.settings.dtype).view(num_heads, head_size, -1)
        ordered_NDI = weight_NDI.gather(1, outputs.order_ND[:, :, None].expand_as(weight_NDI))
        self.weight_IDN = ordered_NDI.permute(2, 1, 0)[factor.order_I].contiguous()
        # Sums `sum_j' X_ij' P_in_j'j` over the columns whose errors are known and were handed on so far.
        self.pending_IDN = torch.zeros_like(self.weight_IDN)
        self.error_IDN = torch.empty_like(self.weight_IDN)
        self.codes_IDN = torch.empty_like(self.weight_IDN, dtype=torch.uint8)
        self.clipped_DN = torch.zeros(head_size, num_heads, dtype=torch.int64, device=weight_NDI.device)
        self.damped_NDD = weight_NDI.new_zeros(num_heads, head_size, head_size, dtype=torch.float64)
        self.scale_GDN = self.weight_IDN.new_empty(len(factor.order_I) // group_size, head_size, num_heads)
        self.zero_point_GDN = torch.empty_like(self.scale_GDN)
        self.group_of_column: list[int] = (factor.order_I // group_size).tolist()

    def round(self) -> None:
        """Round all columns."""
        if self.problem.grid.group_grids == "static":
            self._find_static_grids()
            self._walk(0, len(self.group_of_column), _STATIC_COLUMNS)
        else:
            self._walk(0, len(self.group_of_column), self.group_size)

    def solution(self) -> LayerSolution:
        """Return codes, grids and losses in the model's order, without notes and time."""
        weight_NDD, error_NDD, nearest_NDD = self._grams()
        moment_NDD = self.outputs.moment_NDD
        coupled = [self._original_rows(row_shares(part, moment_NDD)) for part in (weight_NDD, error_NDD, nearest_NDD)]
        own = [self._original_rows(part.diagonal(dim1=1, dim2=2)) for part in (weight_NDD, error_NDD, nearest_NDD)]
        clipped_O = self._original_rows(self.clipped_DN.T)
        return LayerSolution(
            weight=self._weight(),
            row_energy_O=own[0],
            row_loss_O=own[1],
            row_rtn_loss_O=own[2],
            row_clipped_O=clipped_O.to(torch.float64) / len(self.group_of_column),
            damp_ratio_used=self.factor.damp_ratio_used,
            num_dead_inputs=int(self.factor.dead_I.sum()),
            seconds=0.0,
            coupled=CoupledLosses(energy_O=coupled[0], loss_O=coupled[1], rtn_loss_O=coupled[2]),
        )

    def _walk(self, begin: int, end: int, step: int) -> None:
        """Round columns `begin .. end`, `step` at a time; the right half gets the left half's errors in one product."""
        num_steps = -(-(end - begin) // step)
        if num_steps == 1:
            self._round_panel(begin, end)
            return
        middle = begin + num_steps // 2 * step
        self._walk(begin, middle, step)
        pending_IR, error_IR = self.pending_IDN.flatten(1), self.error_IDN.flatten(1)
        pending_IR[middle:end].addmm_(self.factor.upper_II[begin:middle, middle:end].T, error_IR[begin:middle])
        self._walk(middle, end, step)

    def _round_panel(self, begin: int, end: int) -> None:
        columns = slice(begin, end)
        if self.problem.grid.group_grids == "static":
            groups, grid_of_column = slice(None), self.group_of_column[columns]
        else:
            group = self.group_of_column[begin]
            groups, grid_of_column = slice(group, group + 1), [0] * (end - begin)
        grids = PanelGrids(
            grid=self.problem.grid,
            scale_GDN=self.scale_GDN[groups],
            zero_point_GDN=self.zero_point_GDN[groups],
            grid_of_column=grid_of_column,
        )
        panel = Panel(
            self.weight_IDN[columns],
            self.pending_IDN[columns],
            self.factor.upper_II[columns, columns],
            self.outputs.upper_NDD,
            grids,
            PanelResults(error_LDN=self.error_IDN[columns], codes_LDN=self.codes_IDN[columns]),
            self.problem.settings,
        )
        panel.round()
        self.clipped_DN += panel.clipped_DN
        self.damped_NDD += panel.gram()

    def _find_static_grids(self) -> None:
        groups_I = torch.tensor(self.group_of_column, device=self.weight_IDN.device)
        shape = self.scale_GDN.shape[1:]
        for group in range(len(self.scale_GDN)):
            columns_L = (groups_I == group).nonzero().squeeze(1)
            price = error_price(self.factor.upper_II[columns_L][:, columns_L])
            weight_LO = self.weight_IDN[columns_L].flatten(1)
            backend = self.problem.settings.backend
            scale_O, zero_point_O = find_group_grids(weight_LO, price, self.problem.grid, backend=backend)
            self.scale_GDN[group] = scale_O.view(shape)
            self.zero_point_GDN[group] = zero_point_O.view(shape)

    def _grams(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return `X H X^T` of the weight, of the solution's error, and of that of the nearest codes on its grids."""
        scale_IDN = self.scale_GDN[self.group_of_column]
        zero_point_IDN = self.zero_point_GDN[self.group_of_column]
        nearest_IDN, _ = nearest_codes(self.weight_IDN, scale_IDN, zero_point_IDN, self.problem.grid.max_code)
        nearest_IDN.sub_(zero_point_IDN).mul_(scale_IDN).sub_(self.weight_IDN)
        upper_II, added_I = self.factor.upper_II, self.factor.added_I
        return (
            factored_gram(self.weight_IDN, upper_II, added_I),
            undamped_gram(self.damped_NDD, self.error_IDN, added_I),
            factored_gram(nearest_IDN, upper_II, added_I),
        )

    def _weight(self) -> AffineWeight:
        codes_IDN = torch.empty_like(self.codes_IDN)
        codes_IDN[self.factor.order_I] = self.codes_IDN
        return AffineWeight(
            codes_OI=self._original_rows(codes_IDN.permute(2, 1, 0)),
            scale_OG=self._original_rows(self.scale_GDN.permute(2, 1, 0)).to(torch.float32),
            zero_point_OG=self._original_rows(self.zero_point_GDN.permute(2, 1, 0)).to(torch.int32),
            bits=self.problem.grid.bits,
            group_size=self.group_size,
            symmetric=self.problem.grid.symmetric,
        )

    def _original_rows(self, values: torch.Tensor) -> torch.Tensor:
        """Return `[O, ...]` of `[N, D, ...]`, rows in the model's order, contiguous."""
        place_ND = self.outputs.order_ND.argsort(dim=1)
        heads_N1 = torch.arange(len(place_ND), device=place_ND.device)[:, None]
        return values[heads_N1, place_ND].flatten(0, 1).contiguous()
