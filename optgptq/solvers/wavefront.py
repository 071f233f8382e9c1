"""Coupled rows on known grids, rounded along anti-diagonals.

Entry `(i, j)` of a head needs every entry `(i' <= i, j' <= j)` and no other, so that all entries with the same `i + j`
are rounded at once, in all heads: `B + C - 1` steps for `B` rows and `C` columns, where row after row takes `B * C`.
The codes are those of `optgptq.solvers.two_sided`, row after row.

Columns are stored back to front, column `j` at place `C - 1 - j`. The entries of one step are then a diagonal of every
array, and the rows of `P` that they need stand one below the other: no step gathers anything.

Shapes: `L` columns, `C` columns of one wave, `B` rows of each head, `N` heads, `G` grids, `M` entries of one step.
Arithmetic is in the dtype of the weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from optgptq.solvers.walk import ColumnGrids

# Columns of one wave: more take fewer steps in all, but each step then updates more that is far away.
WAVE_COLUMNS = 128


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class CoupledRows:
    """Dense rows, and what is already known of the errors around them.

    Attributes:
        weight_LBN: the dense weight.
        pending_LBN: `sum_j' X(i, j') P_in[j', j]` over the columns before these.
        earlier_LBN: `R`, `sum_i' P_out[i', i] A(i', j)` over the rows before these.
        upper_LL: the columns' block of `P_in`.
        output_NBB: the rows' block of `P_out` of each head.
    """

    weight_LBN: torch.Tensor
    pending_LBN: torch.Tensor
    earlier_LBN: torch.Tensor
    upper_LL: torch.Tensor
    output_NBB: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class RoundedRows:
    """Rows that were walked.

    Attributes:
        error_LBN: `X`, the weight minus its level.
        own_LBN: `A = X P_in`, with the columns before these in it.
        coupled_LBN: `P_out^T A`, with the rows before these in it: the square is what an entry costs.
    """

    error_LBN: torch.Tensor
    own_LBN: torch.Tensor
    coupled_LBN: torch.Tensor


def round_wavefront(rows: CoupledRows, grids: ColumnGrids, *, columns: int = WAVE_COLUMNS) -> RoundedRows:
    """Return rows rounded on given grids, `columns` at a time; the rows of `grids` are `[B, N]`, flattened."""
    num_columns = len(rows.weight_LBN)
    rounded = RoundedRows(
        error_LBN=torch.empty_like(rows.weight_LBN, memory_format=torch.contiguous_format),
        own_LBN=torch.empty_like(rows.weight_LBN, memory_format=torch.contiguous_format),
        coupled_LBN=torch.empty_like(rows.weight_LBN, memory_format=torch.contiguous_format),
    )
    for begin in range(0, num_columns, columns):
        wave = _Wave(rows, rounded, grids, begin, min(begin + columns, num_columns))
        wave.run()
    return rounded


class _Wave:
    """Columns `begin .. end` of the rows; the errors of the columns before them are known."""

    def __init__(self, rows: CoupledRows, rounded: RoundedRows, grids: ColumnGrids, begin: int, end: int) -> None:
        weight_CBN = rows.weight_LBN[begin:end]
        self.rounded = rounded
        self.columns = slice(begin, end)
        self.num_columns, self.num_rows, self.num_heads = weight_CBN.shape
        before_CR = rows.upper_LL[:begin, begin:end].T @ rounded.error_LBN[:begin].flatten(1)
        pending_CBN = rows.pending_LBN[begin:end] + before_CR.view_as(weight_CBN)
        self.upper_CC = rows.upper_LL[begin:end, begin:end].flip(0, 1)
        self.inverse_C1 = self.upper_CC.diagonal().reciprocal()[:, None]
        self.output_BNB = rows.output_NBB.transpose(0, 1).contiguous()
        self.inverse_BN = rows.output_NBB.diagonal(dim1=1, dim2=2).T.reciprocal().contiguous()
        # The two sums that a step needs, and what they become once its own error is in them: `A` and `P_out^T A`.
        self.own_BNC = pending_CBN.flip(0).permute(1, 2, 0).contiguous()
        self.coupled_CNB = rows.earlier_LBN[begin:end].flip(0).transpose(1, 2).contiguous()
        grid_of_place = list(grids.grid_of_column[begin:end])[::-1]
        zero_point_CR = grids.zero_point_GR[grid_of_place]
        scale_CR = grids.scale_GR[grid_of_place]
        # Weight, scale, lowest and highest step of every entry: one index finds all four.
        given = (weight_CBN.flip(0).flatten(1), scale_CR, -zero_point_CR, grids.max_code - zero_point_CR)
        self.given = torch.stack(given).view(4, -1, self.num_heads)
        self.error_CBN = torch.empty_like(weight_CBN, memory_format=torch.contiguous_format)

    def run(self) -> None:
        """Round all entries and write the results, front to back again."""
        for step in range(self.num_rows + self.num_columns - 1):
            self._round(step)
        self.rounded.error_LBN[self.columns] = self.error_CBN.flip(0)
        self.rounded.own_LBN[self.columns] = self.own_BNC.permute(2, 0, 1).flip(0)
        self.rounded.coupled_LBN[self.columns] = self.coupled_CNB.transpose(1, 2).flip(0)

    def _round(self, step: int) -> None:
        """Round the entries with `i + j = step` and hand their errors on, along their rows and down their columns."""
        first, last = max(0, step - self.num_columns + 1), min(self.num_rows - 1, step)
        rows, place = slice(first, last + 1), self.num_columns - 1 - step
        places = slice(place + first, place + last + 1)
        stride = self.num_rows + 1
        start = place * self.num_rows + first * stride
        entries = slice(start, start + (last - first) * stride + 1, stride)
        weight_MN, scale_MN, lowest_MN, highest_MN = self.given[:, entries].unbind()
        error_MN = self.error_CBN.view(-1, self.num_heads)[entries]
        own_MN = _diagonal(self.own_BNC, rows.start, places.start, len(error_MN))
        coupled_MN = _diagonal(self.coupled_CNB, places.start, rows.start, len(error_MN))
        current_MN = torch.addcmul(own_MN, coupled_MN, self.inverse_BN[rows])
        current_MN = torch.addcmul(weight_MN, current_MN, self.inverse_C1[places]).div_(scale_MN).round_()
        torch.clamp(current_MN, lowest_MN, highest_MN, out=current_MN)
        torch.addcmul(weight_MN, current_MN, scale_MN, value=-1, out=error_MN)
        # Below the diagonal of `P_in`, and left of that of `P_out`, nothing is handed on.
        upper_MC = self.upper_CC[places, : places.stop]
        self.own_BNC[rows, :, : places.stop].addcmul_(error_MN[:, :, None], upper_MC[:, None])
        self.coupled_CNB[places, :, first:].addcmul_(own_MN[:, :, None], self.output_BNB[rows, :, first:])


def _diagonal(values: torch.Tensor, first: int, last: int, count: int) -> torch.Tensor:
    """Return the view `[M, N]` of entries `(first + m, :, last + m)`, `count` of them."""
    outer, middle, inner = values.stride()
    return values.as_strided((count, values.shape[1]), (outer + inner, middle), first * outer + last * inner)
