"""Sequences in the order of their rank."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from operator import attrgetter

from optgptq.scheduling.request import Sequence

_rank = attrgetter("rank")


class RankedSequences:
    """Sequences from the best to the worst rank; no two ranks are equal.

    A list that is kept sorted: moving some thousand pointers takes a few microseconds, and any of them can be removed.
    """

    def __init__(self) -> None:
        self._sequences: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    def __getitem__(self, index: int) -> Sequence:
        return self._sequences[index]

    def add(self, sequence: Sequence) -> None:
        """Put a sequence at its place."""
        insort(self._sequences, sequence, key=_rank)

    def remove(self, sequence: Sequence) -> None:
        """Take out a sequence that is in here."""
        index = bisect_left(self._sequences, sequence.rank, key=_rank)
        assert self._sequences[index] is sequence
        del self._sequences[index]
