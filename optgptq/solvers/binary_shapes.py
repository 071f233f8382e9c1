"""One shape for each row in binary codes: chosen over all its groups, and what the walk of a group begins with.

A row's shape is the one that costs least over all groups in the search (`optgptq.grids.binary_search`), or the uniform
one where that costs no more: both are priced anew by the levels nearest to the weights, the uniform one also on the
uniform grid of each group. Source: docs/math/binary-codes.md.

Shapes: `L` columns of a group, `G` groups, `O` rows, `S` shapes, `P` planes, `B` coefficients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from optgptq.grids.binary_search import FoundCodes, price_room
from optgptq.grids.codebook import Codebook
from optgptq.grids.search import ErrorPrice
from optgptq.grids.settings import GridSettings
from optgptq.native.library import Backend
from optgptq.solvers.binary_codes import find_codes, price_shapes
from optgptq.solvers.levels import half_precision, levels_of, nearest_error, shape_table, uniform_coefficients
from optgptq.solvers.rounding import find_group_grids

# Rows whose shapes are priced at once: prices of all shapes stay a few megabytes.
_ROWS = 256


@dataclass(frozen=True, slots=True, eq=False)
class RowShapes:
    """The shape of every row.

    Attributes:
        index_O: among the codebook's shapes, int64.
        steps_OP: its steps without what they have in common, int64, descending.
        unit_O: what they had in common, int64.
    """

    index_O: torch.Tensor
    steps_OP: torch.Tensor
    unit_O: torch.Tensor

    def is_uniform(self) -> torch.Tensor:
        """Return `[O]`: True where levels are those of a uniform grid."""
        powers_P = 1 << torch.arange(self.steps_OP.shape[1], device=self.steps_OP.device).flip(0)
        return (self.steps_OP == powers_P).all(dim=1)

    def table(self, like: torch.Tensor) -> torch.Tensor:
        """Return what levels are made of (`optgptq.solvers.levels`), in the dtype of `like`."""
        return shape_table(self.steps_OP.T.to(like.dtype))

    def start(self, found: FoundCodes, codes: Codebook) -> torch.Tensor:
        """Return scale and centre `[2, O]` of codes of these shapes."""
        return torch.stack([found.scale_O * self.unit_O, found.centre(codes)])


def row_shapes(index_O: torch.Tensor, codes: Codebook) -> RowShapes:
    """Return rows with these shapes of a codebook."""
    steps_OP = codes.steps_SP.to(index_O.device)[index_O]
    unit_O = steps_OP[:, 0]
    for step_O in steps_OP.unbind(dim=1):
        unit_O = torch.gcd(unit_O, step_O)
    return RowShapes(index_O, steps_OP // unit_O[:, None], unit_O)


def uniform_start(scale_O: torch.Tensor, zero_point_O: torch.Tensor, bits: int) -> torch.Tensor:
    """Return scale and centre `[2, O]` of uniform grids."""
    return torch.stack([scale_O, uniform_coefficients(scale_O, zero_point_O, bits)[-1]])


def choose_shapes(
    weight_GLO: torch.Tensor,
    price_GL: torch.Tensor,
    codes: Codebook,
    factors: Sequence[float],
    *,
    grid: GridSettings | None,
    backend: Backend = "auto",
) -> RowShapes:
    """Return the shape of each row that costs least over all groups.

    Args:
        weight_GLO: the weights, which nothing has moved yet.
        price_GL: what a squared error in each column costs.
        codes: codes to choose from.
        factors: shares of the full range that are tried.
        grid: uniform grids, found by `price_GL`, than which no row shall cost more; None: the search alone decides.
        backend: who searches.
    """
    found = row_shapes(find_shapes(weight_GLO, price_GL, codes, factors, backend=backend), codes)
    if grid is None:
        return found
    uniform = row_shapes(torch.full_like(found.index_O, _widest_uniform(codes)), codes)
    dearer_O, room_O = weight_GLO.new_zeros(2, weight_GLO.shape[2]).unbind()
    for columns_LO, price_L in zip(weight_GLO, price_GL, strict=True):
        costs = []
        for shapes in (found, uniform):
            codes_O = find_codes(columns_LO, price_L, codes, factors, shape_O=shapes.index_O, backend=backend)
            costs.append(_nearest_cost(columns_LO, price_L, shapes, shapes.start(codes_O, codes), backend))
        price = ErrorPrice(price_L, price_L.diag())
        start_BO = uniform_start(*find_group_grids(columns_LO, price, grid, backend=backend), grid.bits)
        on_grid_O = _nearest_cost(columns_LO, price_L, uniform, start_BO, backend)
        dearer_O += costs[0] - torch.minimum(costs[1], on_grid_O)
        room_O += price_room(columns_LO, price_L, codes)
    return row_shapes(torch.where(dearer_O >= -room_O, uniform.index_O, found.index_O), codes)


def find_shapes(
    weight_GLO: torch.Tensor,
    price_GL: torch.Tensor,
    codes: Codebook,
    factors: Sequence[float],
    *,
    backend: Backend = "auto",
) -> torch.Tensor:
    """Return the shape of each row, int64 `[O]`: what costs least over all groups in the search.

    Each group has its best offset and scale. Of shapes whose costs differ by no more than rounding, the first.
    Arguments are those of `choose_shapes`.
    """
    parts = []
    for begin in range(0, weight_GLO.shape[2], _ROWS):
        part_GLR = weight_GLO[:, :, begin : begin + _ROWS]
        total_SR = weight_GLO.new_zeros(len(codes.steps_SP), part_GLR.shape[2])
        room_R = torch.zeros_like(total_SR[0])
        for columns_LR, price_L in zip(part_GLR, price_GL, strict=True):
            total_SR += price_shapes(columns_LR, price_L, codes, factors, backend=backend)
            room_R += price_room(columns_LR, price_L, codes)
        parts.append((total_SR <= total_SR.amin(dim=0) + room_R).to(torch.uint8).argmax(dim=0))
    return torch.cat(parts)


def _widest_uniform(codes: Codebook) -> int:
    """Return the uniform shape with the largest steps: it spans the range at every share that is tried."""
    steps_SP = codes.steps_SP
    powers_P = 1 << torch.arange(steps_SP.shape[1]).flip(0)
    widest_P = codes.max_number // int(powers_P.sum()) * powers_P
    return int((steps_SP == widest_P).all(dim=1).to(torch.uint8).argmax())


def _nearest_cost(
    columns_LO: torch.Tensor, price_L: torch.Tensor, shapes: RowShapes, start_BO: torch.Tensor, backend: Backend
) -> torch.Tensor:
    """Return what the weights cost `[O]` at their nearest levels, with coefficients as they are walked."""
    level_KO = levels_of(shapes.table(columns_LO), half_precision(start_BO))
    return price_L @ nearest_error(columns_LO, level_KO, backend=backend).square_()
