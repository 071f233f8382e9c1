"""Which range a group's grid spans: a coarse scan of shrunk ranges, then a fine one around the best.

Clipping the largest weights pays where it makes the steps between all others smaller. How an error is priced is the
whole difference between the searches:

    minmax   no search: the range is that of the weights
    mse      every column the same
    pivot    column j by P_jj^2, what GPTQ pays for an error that later columns compensate as far as they can
    hessian  the whole block P P^T of the group: also how errors of its columns meet
    walk     as pivot, but the walk of GPTQ is tried with the best few and decides (`optgptq.solvers.gptq`)

A symmetric grid has one level more on its negative side. Its scale may be negative, which turns the grid around: the
search tries both, so that the extra level is where the weights need it (at 2 bits a quarter of all levels).
Every candidate scale is rounded for storage before it is tried.

Shapes: `L` columns of a group, `O` rows. Arithmetic is in the dtype of the weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from optgptq.grids.affine import storable_scale
from optgptq.grids.settings import GridSettings

_COARSE_STEPS = 12
_FINE_STEPS = 3
# Smallest share of the full range that is tried: with few levels, more is worth clipping.
_SMALLEST_SHARE = {2: 0.25, 3: 0.4, 4: 0.5, 8: 0.8}
# Numbers per tile of rows: a few of them stay in the cache of one core.
_TILE = 1 << 16


@dataclass(frozen=True, slots=True, eq=False)
class ErrorPrice:
    """What an error in the columns of a group costs.

    Attributes:
        diagonal_L: price of each column's squared error.
        matrix_LL: price of the whole group, `e^T M e`.
    """

    diagonal_L: torch.Tensor
    matrix_LL: torch.Tensor


def find_grids(
    columns_LO: torch.Tensor, price: ErrorPrice, grid: GridSettings, *, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scale and zero point `[count, O]`: for every row its `count` best grids, the best one first.

    Rows of zeros get the smallest scale and code every weight as the zero point.
    """
    num_columns, num_rows = columns_LO.shape
    step = max(_TILE // num_columns, 1)
    tiles = [_Search(columns_LO[:, begin : begin + step], price, grid) for begin in range(0, num_rows, step)]
    scales, zero_points = zip(*(tile.best(count) for tile in tiles), strict=True)
    return torch.cat(scales, dim=1), torch.cat(zero_points, dim=1)


class _Search:
    """All grids that were tried for the rows of one tile."""

    def __init__(self, columns_LO: torch.Tensor, price: ErrorPrice, grid: GridSettings) -> None:
        self.columns_LO = columns_LO.contiguous()
        self.price = price
        self.grid = grid
        self.error_LO = torch.empty_like(self.columns_LO)
        low_O, high_O = self.columns_LO.amin(dim=0), self.columns_LO.amax(dim=0)
        self.low_O = low_O if grid.symmetric else low_O.clamp(max=0)
        self.high_O = high_O if grid.symmetric else high_O.clamp(min=0)
        self.tried: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def best(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scale and zero point `[count, O]`, the cheapest first."""
        if self.grid.search == "minmax":
            scale_O, zero_point_O = self._full_range()
            return scale_O.expand(count, -1), zero_point_O.expand(count, -1)
        smallest = _SMALLEST_SHARE[self.grid.bits]
        spacing = (1 - smallest) / (_COARSE_STEPS - 1)
        for step in range(_COARSE_STEPS):
            self._try(*self._shrunk_range(1 - step * spacing))
        coarse_scale_KO, coarse_zero_point_KO = self._cheapest(1)
        shifts = (0,) if self.grid.symmetric else (0, -1, 1)
        for step in range(-_FINE_STEPS, _FINE_STEPS + 1):
            scale_O = storable_scale(coarse_scale_KO[0] * (1 + spacing * step / (_FINE_STEPS + 1)))
            zero_points = [self._allowed(coarse_zero_point_KO[0] + shift) for shift in shifts if step or shift]
            if zero_points:
                self._try(scale_O, zero_points, turned=False)
        return self._cheapest(count)

    def _cheapest(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        costs, scales, zero_points = (torch.stack(parts) for parts in zip(*self.tried, strict=True))
        index_KO = costs.topk(count, dim=0, largest=False).indices if count > 1 else costs.argmin(dim=0, keepdim=True)
        return scales.gather(0, index_KO), zero_points.gather(0, index_KO)

    def _full_range(self) -> tuple[torch.Tensor, torch.Tensor]:
        scale_O, zero_points, _ = self._shrunk_range(1.0)
        if self.grid.symmetric:
            return scale_O, zero_points[0]
        return scale_O, self._allowed((-self.low_O / scale_O).round())

    def _shrunk_range(self, share: float) -> tuple[torch.Tensor, list[torch.Tensor], bool]:
        """Return a scale, the zero points to try with it, and whether to try it turned around as well."""
        if self.grid.symmetric:
            largest_O = torch.maximum(-self.low_O, self.high_O)
            scale_O = storable_scale(largest_O * (2 * share / self.grid.max_code))
            return scale_O, [torch.full_like(scale_O, self.grid.symmetric_zero_point)], True
        scale_O = storable_scale((self.high_O - self.low_O) * (share / self.grid.max_code))
        exact_O = -self.low_O * share / scale_O
        return scale_O, [self._allowed(exact_O.floor()), self._allowed(exact_O.ceil())], False

    def _allowed(self, zero_point_O: torch.Tensor) -> torch.Tensor:
        return zero_point_O.clamp(self.grid.smallest_zero_point, self.grid.max_code)

    def _try(self, scale_O: torch.Tensor, zero_points: list[torch.Tensor], turned: bool) -> None:
        """Price a scale with each of the zero points; `turned` adds the same grids with the scale negative.

        A turned grid has its levels at `scale * (zero_point - code)`: the same rounding, other bounds.
        """
        scaled_LO = self.columns_LO / scale_O
        rounded_LO = scaled_LO.round()
        squared_scale_O = scale_O.square()
        max_code = self.grid.max_code
        for zero_point_O in zero_points:
            bounds = [(scale_O, -zero_point_O, max_code - zero_point_O)]
            if turned:
                bounds.append((-scale_O, zero_point_O - max_code, zero_point_O))
            for signed_scale_O, lowest_O, highest_O in bounds:
                torch.clamp(rounded_LO, lowest_O, highest_O, out=self.error_LO)
                torch.sub(scaled_LO, self.error_LO, out=self.error_LO)
                self.tried.append((self._cost().mul_(squared_scale_O), signed_scale_O, zero_point_O))

    def _cost(self) -> torch.Tensor:
        """Return the price `[O]` of `error_LO`, which is overwritten."""
        if self.grid.search == "hessian":
            return (self.price.matrix_LL @ self.error_LO).mul_(self.error_LO).sum(dim=0)
        squared_LO = self.error_LO.square_()
        if self.grid.search == "mse":
            return squared_LO.sum(dim=0)
        return self.price.diagonal_L @ squared_LO
