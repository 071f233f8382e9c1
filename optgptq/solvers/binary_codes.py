"""The cheapest binary codes of a group, by whoever runs the inner loops.

Shapes: `L` columns, `O` rows, `S` shapes, `K` levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch

from optgptq.grids.binary_search import SMALLEST_SCALE, FoundCodes, search_codes, search_tolerance
from optgptq.grids.codebook import Codebook
from optgptq.native.binary import CodeScan, search_levels
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
    """Return what `optgptq.grids.binary_search.search_codes` returns, which is the definition of every backend.

    Given shapes are searched by torch, whatever the backend.
    """
    path = path_for(backend, columns_LO, price_L) if shape_O is None else None
    if path is None:
        return search_codes(columns_LO, price_L, codes, factors, shape_O=shape_O)
    scan = CodeScan(
        level_SK=_levels(codes),
        factors=factors,
        max_number=codes.max_number,
        smallest_scale=SMALLEST_SCALE,
        tolerance=search_tolerance(price_L, codes),
    )
    return FoundCodes(*search_levels(path, columns_LO, price_L, scan))


@cache
def _levels(codes: Codebook) -> torch.Tensor:
    """Return the ascending levels of each shape without an offset, int64 `[S, K]`."""
    level_SK = torch.zeros(len(codes.steps_SP), 1, dtype=torch.int64)
    for step_S in codes.steps_SP.unbind(dim=1):
        level_SK = torch.cat([level_SK, level_SK + step_S[:, None]], dim=1)
    return level_SK.sort(dim=1).values
