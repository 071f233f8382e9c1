"""The levels of binary codes that a group of columns asks for: every code of a codebook at every scale is priced.

For a scale `S` a weight `w` stands at `u = w / S + z` among the whole numbers. Weights that stand nearest to the same
number `v` are priced together: with `m0 = sum(price)`, `m1 = sum(price * u)` of each `v` and `m2 = sum(price * u^2)`,

    cost(code, S) = S^2 (m2 + sum_v near(v)^2 m0(v) - 2 near(v) m1(v)),    near(v): the code's level nearest to v

so that all codes are priced by one product, whatever the number of columns. Where `u` is not whole, the level nearest
to `v` may not be the one nearest to `u`: the price is then that of the worse level, never too low.
Source: the reconstruction of GPTQT (arXiv 2407.02891), both steps and the scale that is explored again.

Shapes: `L` columns, `O` rows, `C` codes, `S` shapes, `V` whole numbers, `P` bits. Arithmetic is in the columns' dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from optgptq.grids.codebook import Codebook

# Rows priced at once: a product of this many rows with a large codebook stays a few megabytes.
_ROWS = 256
# Share of the largest cost that a code could have by which costs of equal codes may differ after rounding.
_TIE = {torch.float32: 1e-7, torch.float64: 1e-12}
# Float16 holds every half step of it. A larger one, for groups of zeros, would set the unit of all bytes of a row.
SMALLEST_SCALE = 2.0**-23


@dataclass(frozen=True, slots=True, eq=False)
class FoundCodes:
    """The cheapest code of each row.

    Attributes:
        index_O: into the codebook, int64.
        scale_O: `S`.
        zero_O: `z`, a whole number.
        cost_O: what it costs.
    """

    index_O: torch.Tensor
    scale_O: torch.Tensor
    zero_O: torch.Tensor
    cost_O: torch.Tensor

    def coefficients(self, codes: Codebook) -> tuple[torch.Tensor, torch.Tensor]:
        """Return coefficients `[P, O]`, descending, and offsets `[O]` of the signs +1 and -1."""
        steps_PO = codes.steps_SP.to(self.index_O.device)[codes.shape_C.to(self.index_O.device)[self.index_O]].T
        return steps_PO.to(self.scale_O.dtype) * self.scale_O / 2, self.centre(codes)

    def centre(self, codes: Codebook) -> torch.Tensor:
        """Return what lies half-way between the lowest and the highest level, `[O]`."""
        width_C = codes.steps_SP.sum(dim=1)[codes.shape_C]
        middle_C = codes.offset_C + width_C.to(self.scale_O.dtype) / 2
        return (middle_C.to(self.index_O.device)[self.index_O] - self.zero_O) * self.scale_O


def search_codes(
    columns_LO: torch.Tensor,
    price_L: torch.Tensor,
    codes: Codebook,
    factors: Sequence[float],
    *,
    shape_O: torch.Tensor | None = None,
) -> FoundCodes:
    """Return the cheapest code and scale of each row; of equally cheap ones the first factor, then the first code.

    Costs within `search_tolerance` are equal: rounding orders them.

    Args:
        columns_LO: the weights as they stand.
        price_L: what a squared error in each column costs.
        codes: codes to choose from.
        factors: shares of the full range, which has zero in it, that the whole numbers span.
        shape_O: the only shape that each row may have; None for any.
    """
    parts = []
    for begin in range(0, columns_LO.shape[1], _ROWS):
        rows = slice(begin, begin + _ROWS)
        shape_R = None if shape_O is None else shape_O[rows]
        parts.append(_search(columns_LO[:, rows], price_L, codes, factors, shape_R))
    return FoundCodes(*(torch.cat(fields) for fields in zip(*parts, strict=True)))


def search_tolerance(price_L: torch.Tensor, codes: Codebook) -> float:
    """Return by how much costs of equal codes may differ, in units of the squared scale."""
    return _TIE[price_L.dtype] * codes.max_number**2 * float(price_L.sum())


def price_shapes(
    columns_LO: torch.Tensor, price_L: torch.Tensor, codes: Codebook, factors: Sequence[float]
) -> torch.Tensor:
    """Return what each shape costs at its best offset and scale, `[S, O]`."""
    shape_C = codes.shape_C.to(columns_LO.device)
    best_OS = columns_LO.new_full((columns_LO.shape[1], len(codes.steps_SP)), torch.inf)
    for factor in factors:
        cost_OC, _, _ = price_codes(columns_LO, price_L, codes, factor)
        best_OS.scatter_reduce_(1, shape_C.expand_as(cost_OC), cost_OC, "amin")
    return best_OS.T


def price_room(columns_LO: torch.Tensor, price_L: torch.Tensor, codes: Codebook) -> torch.Tensor:
    """Return by how much equal costs of each row may differ, `[O]`: `search_tolerance` at the full range."""
    return search_tolerance(price_L, codes) * _scale(columns_LO, codes.max_number, 1.0)[0].square()


def price_codes(
    columns_LO: torch.Tensor, price_L: torch.Tensor, codes: Codebook, factor: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the cost of every code `[O, C]` at one scale, the scale `[O]` and the zero `[O]`."""
    scale_O, zero_O = _scale(columns_LO, codes.max_number, factor)
    places_LO = columns_LO / scale_O + zero_O
    numbers_LO = places_LO.round().clamp(0, codes.max_number).long()
    # Counted from the middle of the numbers, squares stay small.
    middle = codes.max_number / 2
    places_LO = places_LO - middle
    priced_LO = price_L[:, None] * places_LO
    sums_VO = columns_LO.new_zeros(2, codes.max_number + 1, columns_LO.shape[1])
    sums_VO[0].scatter_add_(0, numbers_LO, price_L[:, None].expand_as(priced_LO).contiguous())
    sums_VO[1].scatter_add_(0, numbers_LO, priced_LO)
    near_VC = codes.nearest_CV.to(columns_LO.device).T.to(columns_LO.dtype) - middle
    factors_WC = torch.cat([near_VC.square(), -2 * near_VC])
    cost_OC = sums_VO.flatten(0, 1).T @ factors_WC + (priced_LO * places_LO).sum(dim=0)[:, None]
    return cost_OC * scale_O.square()[:, None], scale_O, zero_O


