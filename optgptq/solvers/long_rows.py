"""Refinement of many rows that share one moment, on processors: the compiled twin of `Lanes.improve`.

A product of the errors with the moment costs as much as all else together. There is one at the start and one after each
refit of the scales that is followed by sweeps; it serves as gradient, as slope of the scales and, with the errors once
more, as loss. Sweeps move few codes, and the moves alone bring the gradient up to date.

Shapes: `R` rows, `I` columns in the walk's order, `G` groups (contiguous).
"""

from __future__ import annotations

from dataclasses import replace

import torch

from optgptq.affine_weight import AffineWeight
from optgptq.native.sweep import SweepRows, find_gradient, refit_known, sweep_codes
from optgptq.solvers.lanes import Plan, WalkColumns


class LongRows:
    """Rows on their way through refinement, one after the other in memory."""

    def __init__(self, target_RI: torch.Tensor, columns: WalkColumns, weight: AffineWeight) -> None:
        """Take targets `[R, I]` in the model's order, in the dtype of the moment, and the weight to refine."""
        dtype = columns.moment_II.dtype
        self.columns = columns
        self.weight = weight
        self.target_RI = target_RI[:, columns.order_I]
        zero_point_RG = weight.zero_point_OG[:, columns.group_order_G].to(dtype)
        self.zero_point_RG = zero_point_RG
        steps_RI = weight.codes_OI[:, columns.order_I].to(dtype)
        self.rows = SweepRows(
            moment_II=columns.moment_II,
            gradient_RI=torch.empty_like(steps_RI),
            steps_RI=steps_RI.sub_(self._by_column(zero_point_RG)),
            scale_RG=weight.scale_OG[:, columns.group_order_G].to(dtype).contiguous(),
            lowest_RG=-zero_point_RG,
            highest_RG=(1 << weight.bits) - 1 - zero_point_RG,
            group_size=columns.group_size,
        )

    def refined(self, path: str, plan: Plan) -> tuple[AffineWeight, torch.Tensor]:
        """Run the rounds; return the weight with the rows that lose less now, and float64 `[R]`, what rows lose."""
        before_R = self._find_gradient(path)
        after_R = self._run(path, plan, before_R)
        # Also what is lower by less than the arithmetic can tell is no gain.
        is_better_R = after_R < before_R
        return self._result(is_better_R), torch.where(is_better_R, after_R, before_R)

    def _run(self, path: str, plan: Plan, loss_R: torch.Tensor) -> torch.Tensor:
        """Run the rounds in place; `loss_R` and the result are the losses before and after them."""
        for index in range(plan.rounds):
            moved = False
            if plan.scale_refit:
                moved, gain_R = refit_known(path, self.rows)
                loss_R = loss_R - gain_R
            if not plan.code_sweeps:
                break
            if moved:
                self._find_gradient(path)
            if sweep_codes(path, self.rows, plan.code_sweeps):
                moved = True
            if not moved:
                break
            loss_R = self._loss()
            if plan.scale_refit and index + 1 == plan.rounds:
                loss_R = loss_R - refit_known(path, self.rows)[1]
        return loss_R

    def _find_gradient(self, path: str) -> torch.Tensor:
        """Write the gradient of the errors as they stand; return their losses."""
        self._write_error(self.rows.gradient_RI)
        return find_gradient(path, self.rows)

    def _loss(self) -> torch.Tensor:
        error_RI = self._write_error(torch.empty_like(self.target_RI))
        return error_RI.mul_(self.rows.gradient_RI).sum(dim=1, dtype=torch.float64)

    def _write_error(self, error_RI: torch.Tensor) -> torch.Tensor:
        scale_RI = self._by_column(self.rows.scale_RG)
        return torch.addcmul(self.target_RI, self.rows.steps_RI, scale_RI, value=-1, out=error_RI)

    def _by_column(self, values_RG: torch.Tensor) -> torch.Tensor:
        num_columns = len(self.columns.order_I)
        if len(self.columns.groups) == 1:
            return values_RG.expand(-1, num_columns)
        return values_RG.repeat_interleave(self.columns.group_size, dim=1)[:, :num_columns]

    def _result(self, taken_R: torch.Tensor) -> AffineWeight:
        codes_RI = torch.empty_like(self.weight.codes_OI)
        codes_RI[:, self.columns.order_I] = (self.rows.steps_RI + self._by_column(self.zero_point_RG)).to(torch.uint8)
        scale_RG = torch.empty_like(self.weight.scale_OG)
        scale_RG[:, self.columns.group_order_G] = self.rows.scale_RG.to(scale_RG.dtype)
        return replace(
            self.weight,
            codes_OI=torch.where(taken_R[:, None], codes_RI, self.weight.codes_OI),
            scale_OG=torch.where(taken_R[:, None], scale_RG, self.weight.scale_OG),
        )
