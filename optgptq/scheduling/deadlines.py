"""Requests in the order of their deadlines."""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heapify, heappop, heappush

from optgptq.scheduling.request import Sequence


class Deadlines:
    """A heap of deadlines; requests that ended in time are thrown out when they are more than half of it."""

    def __init__(self) -> None:
        self._entries: list[tuple[float, int, tuple[Sequence, ...]]] = []
        self._num_added = 0
        self._limit = 64

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, deadline: float, sequences: tuple[Sequence, ...]) -> None:
        """Note when the sequences of a request have to be at their end."""
        if len(self._entries) >= self._limit:
            self._entries = [entry for entry in self._entries if not all(text.is_finished for text in entry[2])]
            heapify(self._entries)
            self._limit = 2 * len(self._entries) + 64
        heappush(self._entries, (deadline, self._num_added, sequences))
        self._num_added += 1

    def pop_late(self, now: float) -> Iterator[Sequence]:
        """Yield the sequences whose deadline has come and that have not ended; they are not yielded again."""
        while self._entries and self._entries[0][0] <= now:
            _, _, sequences = heappop(self._entries)
            yield from (sequence for sequence in sequences if not sequence.is_finished)
