"""Binary codes as their formulas are written down, in float64, one row, one column and one code at a time.

Nothing of `optgptq.solvers` or `optgptq.grids` is used. Source: docs/math/binary-codes.md.

Shapes: `L` columns of a group, `I` columns, `O` rows, `K` levels, `B` coefficients, `G` groups.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class SlowCode:
    """Levels `offset + sum of some of the steps`."""

    offset: int
    steps: tuple[int, ...]

    @property
    def levels(self) -> list[int]:
        chosen = itertools.product((0, 1), repeat=len(self.steps))
        return sorted(self.offset + sum(itertools.compress(self.steps, bits)) for bits in chosen)

    @property
    def gaps(self) -> list[int]:
        levels = self.levels
        return [high - low for low, high in itertools.pairwise(levels)]

    def is_exactly_priced(self) -> bool:
        """True where no whole number lies in the middle of two neighbouring levels."""
        return all(gap % 2 == 1 for gap in self.gaps)


def slow_codes(bits: int, intermediate_bits: int) -> list[SlowCode]:
    """Return every code whose levels all differ, by trying all steps and offsets."""
    largest = 2**intermediate_bits - 1
    codes = []
    for steps in itertools.combinations_with_replacement(range(1, largest + 1), bits):
        if sum(steps) > largest or len(set(SlowCode(0, steps).levels)) < 2**bits:
            continue
        codes += [SlowCode(offset, steps) for offset in range(largest - sum(steps) + 1)]
    return codes


def slow_places(weight_L: torch.Tensor, factor: float, intermediate_bits: int) -> tuple[float, int, list[float]]:
    """Return the scale, the zero, and where each weight stands among the whole numbers."""
    weights = weight_L.tolist()
    low, high = min(0.0, *weights), max(0.0, *weights)
    full = (high - low) / (2**intermediate_bits - 1)
    scale, zero = factor * full, round(-low / full)
    return scale, zero, [weight / scale + zero for weight in weights]


def slow_price(places: Sequence[float], price_L: torch.Tensor, levels: Sequence[int], scale: float) -> float:
    """Return what rounding every weight to its nearest level costs."""
    errors = [min((place - level) ** 2 for level in levels) for place in places]
    return scale**2 * sum(price * error for price, error in zip(price_L.tolist(), errors, strict=True))


def slow_midpoint_excess(places: Sequence[float], price_L: torch.Tensor, code: SlowCode, scale: float) -> float:
    """Return by how much at most the histogram may price a code above its cost.

    A weight whose whole number is the middle of two levels may be priced at the lower one, while it lies up to a half
    nearer to the upper one: with a gap `h` that costs `h` at most.
    """
    largest = 0.0
    for place, price in zip(places, price_L.tolist(), strict=True):
        for low, high in itertools.pairwise(code.levels):
            if low + high == 2 * round(place):
                largest += price * (high - low)
    return scale**2 * largest


def slow_levels(coefficient_B: torch.Tensor) -> torch.Tensor:
    """Return the level of every code: planes, then the offset; bit `p` of a code is the sign of plane `p`."""
    *planes, offset = coefficient_B.tolist()
    levels = []
    for code in range(2 ** len(planes)):
        signs = [1 if code >> plane & 1 else -1 for plane in range(len(planes))]
        levels.append(offset + sum(sign * plane for sign, plane in zip(signs, planes, strict=True)))
    return torch.tensor(levels, dtype=torch.float64)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class SlowWalk:
    """Codes and errors `w - q` of one row, and the normalised errors whose squares are what the walk pays."""

    codes_I: torch.Tensor
    error_I: torch.Tensor
    paid_I: torch.Tensor


def slow_walk(weight_I: torch.Tensor, damped_II: torch.Tensor, levels_I: Sequence[torch.Tensor]) -> SlowWalk:
    """Return one row walked in GPTQ's own form, `w -= e U` with `H^-1 = U^T U`; `levels_I` has each column's levels."""
    upper_II = torch.linalg.cholesky(torch.linalg.inv(damped_II.double()), upper=True)
    current_I = weight_I.double().clone()
    level_I, codes, paid = torch.empty_like(current_I), [], []
    for column, level_K in enumerate(levels_I):
        code = int((current_I[column] - level_K).abs().argmin())
        level_I[column] = level_K[code]
        error = (current_I[column] - level_K[code]) / upper_II[column, column]
        current_I[column:] -= error * upper_II[column, column:]
        codes.append(code)
        paid.append(error)
    return SlowWalk(codes_I=torch.tensor(codes), error_I=weight_I.double() - level_I, paid_I=torch.stack(paid))


def slow_columns(codes_I: torch.Tensor, bits: int) -> torch.Tensor:
    """Return `[I, B]`: for each column the signs of its code, then a one."""
    signs = [(codes_I.long() >> plane & 1) * 2 - 1 for plane in range(bits)]
    return torch.stack([*signs, torch.ones_like(codes_I, dtype=torch.int64)], dim=1).double()


def slow_fit(target_I: torch.Tensor, columns_IB: torch.Tensor, moment_II: torch.Tensor) -> torch.Tensor:
    """Return the coefficients that minimise `(t - X c) H (t - X c)^T`, by one dense least-squares problem."""
    root_II = torch.linalg.cholesky(moment_II.double()).T
    seen_I1 = root_II @ target_I.double()[:, None]
    return torch.linalg.lstsq(root_II @ columns_IB, seen_I1, driver="gelsd").solution[:, 0]


def slow_joint_columns(codes_I: torch.Tensor, bits: int, group_size: int) -> torch.Tensor:
    """Return `[I, G * B]`: the columns of every group, zeros elsewhere."""
    groups = [slow_columns(codes, bits) for codes in codes_I.split(group_size)]
    return torch.block_diag(*groups)


def row_losses(error_IO: torch.Tensor, moment_II: torch.Tensor) -> torch.Tensor:
    """Return `e H e^T` of each row, float64 `[O]`."""
    error_IO, moment_II = error_IO.double(), moment_II.double()
    return torch.stack([error_I @ moment_II @ error_I for error_I in error_IO.T])
