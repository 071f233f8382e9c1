"""Blocks of a file: nobody shares one, and what is given back is used again."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from optgptq.calibration.extents import Extents


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 9), st.integers(0, 50)), max_size=80))
def test_blocks_never_overlap_and_the_end_is_that_of_the_last(steps: list[tuple[bool, int, int]]) -> None:
    extents, used = Extents(), list[tuple[int, int]]()
    for gives_back, size, choice in steps:
        if gives_back and used:
            extents.give_back(*used.pop(choice % len(used)))
        else:
            used.append((extents.take(size), size))
        taken = [offset + place for offset, length in used for place in range(length)]
        assert len(set(taken)) == len(taken)
        assert extents.end == max(taken, default=-1) + 1


def test_a_block_of_the_same_size_takes_the_first_gap() -> None:
    extents = Extents()
    offsets = [extents.take(10) for _ in range(4)]
    extents.give_back(offsets[1], 10)
    extents.give_back(offsets[2], 10)
    assert offsets == [0, 10, 20, 30]
    assert [extents.take(15), extents.take(5), extents.take(6)] == [10, 25, 40]
    assert extents.end == 46
