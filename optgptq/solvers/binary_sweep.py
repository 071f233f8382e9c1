"""Better coefficients and codes for a finished weight in binary codes, group after group, under the whole moment.

With the error `e` of a row and its gradient `g = H e`, the coefficients of one group, all else held, are a small
least-squares problem: `X^T H X change = X^T g` for the columns `X` that its codes pick from the table. Then each code
moves to the level nearest to `level + g_j / H_jj`. No step raises `e H e^T`, so that sweeps over the groups lead to
coefficients that are the best together. Source: docs/math/binary-codes.md.

Shapes: `I` columns in the walk's order, `L` columns of a group, `G` groups, `O` rows, `K` levels, `B` coefficients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from optgptq.native.binary import improve_levels
from optgptq.native.group import path_for
from optgptq.native.library import Backend
from optgptq.solvers.levels import best_change, columns_of, half_precision, levels_of, nearest_level

_LARGEST_BYTE = 127
_SMALLEST_HALF = 2.0**-24


@dataclass(slots=True, eq=False)
class BinaryRows:
    """Rows in binary codes on their way; columns and groups are in the walk's order.

    Attributes:
        codes_IO: uint8.
        coefficient_GBO: of each group.
        error_IO: target minus level.
    """

    codes_IO: torch.Tensor
    coefficient_GBO: torch.Tensor
    error_IO: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class ImprovedGroup:
    """A group after one step: new codes and coefficients, and the new levels minus the old ones."""

    codes_LO: torch.Tensor
    coefficient_BO: torch.Tensor
    change_LO: torch.Tensor


def sweep(
    rows: BinaryRows,
    moment_II: torch.Tensor,
    table_KBO: torch.Tensor,
    *,
    unit_O: torch.Tensor | None = None,
    forced: bool = False,
    backend: Backend = "auto",
) -> None:
    """Improve every group once, in place.

    Args:
        rows: what is improved.
        moment_II: undamped moment `H`; columns without one keep their codes.
        table_KBO: what levels are made of.
        unit_O: coefficients become whole multiples of it, up to 127; None: values that float16 holds.
        forced: coefficients are taken even if the loss rises: they were not of this kind before.
        backend: who improves a group; `torch` is the definition of the others.
    """
    group_size = len(rows.error_IO) // len(rows.coefficient_GBO)
    for group, begin in enumerate(range(0, len(rows.error_IO), group_size)):
        columns = slice(begin, begin + group_size)
        improved = improve_group(
            moment_II[columns] @ rows.error_IO,
            moment_II[columns, columns],
            rows.codes_IO[columns],
            rows.coefficient_GBO[group],
            table_KBO,
            unit_O=unit_O,
            forced=forced,
            backend=backend,
        )
        rows.codes_IO[columns] = improved.codes_LO
        rows.coefficient_GBO[group] = improved.coefficient_BO
        rows.error_IO[columns] -= improved.change_LO


def byte_units(coefficient_GBO: torch.Tensor) -> torch.Tensor:
    """Return the smallest units `[O]` in float16 in which bytes hold all coefficients of a row; never zero."""
    largest_O = coefficient_GBO.abs().amax(dim=(0, 1)) / _LARGEST_BYTE
    # Half of float16's smallest number more: where its steps are coarse, rounding down would cut the largest off.
    return half_precision(largest_O + _SMALLEST_HALF / 2).clamp(min=_SMALLEST_HALF)


def improve_group(
    gradient_LO: torch.Tensor,
    moment_LL: torch.Tensor,
    codes_LO: torch.Tensor,
    coefficient_BO: torch.Tensor,
    table_KBO: torch.Tensor,
    *,
    unit_O: torch.Tensor | None,
    forced: bool,
    backend: Backend = "auto",
) -> ImprovedGroup:
    """Return one group with fitted coefficients, then better codes; nothing that is passed in is changed."""
    path = path_for(backend, gradient_LO, moment_LL, coefficient_BO, table_KBO)
    if path is not None:
        group = (gradient_LO, moment_LL, codes_LO, coefficient_BO, table_KBO)
        return ImprovedGroup(*improve_levels(path, *group, unit_O=unit_O, forced=forced))
    columns_BLO = columns_of(table_KBO, codes_LO)
    products_BLO = moment_LL @ columns_BLO
    normal_BBO = torch.einsum("alo,blo->abo", columns_BLO, products_BLO)
    slope_BO = torch.einsum("blo,lo->bo", columns_BLO, gradient_LO)
    wanted_BO = _rounded(unit_O)(coefficient_BO + best_change(normal_BBO.clone(), slope_BO))
    change_BO = wanted_BO - coefficient_BO
    gain_O = (change_BO * (2 * slope_BO - torch.einsum("abo,bo->ao", normal_BBO, change_BO))).sum(dim=0)
    if not forced:
        change_BO = torch.where(gain_O > 0, change_BO, 0.0)
        wanted_BO = torch.where(gain_O > 0, wanted_BO, coefficient_BO)
    gradient_LO = gradient_LO - torch.einsum("bo,blo->lo", change_BO, products_BLO)
    before_LO = levels_of(table_KBO, coefficient_BO).gather(0, codes_LO.long())
    level_KO = levels_of(table_KBO, wanted_BO)
    codes_LO, level_LO = _descend(gradient_LO, moment_LL, codes_LO, level_KO)
    return ImprovedGroup(codes_LO, wanted_BO, level_LO - before_LO)


def _rounded(unit_O: torch.Tensor | None) -> Callable[[torch.Tensor], torch.Tensor]:
    if unit_O is None:
        return half_precision
    return lambda values_BO: (values_BO / unit_O).round().clamp(-_LARGEST_BYTE, _LARGEST_BYTE) * unit_O


def _descend(
    gradient_LO: torch.Tensor, moment_LL: torch.Tensor, codes_LO: torch.Tensor, level_KO: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes and their levels after every column in turn took its best level; `gradient_LO` is overwritten."""
    codes_LO = codes_LO.clone()
    level_LO = level_KO.gather(0, codes_LO.long())
    for column, moment in enumerate(moment_LL.diagonal().tolist()):
        if moment <= 0:
            continue
        old_O = level_LO[column].clone()
        level_LO[column], codes_LO[column] = nearest_level(old_O + gradient_LO[column] * (1 / moment), level_KO)
        if column + 1 < len(codes_LO):
            gradient_LO[column + 1 :].addr_(moment_LL[column + 1 :, column], level_LO[column] - old_O, alpha=-1)
    return codes_LO, level_LO
