"""The pages of one group: who holds them, which of them are free, and what the free ones still remember.

A page that nobody holds is free, but keeps its contents and its name until somebody needs the space: the one that was
left longest ago goes first (lazy eviction). Pages without a name are worth nothing to anybody and go before all others.
"""

from __future__ import annotations

from collections import OrderedDict


class PageAllocator:
    """Reference counts, free list and names of the pages 1 .. num_pages - 1; page 0 is never handed out.

    All methods take constant time.
    """

    def __init__(self, num_pages: int) -> None:
        self._references = [0] * num_pages
        self._filled = [0] * num_pages
        self._names: list[bytes | None] = [None] * num_pages
        self._named: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_pages))
        self.num_pages = num_pages
        self.num_filled_slots = 0
        self.peak_used = 0
        self.peak_filled_slots = 0

    @property
    def num_free(self) -> int:
        """Pages that nobody holds, whether they remember something or not."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Pages that somebody holds."""
        return self.num_pages - 1 - len(self._free)

    def num_references(self, page: int) -> int:
        """Return how many tables hold the page."""
        return self._references[page]

    def allocate(self) -> int:
        """Return a free page, held once; what it remembered is forgotten."""
        page, _ = self._free.popitem(last=False)
        name = self._names[page]
        if name is not None:
            del self._named[name]
            self._names[page] = None
        self._references[page] = 1
        self._filled[page] = 0
        self.peak_used = max(self.peak_used, self.num_used)
        return page

    def hold(self, page: int) -> None:
        """Hold a page once more; it may be a free one that was found by its name."""
        if self._references[page] == 0:
            del self._free[page]
            self.num_filled_slots += self._filled[page]
            self.peak_filled_slots = max(self.peak_filled_slots, self.num_filled_slots)
            self.peak_used = max(self.peak_used, self.num_used)
        self._references[page] += 1

    def release(self, page: int) -> None:
        """Hold a page once less."""
        assert self._references[page] > 0
        self._references[page] -= 1
        if self._references[page] == 0:
            self._free[page] = None
            self.num_filled_slots -= self._filled[page]
            if self._names[page] is None:
                self._free.move_to_end(page, last=False)

    def fill(self, page: int, num_slots: int) -> None:
        """Note that the first `num_slots` slots of a held page hold tokens."""
        self.num_filled_slots += num_slots - self._filled[page]
        self._filled[page] = num_slots
        if self.num_filled_slots > self.peak_filled_slots:
            self.peak_filled_slots = self.num_filled_slots

    def num_filled(self, page: int) -> int:
        """Return the slots of a page that hold tokens."""
        return self._filled[page]

    def commit(self, page: int, digest: bytes) -> None:
        """Make a full page findable; where another page has the name already, this one stays without."""
        assert self._names[page] is None
        if digest not in self._named:
            self._named[digest] = page
            self._names[page] = digest

    def find(self, digest: bytes) -> int | None:
        """Return the page with this name, held or free; None if there is none."""
        return self._named.get(digest)
