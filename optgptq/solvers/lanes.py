"""Rows on their way through refinement: their steps and scales, stored by columns in the walk's order.

Shapes: `O` output rows, `I` input columns, `G` groups (contiguous), `R` rows that are refined at once, `N` heads,
`D` rows of a head.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from optgptq.affine_weight import AffineWeight
from optgptq.solvers.coupled_losses import row_shares
from optgptq.solvers.descend import CodeDescent
from optgptq.solvers.factor import column_order
from optgptq.solvers.problem import ColumnOrder
from optgptq.solvers.refit_scales import refit_scales


@dataclass(frozen=True, slots=True)
class Plan:
    """What `refine` is asked to do; fields as its arguments."""

    scale_refit: bool
    code_sweeps: int
    rounds: int


class WalkColumns:
    """What all rows share: the moment and the groups, in the walk's order."""

    def __init__(self, moment_II: torch.Tensor, order_I: torch.Tensor, group_size: int) -> None:
        num_columns = len(order_I)
        """Take a moment in the model's order, and the order to walk in."""
        self.order_I = order_I
        self.moment_II = moment_II.index_select(0, order_I).index_select(1, order_I)
        self.groups = [
            slice(begin, min(begin + group_size, num_columns)) for begin in range(0, num_columns, group_size)
        ]
        self.group_order_G = order_I[::group_size] // group_size
        self.group_of_column = [place // group_size for place in range(num_columns)]

    @classmethod
    def of(cls, moment_II: torch.Tensor, weight: AffineWeight) -> WalkColumns:
        """Return the columns of a weight, those with large moments first; groups stay contiguous."""
        if weight.group_index_I is not None:
            raise ValueError("groups with scattered columns are not refined")
        is_even = weight.in_features % weight.group_size == 0
        order: ColumnOrder = "group_aware" if is_even else "natural"
        return cls(moment_II, column_order(moment_II, order, weight.group_size, damp=0.0), weight.group_size)

    def arranged(self, rows_OI: torch.Tensor) -> torch.Tensor:
        """Return `[I, R]` in the walk's order."""
        return rows_OI.T[self.order_I].contiguous()

    def lanes(self, weight: AffineWeight, dtype: torch.dtype) -> Lanes:
        """Return rows of a weight, ready to be refined."""
        zero_point_GR = weight.zero_point_OG.T[self.group_order_G].to(dtype).contiguous()
        steps_IR = self.arranged(weight.codes_OI).to(dtype).sub_(zero_point_GR[self.group_of_column])
        scale_GR = weight.scale_OG.T[self.group_order_G].to(dtype).contiguous()
        return Lanes(steps_IR, scale_GR, -zero_point_GR, (1 << weight.bits) - 1 - zero_point_GR)

    def losses(self, error_IR: torch.Tensor) -> torch.Tensor:
        """Return float64 `[R]`, `e H e^T`."""
        return (self.moment_II @ error_IR).mul_(error_IR).sum(dim=0, dtype=torch.float64)

    def coupled_losses(self, error_DIN: torch.Tensor, output_moment_NDD: torch.Tensor) -> torch.Tensor:
        """Return float64 `[N, D]`, each row's part of `tr(B X H X^T)`."""
        error_NDI = error_DIN.permute(2, 0, 1).to(torch.float64)
        gram_NDD = (error_NDI @ self.moment_II.to(torch.float64)) @ error_NDI.transpose(1, 2)
        return row_shares(gram_NDD, output_moment_NDD.to(torch.float64))

    def weight(self, lanes: Lanes, old: AffineWeight, taken_R: torch.Tensor) -> AffineWeight:
        """Return the old weight with the rows that are taken from the lanes."""
        zero_point_IR = -lanes.lowest_GR[self.group_of_column]
        codes_IR = torch.empty_like(lanes.steps_IR, dtype=torch.uint8)
        codes_IR[self.order_I] = (lanes.steps_IR + zero_point_IR).to(torch.uint8)
        scale_GR = torch.empty_like(lanes.scale_GR)
        scale_GR[self.group_order_G] = lanes.scale_GR
        return replace(
            old,
            codes_OI=torch.where(taken_R[:, None], codes_IR.T, old.codes_OI),
            scale_OG=torch.where(taken_R[:, None], scale_GR.T.to(old.scale_OG.dtype), old.scale_OG),
        )


class Lanes:
    """Rows on their way: steps and scales in the walk's order."""

    def __init__(
        self, steps_IR: torch.Tensor, scale_GR: torch.Tensor, lowest_GR: torch.Tensor, highest_GR: torch.Tensor
    ) -> None:
        """Take code minus zero point, scale, and the smallest and largest step of every group."""
        self.steps_IR = steps_IR
        self.scale_GR = scale_GR
        self.lowest_GR = lowest_GR
        self.highest_GR = highest_GR

    def levels(self, columns: WalkColumns) -> torch.Tensor:
        """Return `Q` `[I, R]`; exact in float32, since steps and scales have eight bits each."""
        return self.steps_IR * self.scale_GR[columns.group_of_column]

    def improve(self, target_IR: torch.Tensor, columns: WalkColumns, plan: Plan, *, is_last: bool) -> bool:
        """Do one round in place; return whether a further one could change anything."""
        changed = plan.scale_refit and self._refit(target_IR, columns)
        if plan.code_sweeps == 0:
            return False
        descent = CodeDescent(
            self.steps_IR,
            target_IR - self.levels(columns),
            columns.moment_II,
            scale_GR=self.scale_GR,
            lowest_GR=self.lowest_GR,
            highest_GR=self.highest_GR,
            group_of_column=columns.group_of_column,
        )
        moved = False
        for _ in range(plan.code_sweeps):
            if not descent.sweep():
                break
            moved = True
        if is_last and moved and plan.scale_refit:
            self._refit(target_IR, columns)
        return changed or moved

    def _refit(self, target_IR: torch.Tensor, columns: WalkColumns) -> bool:
        before_GR = self.scale_GR
        error_IR = target_IR - self.levels(columns)
        self.scale_GR = refit_scales(self.steps_IR, error_IR, before_GR, columns.moment_II, columns.groups)
        return not torch.equal(before_GR, self.scale_GR)
