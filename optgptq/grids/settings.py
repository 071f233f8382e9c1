"""What a uniform grid is asked to be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

GridSearch = Literal["minmax", "mse", "hessian", "pivot", "walk"]
GroupGrids = Literal["dynamic", "static"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GridSettings:
    """Which uniform grid a weight is put on.

    Attributes:
        bits: 2, 3, 4 or 8.
        symmetric: fixed zero point `2**(bits - 1)`.
        group_size: columns per group, -1 for one group per row. It must divide the number of columns.
        search: how the range of each group is chosen (`optgptq.grids.search`).
        group_grids: `dynamic` reads a group's range from weights that already carry the compensation of the
            columns before it; `static` reads all ranges before the first column is quantized.
        smallest_zero_point: 1 for layouts that store the zero point minus one, else 0.
    """

    bits: int
    symmetric: bool
    group_size: int
    search: GridSearch = "walk"
    group_grids: GroupGrids = "dynamic"
    smallest_zero_point: int = 0

    @property
    def max_code(self) -> int:
        return (1 << self.bits) - 1

    @property
    def symmetric_zero_point(self) -> int:
        return 1 << (self.bits - 1)
