"""What binary codes are asked to be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from optgptq.layout import CoefficientStorage

CodeWeighting = Literal["none", "diagonal", "pivot"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BinarySettings:
    """How the levels of binary codes are found; solvers of uniform grids ignore it.

    Attributes:
        intermediate_bits: width of the whole numbers among which levels are searched first, more than the bits of the
            code and at most 6.
        weighting: what an error in a column costs in that search: the same in each, the moment's diagonal, or what
            GPTQ pays for it.
        scales: smallest and largest share of the full range that the search spans, and the step between two.
        uniform_start: the cheapest uniform grid is walked too, and its levels are taken where they cost less.
        refits: how often the coefficients of a group are fitted to its codes and the group is walked again.
        sweeps: rounds of fitting all coefficients and improving all codes under the whole moment.
        coefficients: how coefficients are stored; `steps` gives a row one shape, and each group its scale and offset,
            where the others give each group levels of its own.
    """

    intermediate_bits: int = 4
    weighting: CodeWeighting = "pivot"
    scales: tuple[float, float, float] = (0.3, 1.3, 0.05)
    uniform_start: bool = True
    refits: int = 3
    sweeps: int = 2
    coefficients: CoefficientStorage = "int8"

    @property
    def factors(self) -> tuple[float, ...]:
        """Return the shares that are tried, the full range first: of equally good ones the first is taken."""
        first, last, step = self.scales
        tried = [first + step * index for index in range(round((last - first) / step) + 1)]
        return tuple(sorted(tried, key=lambda share: (abs(share - 1.0), share)))
