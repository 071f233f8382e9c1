"""Levels of binary codes on whole numbers: every way to pick them, and the nearest level to each number.

A code of `P` bits over the numbers `0 .. 2**p - 1` has an offset `e` and steps `d_1 <= ... <= d_P`; its levels are
`e + sum_i d_i b_i` for all bits `b`. A uniform grid of `P` bits has the steps `t, 2t, 4t, ...`.
Source: the reconstruction of GPTQT (arXiv 2407.02891), step 2.

Shapes: `C` codes, `S` shapes (codes without their offset), `P` bits of a code, `V` whole numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

LARGEST_INTERMEDIATE_BITS = 6


@dataclass(frozen=True, slots=True, eq=False)
class Codebook:
    """All codes of one width.

    Attributes:
        offset_C: `e`, int64.
        shape_C: shape of each code, int64; codes of a shape are neighbours.
        steps_SP: `d`, int64, descending: the first plane is the largest.
        nearest_CV: level of each code nearest to each whole number, uint8; of two equally near the lower one.
    """

    offset_C: torch.Tensor
    shape_C: torch.Tensor
    steps_SP: torch.Tensor
    nearest_CV: torch.Tensor

    @property
    def max_number(self) -> int:
        return self.nearest_CV.shape[1] - 1


@cache
def codebook(bits: int, intermediate_bits: int) -> Codebook:
    """Return all codes of `bits` bits over whole numbers of `intermediate_bits` bits whose levels all differ.

    Raises:
        ValueError: the widths do not make a codebook.
    """
    if not 1 <= bits < intermediate_bits <= LARGEST_INTERMEDIATE_BITS:
        raise ValueError(f"no codebook of {bits} bits over {intermediate_bits} bits")
    max_number = (1 << intermediate_bits) - 1
    steps_SP = _shapes(bits, max_number)
    level_SK = subset_sums(steps_SP).sort(dim=1).values
    num_offsets_S = max_number + 1 - level_SK[:, -1]
    first_S = num_offsets_S.cumsum(0) - num_offsets_S
    shape_C = torch.arange(len(steps_SP)).repeat_interleave(num_offsets_S)
    offset_C = torch.arange(len(shape_C)) - first_S[shape_C]
    level_CK = level_SK[shape_C] + offset_C[:, None]
    return Codebook(offset_C, shape_C, steps_SP.flip(1), _nearest(level_CK.to(torch.uint8), max_number))


def subset_sums(steps_SP: torch.Tensor) -> torch.Tensor:
    """Return the sums of all subsets of each shape's steps, `[S, K]`."""
    sum_SK = torch.zeros_like(steps_SP[:, :1])
    for step_S in steps_SP.unbind(dim=1):
        sum_SK = torch.cat([sum_SK, sum_SK + step_S[:, None]], dim=1)
    return sum_SK


def _shapes(bits: int, largest_sum: int) -> torch.Tensor:
    """Return ascending steps, int64, whose subset sums all differ and reach no further than `largest_sum`."""
    steps_SP, next_N = torch.ones(1, 0, dtype=torch.int64), torch.arange(1, largest_sum + 1)
    for _ in range(bits):
        before_SP, last_S = steps_SP.repeat_interleave(largest_sum, dim=0), next_N.repeat(len(steps_SP))
        longer_SP = torch.cat([before_SP, last_S[:, None]], dim=1)
        is_ascending_S = (longer_SP.diff(dim=1) >= 0).all(dim=1)
        steps_SP = longer_SP[is_ascending_S & (longer_SP.sum(dim=1) <= largest_sum)]
    is_distinct_S = (subset_sums(steps_SP).sort(dim=1).values.diff(dim=1) > 0).all(dim=1)
    return steps_SP[is_distinct_S]


def _nearest(level_CK: torch.Tensor, max_number: int) -> torch.Tensor:
    # Twice the number lies below the sum of two neighbouring levels where the lower one is nearer, or as near.
    middle_CK = level_CK[:, :-1] + level_CK[:, 1:]
    nearest_CV = torch.empty(len(level_CK), max_number + 1, dtype=torch.uint8)
    for number in range(max_number + 1):
        index_C = (2 * number > middle_CK).sum(dim=1)
        nearest_CV[:, number] = level_CK.gather(1, index_C[:, None])[:, 0]
    return nearest_CV
