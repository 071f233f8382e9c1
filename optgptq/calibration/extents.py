"""Which parts of a file are in use."""

from __future__ import annotations

from bisect import insort


class Extents:
    """Places for blocks of bytes in a file that grows as needed; the first gap that is large enough is used.

    `end` is the first byte behind all blocks.
    """

    def __init__(self) -> None:
        self.end = 0
        self._gaps: list[tuple[int, int]] = []

    def take(self, num_bytes: int) -> int:
        """Return the offset of a block of `num_bytes`, at least 1, that is in nobody's use."""
        for index, (offset, size) in enumerate(self._gaps):
            if size == num_bytes:
                del self._gaps[index]
                return offset
            if size > num_bytes:
                self._gaps[index] = (offset + num_bytes, size - num_bytes)
                return offset
        offset = self.end
        self.end += num_bytes
        return offset

    def give_back(self, offset: int, num_bytes: int) -> None:
        """Free a block as it was taken."""
        insort(self._gaps, (offset, num_bytes))
        joined: list[tuple[int, int]] = []
        for start, size in self._gaps:
            if joined and sum(joined[-1]) == start:
                joined[-1] = (joined[-1][0], joined[-1][1] + size)
            else:
                joined.append((start, size))
        if joined and sum(joined[-1]) == self.end:
            self.end = joined.pop()[0]
        self._gaps = joined
