"""Levels of binary codes on whole numbers: every way to pick them, and the nearest level to each number.

A code of `P` bits over the numbers `0 .. 2**p - 1` has an offset `e` and steps `d_1 <= ... <= d_P`; its levels are
`e + sum_i d_i b_i` for all bits `b`. A uniform grid of `P` bits has the steps `t, 2t, 4t, ...`.
Source: the reconstruction of GPTQT (arXiv 2407.02891), step 2.

Shapes: `C` codes, `S` shapes (codes without their offset), `P` bits of a code, `V` whole numbers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
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
        nearest_CV: level of each code nearest to each whole number, int64; of two equally near the lower one.
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
    steps = list(_shapes(bits, max_number))
    offsets, shapes, levels = [], [], []
    for index, shape in enumerate(steps):
        sums = sorted(_subset_sums(shape))
        for offset in range(max_number - sums[-1] + 1):
            offsets.append(offset)
            shapes.append(index)
            levels.append([offset + value for value in sums])
    nearest_CV = _nearest(torch.tensor(levels), max_number)
    return Codebook(torch.tensor(offsets), torch.tensor(shapes), torch.tensor(steps).flip(1), nearest_CV)


def _shapes(bits: int, largest_sum: int) -> Iterator[tuple[int, ...]]:
    """Yield ascending steps whose subset sums all differ and reach no further than `largest_sum`."""

    def extend(shape: tuple[int, ...], left: int) -> Iterator[tuple[int, ...]]:
        if len(shape) == bits:
            if len(set(_subset_sums(shape))) == 1 << bits:
                yield shape
            return
        for step in range(shape[-1] if shape else 1, left + 1):
            yield from extend((*shape, step), left - step)

    return extend((), largest_sum)


def _subset_sums(shape: tuple[int, ...]) -> list[int]:
    return [sum(itertools.compress(shape, chosen)) for chosen in itertools.product((0, 1), repeat=len(shape))]


def _nearest(levels_CK: torch.Tensor, max_number: int) -> torch.Tensor:
    numbers_V = torch.arange(max_number + 1)
    # Twice the number lies below the sum of two neighbouring levels where the lower one is nearer, or as near.
    is_above_CKV = 2 * numbers_V > (levels_CK[:, :-1] + levels_CK[:, 1:])[:, :, None]
    return levels_CK.gather(1, is_above_CKV.sum(dim=1))
