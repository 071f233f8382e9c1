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

Shapes: `L` columns of a group, `O` rows, `C` candidates, `K` steps of a scan or candidates kept.
Arithmetic is in the dtype of the weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from optgptq.grids.affine import round_, storable_scale
from optgptq.grids.settings import GridSettings

_COARSE_STEPS = 12
_FINE_STEPS = 3
# Smallest share of the full range that is tried: with few levels, more is worth clipping.
_SMALLEST_SHARE = {2: 0.25, 3: 0.4, 4: 0.5, 8: 0.8}
# Numbers per tile of rows: they stay in the cache of one core, and torch does not share them out to a second one, which
# costs more than it saves at this size.
_TILE = 1 << 15


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
    if grid.search == "minmax":
        scale_O, zero_point_O = _full_range(columns_LO, grid)
        return scale_O.expand(count, -1), zero_point_O.expand(count, -1)
    shares_K, factors_K = (steps_K.to(columns_LO.device) for steps_K in scan_steps(grid, columns_LO.dtype))
    coarse = _priced(columns_LO, _shrunk_ranges(columns_LO, shares_K, grid), price, grid)
    best = coarse.cheapest(1)
    fine = _priced(columns_LO, _neighbours(best, factors_K, grid), price, grid)
    cheapest = coarse.joined(fine).cheapest(count)
    return cheapest.scale_CO, cheapest.zero_point_CO


ScanSteps = tuple[torch.Tensor, torch.Tensor]
"""What `scan_steps` returns."""


def scan_steps(grid: GridSettings, dtype: torch.dtype) -> ScanSteps:
    """Return what is tried: `[K]` shares of the full range, then `[K]` factors of the best scale among them."""
    spacing = (1 - _SMALLEST_SHARE[grid.bits]) / (_COARSE_STEPS - 1)
    shares_K = 1 - spacing * torch.arange(_COARSE_STEPS, dtype=dtype)
    factors_K = 1 + torch.arange(-_FINE_STEPS, _FINE_STEPS + 1, dtype=dtype) * (spacing / (_FINE_STEPS + 1))
    return shares_K, factors_K


@dataclass(frozen=True, slots=True, eq=False)
class _Candidates:
    """Grids to try, `C` for every row, and what each of them costs once that is known."""

    scale_CO: torch.Tensor
    zero_point_CO: torch.Tensor
    cost_CO: torch.Tensor | None = None

    def cheapest(self, count: int) -> _Candidates:
        """Return the `count` best, of equal ones the first: torch.topk does not say which it takes."""
        assert self.cost_CO is not None
        left_CO = self.cost_CO.clone()
        chosen = []
        for _ in range(count):
            chosen.append(left_CO.argmin(dim=0, keepdim=True))
            left_CO.scatter_(0, chosen[-1], torch.inf)
        index_KO = torch.cat(chosen)
        return _Candidates(self.scale_CO.gather(0, index_KO), self.zero_point_CO.gather(0, index_KO))

    def joined(self, other: _Candidates) -> _Candidates:
        assert self.cost_CO is not None
        assert other.cost_CO is not None
        return _Candidates(
            torch.cat([self.scale_CO, other.scale_CO]),
            torch.cat([self.zero_point_CO, other.zero_point_CO]),
            torch.cat([self.cost_CO, other.cost_CO]),
        )


def _range(columns_LO: torch.Tensor, grid: GridSettings) -> tuple[torch.Tensor, torch.Tensor]:
    low_O, high_O = columns_LO.amin(dim=0), columns_LO.amax(dim=0)
    if grid.symmetric:
        high_O = torch.maximum(-low_O, high_O)
        return -high_O, high_O
    return low_O.clamp(max=0), high_O.clamp(min=0)


def _allowed(zero_point: torch.Tensor, grid: GridSettings) -> torch.Tensor:
    return zero_point.clamp(grid.smallest_zero_point, grid.max_code)


def _full_range(columns_LO: torch.Tensor, grid: GridSettings) -> tuple[torch.Tensor, torch.Tensor]:
    low_O, high_O = _range(columns_LO, grid)
    scale_O = storable_scale((high_O - low_O) / grid.max_code)
    if grid.symmetric:
        return scale_O, torch.full_like(scale_O, grid.symmetric_zero_point)
    return scale_O, _allowed((-low_O / scale_O).round(), grid)


def _shrunk_ranges(columns_LO: torch.Tensor, shares_K: torch.Tensor, grid: GridSettings) -> _Candidates:
    """Return each share of the full range, symmetric: both ways round, asymmetric: with both zero points around it."""
    low_O, high_O = _range(columns_LO, grid)
    scale_KO = storable_scale(shares_K[:, None] * ((high_O - low_O) / grid.max_code))
    if grid.symmetric:
        scale_CO = torch.cat([scale_KO, -scale_KO])
        return _Candidates(scale_CO, torch.full_like(scale_CO, grid.symmetric_zero_point))
    exact_KO = -low_O * shares_K[:, None] / scale_KO
    zero_point_CO = _allowed(torch.cat([exact_KO.floor(), exact_KO.ceil()]), grid)
    return _Candidates(torch.cat([scale_KO, scale_KO]), zero_point_CO)


def _neighbours(best: _Candidates, factors_K: torch.Tensor, grid: GridSettings) -> _Candidates:
    scale_KO = storable_scale(factors_K[:, None] * best.scale_CO)
    zero_point_KO = best.zero_point_CO.expand_as(scale_KO)
    if grid.symmetric:
        return _Candidates(scale_KO, zero_point_KO)
    zero_point_CO = torch.cat([zero_point_KO + shift for shift in (0, -1, 1)])
    return _Candidates(scale_KO.repeat(3, 1), _allowed(zero_point_CO, grid))


def _priced(columns_LO: torch.Tensor, candidates: _Candidates, price: ErrorPrice, grid: GridSettings) -> _Candidates:
    """Return the candidates with the cost of each of them in every row."""
    num_columns, num_rows = columns_LO.shape
    cost_CO = torch.empty_like(candidates.scale_CO)
    tile = max(_TILE // num_columns, 1)
    lowest_CO, highest_CO = -candidates.zero_point_CO, grid.max_code - candidates.zero_point_CO
    for begin in range(0, num_rows, tile):
        rows = slice(begin, begin + tile)
        tile_LO = columns_LO[:, rows].contiguous()
        scaled_LO, error_LO = torch.empty_like(tile_LO), torch.empty_like(tile_LO)
        for candidate in range(cost_CO.shape[0]):
            torch.div(tile_LO, candidates.scale_CO[candidate, rows], out=scaled_LO)
            torch.clamp(scaled_LO, lowest_CO[candidate, rows], highest_CO[candidate, rows], out=error_LO)
            torch.sub(scaled_LO, round_(error_LO), out=error_LO)
            cost_CO[candidate, rows] = _cost(error_LO, price, grid)
    return _Candidates(candidates.scale_CO, candidates.zero_point_CO, cost_CO.mul_(candidates.scale_CO.square()))


def _cost(error_LO: torch.Tensor, price: ErrorPrice, grid: GridSettings) -> torch.Tensor:
    """Return the price `[O]` of errors in units of the scale; `error_LO` is overwritten."""
    if grid.search == "hessian":
        return (price.matrix_LL @ error_LO).mul_(error_LO).sum(dim=0)
    squared_LO = error_LO.square_()
    if grid.search == "mse":
        return squared_LO.sum(dim=0)
    return price.diagonal_L @ squared_LO
