"""Every binary code over whole numbers, and the level nearest to each number."""

from __future__ import annotations

import pytest
import torch
from support.slow_binary import slow_codes

from optgptq.grids.codebook import codebook

SMALL = [(1, 2), (1, 4), (2, 3), (2, 4), (2, 5), (3, 4), (3, 5)]


@pytest.mark.parametrize(
    ("bits", "intermediate_bits", "count"),
    [(2, 4, 252), (2, 5, 2360), (2, 6, 20336), (3, 4, 145), (3, 5, 4361), (3, 6, 91225), (4, 5, 1875), (4, 6, 167219)],
)
def test_the_number_of_codes(bits: int, intermediate_bits: int, count: int) -> None:
    codes = codebook(bits, intermediate_bits)
    assert codes.offset_C.shape == codes.shape_C.shape == (count,)
    assert codes.nearest_CV.shape == (count, 2**intermediate_bits)
    assert codes.max_number == 2**intermediate_bits - 1


@pytest.mark.parametrize(("bits", "intermediate_bits"), SMALL)
def test_codes_are_those_that_trying_everything_finds(bits: int, intermediate_bits: int) -> None:
    codes = codebook(bits, intermediate_bits)
    steps_CP = codes.steps_SP[codes.shape_C]
    found = {
        (int(offset), tuple(reversed(steps_P.tolist())))
        for offset, steps_P in zip(codes.offset_C, steps_CP, strict=True)
    }
    slow = {(code.offset, code.steps) for code in slow_codes(bits, intermediate_bits)}
    assert len(found) == len(codes.offset_C)
    assert found == slow


@pytest.mark.parametrize(("bits", "intermediate_bits"), SMALL)
def test_the_nearest_level_of_each_number_and_the_lower_of_two(bits: int, intermediate_bits: int) -> None:
    codes = codebook(bits, intermediate_bits)
    nearest = {}
    for offset, shape, nearest_V in zip(codes.offset_C, codes.shape_C, codes.nearest_CV, strict=True):
        nearest[int(offset), tuple(codes.steps_SP[shape].flip(0).tolist())] = nearest_V.tolist()
    for code in slow_codes(bits, intermediate_bits):
        levels = code.levels
        expected = [
            min(levels, key=lambda level, number=number: (abs(level - number), level))
            for number in range(codes.max_number + 1)
        ]
        assert nearest[code.offset, code.steps] == expected


@pytest.mark.parametrize(("bits", "intermediate_bits"), [*SMALL, (1, 5), (1, 3), (2, 6), (4, 5)])
def test_uniform_grids_are_among_the_codes(bits: int, intermediate_bits: int) -> None:
    """Every uniform grid whose levels are whole numbers in reach, wherever it begins."""
    codes = codebook(bits, intermediate_bits)
    steps_CP = codes.steps_SP[codes.shape_C]
    found = {(int(offset), tuple(steps_P.tolist())) for offset, steps_P in zip(codes.offset_C, steps_CP, strict=True)}
    largest, num_steps, count = 2**intermediate_bits - 1, 2**bits - 1, 0
    for step in range(1, largest // num_steps + 1):
        for offset in range(largest - step * num_steps + 1):
            assert (offset, tuple(step * 2**plane for plane in reversed(range(bits)))) in found
            count += 1
    assert count > 0


@pytest.mark.parametrize(("bits", "intermediate_bits"), SMALL)
def test_codes_of_a_shape_are_neighbours_and_steps_descend(bits: int, intermediate_bits: int) -> None:
    codes = codebook(bits, intermediate_bits)
    assert bool((codes.shape_C.diff() >= 0).all())
    assert torch.equal(codes.shape_C.unique(), torch.arange(len(codes.steps_SP)))
    assert bool((codes.steps_SP.diff(dim=1) <= 0).all())
    assert int(codes.steps_SP.min()) >= 1
    highest_C = codes.offset_C + codes.steps_SP.sum(dim=1)[codes.shape_C]
    assert int(highest_C.max()) == codes.max_number


@pytest.mark.parametrize(("bits", "intermediate_bits"), [(3, 3), (4, 3), (0, 4), (3, 7)])
def test_widths_without_a_codebook_are_refused(bits: int, intermediate_bits: int) -> None:
    with pytest.raises(ValueError, match=f"no codebook of {bits} bits over {intermediate_bits} bits"):
        codebook(bits, intermediate_bits)
