"""One group of columns in binary codes: walked on given levels, the coefficients fitted to the codes, walked again.

The walk is that of GPTQ (`optgptq.solvers.walk`) with the nearest of a few levels in place of a grid. What the codes of
a group cost once later columns compensate them is `|e P + pending|^2`, so that the best coefficients of given codes
are a least-squares fit in that space. Each row keeps the walk that cost it least.
Source: docs/math/binary-codes.md.

Shapes: `L` columns of a group in the walk's order, `O` rows, `K` levels, `B` coefficients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from optgptq.native.binary import walk_levels
from optgptq.native.group import path_for
from optgptq.native.library import Backend
from optgptq.solvers.levels import best_change, columns_of, half_precision, levels_of, nearest_level


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class CodedGroup:
    """A group in binary codes.

    Attributes:
        codes_LO: uint8.
        error_LO: the weight minus its level.
        weighted_LO: `e P` with the pending sums in it.
        coefficient_BO: values that float16 holds.
    """

    codes_LO: torch.Tensor
    error_LO: torch.Tensor
    weighted_LO: torch.Tensor
    coefficient_BO: torch.Tensor

    def cost(self) -> torch.Tensor:
        """Return what the group costs each row once later columns compensate it, `[O]`."""
        return self.weighted_LO.square().sum(dim=0)


def code_group(
    weight_LO: torch.Tensor,
    pending_LO: torch.Tensor,
    upper_LL: torch.Tensor,
    table_KBO: torch.Tensor,
    *,
    starts: Sequence[torch.Tensor],
    refits: int,
    column_block: int,
    backend: Backend = "auto",
) -> CodedGroup:
    """Return of every row the cheapest walk.

    Args:
        weight_LO: the dense weight.
        pending_LO: `sum_i e_i P_ij` over the columns before this group.
        upper_LL: the group's block of `P`, upper triangular.
        table_KBO: what levels are made of (`optgptq.solvers.levels`).
        starts: coefficients `[B, O]` to walk with, each of them; then those fitted to the cheapest walk's codes.
        refits: how often coefficients are fitted and the group is walked again.
        column_block: columns that update each other one by one; wider ranges are updated by products.
        backend: who does it; `torch` is the definition of the others.
    """
    path = path_for(backend, weight_LO, pending_LO, upper_LL, table_KBO)
    if path is not None:
        start_NBO = torch.stack(list(starts))
        found = walk_levels(path, weight_LO, pending_LO, upper_LL, table_KBO, start_NBO=start_NBO, refits=refits)
        return CodedGroup(
            codes_LO=found.codes_LO,
            error_LO=found.error_LO,
            weighted_LO=found.weighted_LO,
            coefficient_BO=found.coefficient_BO,
        )
    walks = (_walk(weight_LO, pending_LO, upper_LL, table_KBO, half_precision(start), column_block) for start in starts)
    best = next(walks)
    for walked in walks:
        best = _cheaper(best, walked)
    latest = best
    for _ in range(refits):
        fitted_BO = _refitted(latest, upper_LL, table_KBO)
        latest = _walk(weight_LO, pending_LO, upper_LL, table_KBO, fitted_BO, column_block)
        best = _cheaper(best, latest)
    return best


def _refitted(walked: CodedGroup, upper_LL: torch.Tensor, table_KBO: torch.Tensor) -> torch.Tensor:
    columns_BLO = columns_of(table_KBO, walked.codes_LO)
    whitened_BLO = upper_LL.T @ columns_BLO
    normal_BBO = torch.einsum("alo,blo->abo", whitened_BLO, whitened_BLO)
    slope_BO = torch.einsum("blo,lo->bo", whitened_BLO, walked.weighted_LO)
    return half_precision(walked.coefficient_BO + best_change(normal_BBO, slope_BO))


def _cheaper(first: CodedGroup, second: CodedGroup) -> CodedGroup:
    takes_O = second.cost() < first.cost()
    return CodedGroup(
        codes_LO=torch.where(takes_O, second.codes_LO, first.codes_LO),
        error_LO=torch.where(takes_O, second.error_LO, first.error_LO),
        weighted_LO=torch.where(takes_O, second.weighted_LO, first.weighted_LO),
        coefficient_BO=torch.where(takes_O, second.coefficient_BO, first.coefficient_BO),
    )


def _walk(
    weight_LO: torch.Tensor,
    pending_LO: torch.Tensor,
    upper_LL: torch.Tensor,
    table_KBO: torch.Tensor,
    coefficient_BO: torch.Tensor,
    column_block: int,
) -> CodedGroup:
    walk = _LevelWalk(weight_LO, pending_LO.clone(), upper_LL, levels_of(table_KBO, coefficient_BO), column_block)
    walk.run(0, len(weight_LO))
    return CodedGroup(
        codes_LO=walk.codes_LO,
        error_LO=walk.error_LO,
        weighted_LO=(upper_LL.T @ walk.error_LO).add_(pending_LO),
        coefficient_BO=coefficient_BO,
    )


class _LevelWalk:
    """Rounds columns to levels; sums over earlier columns are gathered by halves, as in `optgptq.solvers.walk`."""

    def __init__(
        self,
        weight_LO: torch.Tensor,
        pending_LO: torch.Tensor,
        upper_LL: torch.Tensor,
        level_KO: torch.Tensor,
        column_block: int,
    ) -> None:
        self.weight_LO = weight_LO
        self.pending_LO = pending_LO
        self.upper_LL = upper_LL
        self.level_KO = level_KO
        self.column_block = column_block
        self.codes_LO = torch.empty(weight_LO.shape, dtype=torch.uint8, device=weight_LO.device)
        self.error_LO = torch.empty_like(weight_LO)
        self._inverse_pivots = upper_LL.diagonal().reciprocal().tolist()

    def run(self, begin: int, end: int) -> None:
        """Round columns `begin .. end`, which have received the errors of all columns before them."""
        if end - begin <= self.column_block:
            self._run_block(begin, end)
            return
        num_blocks = -(-(end - begin) // self.column_block)
        middle = begin + num_blocks // 2 * self.column_block
        self.run(begin, middle)
        self.pending_LO[middle:end].addmm_(self.upper_LL[begin:middle, middle:end].T, self.error_LO[begin:middle])
        self.run(middle, end)

    def _run_block(self, begin: int, end: int) -> None:
        for column in range(begin, end):
            weight_O = self.weight_LO[column]
            stands_O = torch.add(weight_O, self.pending_LO[column], alpha=self._inverse_pivots[column])
            level_O, self.codes_LO[column] = nearest_level(stands_O, self.level_KO)
            error_O = torch.sub(weight_O, level_O, out=self.error_LO[column])
            if column + 1 < end:
                self.pending_LO[column + 1 : end].addr_(self.upper_LL[column, column + 1 : end], error_O)
