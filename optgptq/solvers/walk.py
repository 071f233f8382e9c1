"""The walk over columns that is GPTQ: each is rounded where the errors of those before it have moved it to.

With `H = P P^T` (`optgptq.solvers.factor`) and `D = W - Q`, column `j` stands at
`w_j + sum_{i<j} D_i P_ij / P_jj` when its turn comes. This look-back form gives the codes of the classic update
`W -= E U`. Source: GPTQ (arXiv 2210.17323), algorithm 1; look-back form: LDLQ of QuIP (arXiv 2307.13304).

The sum is gathered by halves: the right half of a range receives the errors of the left half in one product, so that
only inside `column_block` columns does every column update the next ones by itself.

Everything is stored by columns (`[C, R]`), so that one column of all rows is contiguous. Rows do not influence each
other: the same row may stand there several times, once for every grid that is to be tried.

Shapes: `C` columns in the walk's order, `R` rows, `G` grids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from optgptq.grids.affine import round_


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class ColumnGrids:
    """Which grid each column is rounded on.

    Attributes:
        scale_GR: `[G, R]`.
        zero_point_GR: `[G, R]`, in the dtype of the scale.
        grid_of_column: index into `G` for each of the `C` columns.
        max_code: largest code.
    """

    scale_GR: torch.Tensor
    zero_point_GR: torch.Tensor
    grid_of_column: Sequence[int]
    max_code: int


class ColumnWalk:
    """Rounds the columns of `weight_CR`; results are in `steps_CR` and `error_CR`.

    Attributes:
        steps_CR: code minus zero point of every weight.
        error_CR: `D`, the weight minus its level.
        pending_CR: on entry the sums `sum_i D_i P_ij` over columns before this range; overwritten.
    """

    def __init__(
        self,
        weight_CR: torch.Tensor,
        upper_CC: torch.Tensor,
        pending_CR: torch.Tensor,
        grids: ColumnGrids,
        *,
        column_block: int,
    ) -> None:
        self.weight_CR = weight_CR
        self.upper_CC = upper_CC
        self.pending_CR = pending_CR
        self.grids = grids
        self.column_block = column_block
        self.steps_CR = torch.empty_like(weight_CR)
        self.error_CR = torch.empty_like(weight_CR)
        self._inverse_pivots = upper_CC.diagonal().reciprocal().tolist()
        self._lowest_GR = -grids.zero_point_GR
        self._highest_GR = grids.max_code - grids.zero_point_GR

    def run(self) -> None:
        """Round all columns."""
        self._run(0, self.weight_CR.shape[0])

    def weighted_errors(self) -> torch.Tensor:
        """Return `D P` of this range, `[C, R]`: errors in units of their cost once later columns compensate them."""
        return self.upper_CC.T @ self.error_CR

    def _run(self, begin: int, end: int) -> None:
        if end - begin <= self.column_block:
            self._run_block(begin, end)
            return
        num_blocks = -(-(end - begin) // self.column_block)
        middle = begin + num_blocks // 2 * self.column_block
        self._run(begin, middle)
        self.pending_CR[middle:end].addmm_(self.upper_CC[begin:middle, middle:end].T, self.error_CR[begin:middle])
        self._run(middle, end)

    def _run_block(self, begin: int, end: int) -> None:
        for column in range(begin, end):
            grid = self.grids.grid_of_column[column]
            scale_R = self.grids.scale_GR[grid]
            weight_R = self.weight_CR[column]
            current_R = torch.add(weight_R, self.pending_CR[column], alpha=self._inverse_pivots[column])
            round_(current_R.div_(scale_R))
            steps_R = torch.clamp(current_R, self._lowest_GR[grid], self._highest_GR[grid], out=self.steps_CR[column])
            error_R = torch.addcmul(weight_R, steps_R, scale_R, value=-1, out=self.error_CR[column])
            if column + 1 < end:
                self.pending_CR[column + 1 : end].addr_(self.upper_CC[column, column + 1 : end], error_R)
