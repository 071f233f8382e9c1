"""The cheapest binary codes of a group, by whoever runs the inner loops.

Shapes: `L` columns, `O` rows, `S` shapes, `K` levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch

from optgptq.grids import binary_search
from optgptq.grids.binary_search import SMALLEST_SCALE, FoundCodes, search_codes, search_tolerance
from optgptq.grids.codebook import Codebook, subset_sums
from optgptq.native import binary as native
from optgptq.native.binary import CodeScan
from optgptq.native.group import path_for
from optgptq.native.library import Backend


def find_codes(
    columns_LO: torch.Tensor,
    price_L: torch.Tensor,
    codes: Codebook,
    factors: Sequence[float],
    *,
    shape_O: torch.Tensor | None = None,
    backend: Backend = "auto",
) -> FoundCodes:
    """Return what `optgptq.grids.binary_search.search_codes` returns, which is the definition of every backend."""
    path = path_for(backend, columns_LO, price_L)
    if path is None:
        return search_codes(columns_LO, price_L, codes, factors, shape_O=shape_O)
    scan = _scan(price_L, codes, factors)
    return FoundCodes(*native.search_levels(path, columns_LO, price_L, scan, shape_O=shape_O))


def price_shapes(
    columns_LO: torch.Tensor,
    price_L: torch.Tensor,
    codes: Codebook,
    factors: Sequence[float],
    *,
    backend: Backend = "auto",
) -> torch.Tensor:
    """Return what `optgptq.grids.binary_search.price_shapes` returns, `[S, O]`: the definition of every backend."""
    path = path_for(backend, columns_LO, price_L)
    if path is None:
        return binary_search.price_shapes(columns_LO, price_L, codes, factors)
    return native.price_shapes(path, columns_LO, price_L, _scan(price_L, codes, factors))


def _scan(price_L: torch.Tensor, codes: Codebook, factors: Sequence[float]) -> CodeScan:
    return CodeScan(
        level_SK=_levels(codes),
        factors=factors,
        max_number=codes.max_number,
        smallest_scale=SMALLEST_SCALE,
        tolerance=search_tolerance(price_L, codes),
    )


@cache
def _levels(codes: Codebook) -> torch.Tensor:
    """Return the ascending levels of each shape without an offset, int64 `[S, K]`."""
    return subset_sums(codes.steps_SP).sort(dim=1).values
