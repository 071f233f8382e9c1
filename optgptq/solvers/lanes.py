"""Rows on their way through refinement: their steps and scales, stored by columns in the walk's order.

Shapes: `O` output rows, `I` input columns, `G` groups (contiguous), `R` rows that are refined at once, `N` heads,
`D` rows of a head.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from optgptq.affine_weight import AffineWeight
from optgptq.native.group import path_for
from optgptq.native.library import Backend
from optgptq.native.refine import RefineRows, refine_rows
from optgptq.solvers.coupled_losses import row_shares
from optgptq.solvers.descend import CodeDescent
from optgptq.solvers.factor import column_order
from optgptq.solvers.problem import ColumnOrder
from optgptq.solvers.refit_scales import refit_scales


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What refinement does.

    Attributes:
        scale_refit: whether scales are refitted.
        code_sweeps: sweeps of coordinate descent in a round; 0 keeps the codes.
        rounds: how often both take turns.
        backend: who does it; `torch` is the definition of the others.
    """

    scale_refit: bool
    code_sweeps: int
    rounds: int
    backend: Backend = "auto"


class WalkColumns:
    """What all rows share: the moment and the groups, in the walk's order."""

    def __init__(self, moment_II: torch.Tensor, order_I: torch.Tensor, group_size: int) -> None:
        """Take a moment in the model's order, and the order to walk in."""
        num_columns = len(order_I)
        self.order_I = order_I
        self.moment_II = moment_II.index_select(0, order_I).index_select(1, order_I)
        self.group_size = group_size
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
        steps_IR = self.arranged(weight.codes_OI).to(dtype).sub_(self.by_column(zero_point_GR))
        scale_GR = weight.scale_OG.T[self.group_order_G].to(dtype).contiguous()
        return Lanes(steps_IR, scale_GR, -zero_point_GR, (1 << weight.bits) - 1 - zero_point_GR)

    def by_column(self, values_GR: torch.Tensor) -> torch.Tensor:
        """Return `[I, R]`, of each column the entry of its group."""
        if len(self.groups) == 1:
            return values_GR.expand(len(self.order_I), -1)
        return values_GR.repeat_interleave(self.group_size, dim=0)[: len(self.order_I)]

    def losses(self, error_IR: torch.Tensor) -> torch.Tensor:
        """Return float64 `[R]`, `e H e^T`."""
        return (self.moment_II @ error_IR).mul_(error_IR).sum(dim=0, dtype=torch.float64)

    def coupled_losses(self, error_NDI: torch.Tensor, output_moment_NDD: torch.Tensor) -> torch.Tensor:
        """Return float64 `[N, D]`, each row's part of `tr(B X H X^T)`."""
        error_NDI = error_NDI.to(torch.float64)
        gram_NDD = (error_NDI @ self.moment_II.to(torch.float64)) @ error_NDI.transpose(1, 2)
        return row_shares(gram_NDD, output_moment_NDD.to(torch.float64))

    def weight(self, lanes: Lanes, old: AffineWeight, taken_R: torch.Tensor) -> AffineWeight:
        """Return the old weight with the rows that are taken from the lanes."""
        codes_IR = torch.empty_like(lanes.steps_IR, dtype=torch.uint8)
        codes_IR[self.order_I] = (lanes.steps_IR - self.by_column(lanes.lowest_GR)).to(torch.uint8)
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
        """Take code minus zero point, scale, and the smallest and largest step of every group; they are changed."""
        self.steps_IR = steps_IR
        self.scale_GR = scale_GR
        self.lowest_GR = lowest_GR
        self.highest_GR = highest_GR

    def levels(self, columns: WalkColumns) -> torch.Tensor:
        """Return `Q` `[I, R]`; exact in float32, since steps and scales have eight bits each."""
        return self.steps_IR * columns.by_column(self.scale_GR)

    def interleaved(self, number: int) -> list[Lanes]:
        """Return lanes with every `number`-th row, from the first, second, ... row on."""
        parts = (self.steps_IR, self.scale_GR, self.lowest_GR, self.highest_GR)
        by_first = [part.view(len(part), -1, number).permute(2, 0, 1).contiguous() for part in parts]
        return [Lanes(*(part[first] for part in by_first)) for first in range(number)]

    @classmethod
    def joined(cls, parts: list[Lanes]) -> Lanes:
        """Return the lanes that `interleaved` took apart."""
        fields = zip(*((part.steps_IR, part.scale_GR, part.lowest_GR, part.highest_GR) for part in parts), strict=True)
        return cls(*(torch.stack(field, dim=2).flatten(1) for field in fields))

    def improve(self, target_IR: torch.Tensor, columns: WalkColumns, plan: Plan) -> bool:
        """Run the rounds in place and return whether anything changed; rows do not influence each other."""
        path = path_for(plan.backend, target_IR, columns.moment_II, self.steps_IR)
        if path is not None:
            rows = RefineRows(
                target_IR=target_IR,
                moment_II=columns.moment_II,
                steps_IR=self.steps_IR,
                scale_GR=self.scale_GR,
                lowest_GR=self.lowest_GR,
                highest_GR=self.highest_GR,
                group_size=columns.group_size,
            )
            sweeps, rounds = plan.code_sweeps, plan.rounds
            return refine_rows(path, rows, scale_refit=plan.scale_refit, code_sweeps=sweeps, rounds=rounds)
        changed = False
        for index in range(plan.rounds):
            moved = self._round(target_IR, columns, plan, is_last=index + 1 == plan.rounds)
            changed |= moved
            # What is fitted once to codes that stay is not fitted again.
            if not moved or not plan.code_sweeps:
                break
        return changed

    def _round(self, target_IR: torch.Tensor, columns: WalkColumns, plan: Plan, *, is_last: bool) -> bool:
        """Do one round in place; return whether anything changed: if not, nothing will in a further one."""
        moved = plan.scale_refit and self._refit(target_IR, columns)
        if not plan.code_sweeps:
            return moved
        descent = CodeDescent(
            self.steps_IR,
            target_IR - self.levels(columns),
            columns.moment_II,
            scale_GR=self.scale_GR,
            lowest_GR=self.lowest_GR,
            highest_GR=self.highest_GR,
            group_of_column=columns.group_of_column,
        )
        for _ in range(plan.code_sweeps):
            if not descent.sweep():
                break
            moved = True
        if is_last and moved and plan.scale_refit:
            self._refit(target_IR, columns)
        return moved

    def _refit(self, target_IR: torch.Tensor, columns: WalkColumns) -> bool:
        before_GR = self.scale_GR
        error_IR = target_IR - self.levels(columns)
        self.scale_GR = refit_scales(self.steps_IR, error_IR, before_GR, columns.moment_II, columns.groups)
        return not torch.equal(before_GR, self.scale_GR)
