"""Coordinate descent over codes: each moves to the best one given all others.

With the error `e = t - Q` of a row and the undamped moment `H`, the best level of column `j`, all others held, is
the one nearest to `Q_j + (H e)_j / H_jj`. No step raises the loss `e H e^T`.

Columns are taken in blocks. A block's gradient is one product with the error as it stands, so nothing drifts; inside
the block it is kept up to date by halves, as in `optgptq.solvers.walk`.

Shapes: `I` columns, `R` rows, `G` groups, `L` columns of a block, `C` columns of a part of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from optgptq.grids.affine import round_

_BLOCK = 64
_COLUMN_BLOCK = 16


class CodeDescent:
    """Sweeps over the columns of some rows; `steps_IR` and `error_IR` are changed in place.

    Attributes:
        steps_IR: code minus zero point.
        error_IR: target minus level.
    """

    def __init__(
        self,
        steps_IR: torch.Tensor,
        error_IR: torch.Tensor,
        moment_II: torch.Tensor,
        *,
        scale_GR: torch.Tensor,
        lowest_GR: torch.Tensor,
        highest_GR: torch.Tensor,
        group_of_column: Sequence[int],
    ) -> None:
        """Take scales and the smallest and largest step, `[G, R]` in the dtype of the rest."""
        self.steps_IR = steps_IR
        self.error_IR = error_IR
        self._moment_II = moment_II
        self._diagonal = moment_II.diagonal().tolist()
        self._scale_GR = scale_GR
        self._inverse_scale_GR = scale_GR.reciprocal()
        self._lowest_GR = lowest_GR
        self._highest_GR = highest_GR
        self._group_of_column = group_of_column

    def sweep(self) -> bool:
        """Visit every column once; return whether a code changed. Columns without a moment stay as they are."""
        changed = False
        num_columns = len(self._diagonal)
        for begin in range(0, num_columns, _BLOCK):
            end = min(begin + _BLOCK, num_columns)
            gradient_LR = self._moment_II[begin:end] @ self.error_IR
            before_LR = self.steps_IR[begin:end].clone()
            self._descend(gradient_LR, begin, begin, end)
            changed |= not torch.equal(before_LR, self.steps_IR[begin:end])
        return changed

    def _descend(self, gradient_LR: torch.Tensor, first: int, begin: int, end: int) -> None:
        """Descend columns `begin .. end`; `first` is the column of the gradient's first row."""
        if end - begin <= _COLUMN_BLOCK:
            self._descend_columns(gradient_LR, first, begin, end)
            return
        num_parts = -(-(end - begin) // _COLUMN_BLOCK)
        middle = begin + num_parts // 2 * _COLUMN_BLOCK
        before_CR = self.error_IR[begin:middle].clone()
        self._descend(gradient_LR, first, begin, middle)
        change_CR = before_CR.neg_().add_(self.error_IR[begin:middle])
        gradient_LR[middle - first : end - first].addmm_(self._moment_II[middle:end, begin:middle], change_CR)
        self._descend(gradient_LR, first, middle, end)

    def _descend_columns(self, gradient_LR: torch.Tensor, first: int, begin: int, end: int) -> None:
        for column in range(begin, end):
            moment = self._diagonal[column]
            if moment <= 0:
                continue
            group = self._group_of_column[column]
            steps_R = self.steps_IR[column]
            best_R = torch.addcmul(
                steps_R, gradient_LR[column - first], self._inverse_scale_GR[group], value=1 / moment
            )
            best_R = round_(best_R).clamp_(self._lowest_GR[group], self._highest_GR[group])
            change_R = torch.sub(steps_R, best_R).mul_(self._scale_GR[group])
            steps_R.copy_(best_R)
            self.error_IR[column].add_(change_R)
            if column + 1 < end:
                gradient_LR[column + 1 - first : end - first].addr_(self._moment_II[column + 1 : end, column], change_R)
