"""GPTQ with binary codes: levels are searched, walked and fitted group by group, then improved all together.

Order and error feedback are those of `optgptq.solvers.gptq`. A group's levels start from the cheapest binary code over
whole numbers (`optgptq.grids.binary_search`) and from the cheapest uniform grid, so that a group never costs more than
with the uniform one; where a row has one shape, that holds for uniform shapes (`optgptq.solvers.binary_shapes`).
Source: GPTQT (arXiv 2407.02891) for the two steps; what goes beyond it is in docs/math/binary-codes.md.

Shapes: `O` rows, `I` columns in the walk's order, `G` groups in the walk's order, `L` columns of a group, `K` levels,
`B` coefficients, `P` planes.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial

import torch

from optgptq.binary_weight import BinaryWeight
from optgptq.grids.codebook import codebook
from optgptq.grids.search import ErrorPrice
from optgptq.grids.settings import GridSettings
from optgptq.solvers.binary_codes import find_codes
from optgptq.solvers.binary_group import code_group
from optgptq.solvers.binary_shapes import RowShapes, choose_shapes, uniform_start
from optgptq.solvers.binary_store import overflow_notes, plane_weight, shape_weight
from optgptq.solvers.binary_sweep import BinaryRows, byte_units, sweep
from optgptq.solvers.factor import Factor, damping_notes, factor_problem
from optgptq.solvers.levels import levels_of, nearest_error, nearest_level, sign_table, uniform_coefficients
from optgptq.solvers.losses import factored_energy
from optgptq.solvers.problem import LayerProblem, LayerSolution
from optgptq.solvers.rounding import find_group_grids

# Rows of one walk: bounds its memory.
_ROWS = 2048


def solve(problem: LayerProblem) -> LayerSolution:
    """Return the solution of one linear in binary codes.

    Raises:
        NumericalError: the moment is not finite or cannot be factored.
        ValueError: the order visits columns of different groups in turn.
    """
    started = time.perf_counter()
    factor = factor_problem(problem)
    moment_II = ordered_moment(problem, factor)
    parts = [
        solve_rows(problem, problem.weight_OI[begin : begin + _ROWS], factor, moment_II)
        for begin in range(0, problem.weight_OI.shape[0], _ROWS)
    ]
    weight = BinaryWeight.stacked([part.weight for part in parts])
    return LayerSolution(
        weight=weight,
        row_energy_O=torch.cat([part.energy_O for part in parts]),
        row_loss_O=torch.cat([part.loss_O for part in parts]),
        row_rtn_loss_O=torch.cat([part.rtn_loss_O for part in parts]),
        row_clipped_O=torch.cat([part.clipped_O for part in parts]),
        damp_ratio_used=factor.damp_ratio_used,
        num_dead_inputs=int(factor.dead_I.sum()),
        seconds=time.perf_counter() - started,
        notes=(*damping_notes(factor, problem.settings.damp_ratio), *overflow_notes(weight)),
    )


@dataclass(frozen=True, slots=True, eq=False)
class SolvedRows:
    """Some rows of a weight, and float64 `[O]` what `LayerSolution` says of each of them."""

    weight: BinaryWeight
    energy_O: torch.Tensor
    loss_O: torch.Tensor
    rtn_loss_O: torch.Tensor
    clipped_O: torch.Tensor


def ordered_moment(problem: LayerProblem, factor: Factor) -> torch.Tensor:
    """Return the undamped input moment in the walk's order, in the solver's dtype."""
    moment_II = problem.input_moment_II.to(problem.settings.dtype)
    return moment_II.index_select(0, factor.order_I).index_select(1, factor.order_I)


def solve_rows(problem: LayerProblem, weight_OI: torch.Tensor, factor: Factor, moment_II: torch.Tensor) -> SolvedRows:
    """Return some rows solved by themselves.

    Args:
        problem: grid and settings; its own weight is not looked at.
        weight_OI: the rows.
        factor: of the problem's moment.
        moment_II: the undamped moment in the walk's order.
    """
    rows = _Rows(problem, weight_OI, factor)
    rows.walk(0, len(rows.group_order_G))
    return rows.solved(moment_II)


class _Rows:
    """Rows on their way; columns and groups are in the walk's order."""

    def __init__(self, problem: LayerProblem, weight_OI: torch.Tensor, factor: Factor) -> None:
        self.problem = problem
        self.binary = problem.binary
        self.settings = problem.settings
        self.factor = factor
        self.group_size = problem.group_size
        self.weight_IO = weight_OI.to(self.settings.dtype).T[factor.order_I].contiguous()
        num_columns, num_rows = self.weight_IO.shape
        self.group_order_G = factor.order_I[:: self.group_size] // self.group_size
        self.codes = codebook(problem.grid.bits, self.binary.intermediate_bits)
        self.uniform = GridSettings(bits=problem.grid.bits, symmetric=False, group_size=self.group_size, search="pivot")
        self.shapes = self._shapes() if self.binary.coefficients == "steps" else None
        if self.shapes is None:
            self.table_KBO = sign_table(problem.grid.bits, self.weight_IO)
        else:
            self.table_KBO = self.shapes.table(self.weight_IO)
        # Sums `sum_i e_i P_ij` over the columns whose errors are known and were handed on so far.
        self.pending_IO = torch.zeros_like(self.weight_IO)
        self.error_IO = torch.empty_like(self.weight_IO)
        self.codes_IO = torch.empty(num_columns, num_rows, dtype=torch.uint8, device=weight_OI.device)
        num_groups, num_coefficients = num_columns // self.group_size, self.table_KBO.shape[1]
        self.coefficient_GBO = self.weight_IO.new_empty(num_groups, num_coefficients, num_rows)
        self.clipped_O = self.weight_IO.new_zeros(num_rows, dtype=torch.int64)

    def walk(self, begin: int, end: int) -> None:
        """Round groups `begin .. end`; the right half gets the left half's errors in one product."""
        if end - begin == 1:
            self._round(begin)
            return
        middle = (begin + end) // 2
        self.walk(begin, middle)
        left, right = self._columns(begin, middle), self._columns(middle, end)
        self.pending_IO[right].addmm_(self.factor.upper_II[left, right].T, self.error_IO[left])
        self.walk(middle, end)

    def solved(self, moment_II: torch.Tensor) -> SolvedRows:
        """Return the rows improved under the whole moment, and rounded to what is stored."""
        rows = BinaryRows(self.codes_IO, self.coefficient_GBO, self.error_IO)
        improve = partial(sweep, rows, moment_II, self.table_KBO, backend=self.settings.backend)
        for _ in range(self.binary.sweeps):
            improve()
        unit_O = None
        if self.binary.coefficients == "int8":
            unit_O = byte_units(rows.coefficient_GBO)
            improve(unit_O=unit_O, forced=True)
            if self.binary.sweeps:
                improve(unit_O=unit_O)
        self._round_dead(rows, moment_II)
        upper_II, added_I = self.factor.upper_II, self.factor.added_I
        return SolvedRows(
            weight=self._weight(rows, unit_O),
            energy_O=factored_energy(self.weight_IO, upper_II, added_I),
            loss_O=factored_energy(rows.error_IO, upper_II, added_I),
            rtn_loss_O=factored_energy(self._nearest_error(rows), upper_II, added_I),
            clipped_O=self.clipped_O.to(torch.float64) / len(self.weight_IO),
        )

    def _columns(self, begin: int, end: int) -> slice:
        return slice(begin * self.group_size, end * self.group_size)

    def _price(self, upper_LL: torch.Tensor, group: int) -> torch.Tensor:
        """Return what an error in each column of a group costs in the search for levels."""
        match self.binary.weighting:
            case "none":
                return torch.ones_like(upper_LL.diagonal())
            case "diagonal":
                columns = self._columns(group, group + 1)
                diagonal_I = self.problem.input_moment_II.diagonal().to(upper_LL.dtype)
                return diagonal_I[self.factor.order_I[columns]] + self.factor.added_I[columns]
            case "pivot":
                return upper_LL.diagonal().square()

    def _shapes(self) -> RowShapes:
        """Return the shape of every row, from weights that nothing has moved yet."""
        blocks = [self._columns(group, group + 1) for group in range(len(self.group_order_G))]
        uppers_LL = [self.factor.upper_II[block, block] for block in blocks]
        price_GL = torch.stack([self._price(upper_LL, group) for group, upper_LL in enumerate(uppers_LL)])
        weight_GLO = self.weight_IO.view(len(blocks), self.group_size, -1)
        return choose_shapes(
            weight_GLO,
            price_GL,
            self.codes,
            self.binary.factors,
            grid=self.uniform if self.binary.uniform_start else None,
            backend=self.settings.backend,
        )

    def _round(self, group: int) -> None:
        columns = self._columns(group, group + 1)
        weight_LO, pending_LO = self.weight_IO[columns], self.pending_IO[columns]
        upper_LL = self.factor.upper_II[columns, columns]
        coded = code_group(
            weight_LO,
            pending_LO,
            upper_LL,
            self.table_KBO,
            starts=self._starts(weight_LO, pending_LO, upper_LL, group),
            refits=self.binary.refits,
            column_block=self.settings.column_block,
            backend=self.settings.backend,
        )
        self.error_IO[columns], self.codes_IO[columns] = coded.error_LO, coded.codes_LO
        self.coefficient_GBO[group] = coded.coefficient_BO
        level_KO = levels_of(self.table_KBO, coded.coefficient_BO).sort(dim=0).values
        half_gap_O = level_KO.diff(dim=0).amax(dim=0) / 2 * (1 + 1e-3)
        self.clipped_O += (coded.weighted_LO.abs() > half_gap_O * upper_LL.diagonal()[:, None]).sum(dim=0)

    def _starts(
        self, weight_LO: torch.Tensor, pending_LO: torch.Tensor, upper_LL: torch.Tensor, group: int
    ) -> list[torch.Tensor]:
        """Return the coefficients `[B, O]` that the walk begins with."""
        current_LO = weight_LO + torch.linalg.solve_triangular(upper_LL.T, pending_LO, upper=False)
        price_L = self._price(upper_LL, group)
        backend = self.settings.backend
        shape_O = None if self.shapes is None else self.shapes.index_O
        found = find_codes(current_LO, price_L, self.codes, self.binary.factors, shape_O=shape_O, backend=backend)
        if self.shapes is None:
            alpha_PO, offset_O = found.coefficients(self.codes)
            start_BO = torch.cat([alpha_PO, offset_O[None]])
        else:
            start_BO = self.shapes.start(found, self.codes)
        if not self.binary.uniform_start:
            return [start_BO]
        price = ErrorPrice(price_L, upper_LL)
        scale_O, zero_point_O = find_group_grids(current_LO, price, self.uniform, backend=backend)
        if self.shapes is None:
            return [start_BO, uniform_coefficients(scale_O, zero_point_O, self.uniform.bits)]
        uniform_BO = uniform_start(scale_O, zero_point_O, self.uniform.bits)
        return [start_BO, torch.where(self.shapes.is_uniform(), uniform_BO, start_BO)]

    def _round_dead(self, rows: BinaryRows, moment_II: torch.Tensor) -> None:
        """Give columns that no token reached their nearest levels: the sweeps moved levels without a look at them."""
        for column in (moment_II.diagonal() <= 0).nonzero().flatten().tolist():
            level_KO = levels_of(self.table_KBO, rows.coefficient_GBO[column // self.group_size])
            level_O, rows.codes_IO[column] = nearest_level(self.weight_IO[column], level_KO)
            rows.error_IO[column] = self.weight_IO[column] - level_O

    def _nearest_error(self, rows: BinaryRows) -> torch.Tensor:
        errors, weight_GLO = [], self.weight_IO.view(len(self.group_order_G), self.group_size, -1)
        for weight_LO, coefficient_BO in zip(weight_GLO, rows.coefficient_GBO, strict=True):
            level_KO = levels_of(self.table_KBO, coefficient_BO)
            errors.append(nearest_error(weight_LO, level_KO, backend=self.settings.backend))
        return torch.cat(errors)

    def _weight(self, rows: BinaryRows, unit_O: torch.Tensor | None) -> BinaryWeight:
        codes_IO = torch.empty_like(rows.codes_IO)
        codes_IO[self.factor.order_I] = rows.codes_IO
        coefficient_GBO = torch.empty_like(rows.coefficient_GBO)
        coefficient_GBO[self.group_order_G] = rows.coefficient_GBO
        codes_OI = codes_IO.T.contiguous()
        if self.shapes is None:
            return plane_weight(codes_OI, coefficient_GBO, unit_O, group_size=self.group_size)
        return shape_weight(codes_OI, coefficient_GBO, self.shapes.steps_OP, group_size=self.group_size)