def _scale(columns_LO: torch.Tensor, max_number: int, factor: float) -> tuple[torch.Tensor, torch.Tensor]:
    low_O, high_O = columns_LO.amin(dim=0).clamp(max=0), columns_LO.amax(dim=0).clamp(min=0)
    full_O = ((high_O - low_O) / max_number).clamp(min=SMALLEST_SCALE)
    # Zero keeps its place among the numbers, so that both ends of the range move.
    return factor * full_O, (-low_O / full_O).round()


def _search(
    columns_LO: torch.Tensor,
    price_L: torch.Tensor,
    codes: Codebook,
    factors: Sequence[float],
    shape_O: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    is_other_OC = None if shape_O is None else codes.shape_C.to(shape_O.device) != shape_O[:, None]
    best_O = torch.full_like(columns_LO[0], torch.inf)
    index_O = torch.zeros_like(best_O, dtype=torch.int64)
    taken_O, zero_O = torch.ones_like(best_O), torch.zeros_like(best_O)
    tolerance = search_tolerance(price_L, codes)
    for factor in factors:
        cost_OC, scale_O, here_O = price_codes(columns_LO, price_L, codes, factor)
        if is_other_OC is not None:
            cost_OC = cost_OC.masked_fill_(is_other_OC, torch.inf)
        cost_O, tie_O = cost_OC.amin(dim=1), tolerance * scale_O.square()
        code_O = (cost_OC <= (cost_O + tie_O)[:, None]).to(torch.uint8).argmax(dim=1)
        is_better_O = cost_O < best_O - tie_O
        best_O = torch.where(is_better_O, cost_O, best_O)
        index_O = torch.where(is_better_O, code_O, index_O)
        taken_O = torch.where(is_better_O, scale_O, taken_O)
        zero_O = torch.where(is_better_O, here_O, zero_O)
    return index_O, taken_O, zero_O, best_O
