"""The page tables of sequences: pages of every group are taken, shared, found again and given back together.

An entry of a table is 0 where a sequence has no page: it was given back, or none is ever taken there.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from optgptq.scheduling.pages import PageAllocator
from optgptq.scheduling.prefix import page_digest, root_digest
from optgptq.scheduling.request import Sequence
from optgptq.scheduling.settings import SchedulerSettings
from optgptq.scheduling.step import PageCopy


@dataclass(frozen=True, slots=True, eq=False)
class Prefix:
    """Pages that hold the first `num_tokens` of a sequence already; of each group `num_idle` of them are free."""

    num_tokens: int
    page_tables: list[list[int]]
    num_idle: list[int]


class PageTables:
    """All pages of a model and what the tables of sequences do with them."""

    def __init__(self, settings: SchedulerSettings) -> None:
        self._settings = settings
        self._page_size = settings.page_size
        self._groups = settings.groups
        self._watermarks = [settings.watermark(group) for group in settings.groups]
        self._num_sink_pages = [group.num_sink_pages(settings.page_size) for group in settings.groups]
        # Pages at the beginning of a sequence that it takes; those after them are 0 in its table for ever.
        self._num_taken = [
            sys.maxsize if (taken := group.most_taken_pages(settings.page_size)) is None else taken
            for group in settings.groups
        ]
        # Those of them that later texts find.
        self._num_named = [
            sinks if group.forgets_window else taken
            for group, sinks, taken in zip(settings.groups, self._num_sink_pages, self._num_taken, strict=True)
        ]
        # Free pages that are enough for a step of any length.
        self._enough = [
            group.most_visible_pages(settings.page_size) or sys.maxsize if group.forgets_window else sys.maxsize
            for group in settings.groups
        ]
        self._forgets = any(group.forgets_window for group in settings.groups)
        self._windowed = [index for index, group in enumerate(settings.groups) if group.window]
        self.allocators = tuple(PageAllocator(group.num_pages) for group in settings.groups)

    @property
    def num_free(self) -> tuple[int, ...]:
        """Free pages of each group."""
        return tuple(allocator.num_free for allocator in self.allocators)

    def has_slot(self, sequence: Sequence) -> bool:
        """Return whether the next position lies in pages that the sequence has already, for itself alone."""
        if sequence.num_computed % self._page_size == 0:
            return False
        for allocator, table in zip(self.allocators, sequence.page_tables, strict=True):
            if self._writes_to_shared(allocator, table, sequence.num_computed):
                return False
        return True

    def room(self, sequence: Sequence) -> int:
        """Return how many more positions of a running sequence its own and the free pages hold."""
        begin = sequence.num_computed
        rooms = []
        for group, (allocator, table) in enumerate(zip(self.allocators, sequence.page_tables, strict=True)):
            num_free = allocator.num_free - self._writes_to_shared(allocator, table, begin)
            rooms.append(self._end_of_room(group, len(table), num_free) - begin)
        return max(0, min(rooms))

    def _end_of_room(self, group: int, num_pages: int, num_free: int) -> int:
        """Return up to where a table of `num_pages` entries can grow; 0 with a negative number of free pages."""
        if num_free < 0:
            return 0
        if num_free >= self._enough[group] or num_pages + num_free >= self._num_taken[group]:
            return sys.maxsize
        return (num_pages + num_free) * self._page_size

    def room_after(self, prefix: Prefix, *, keep_watermark: bool) -> int:
        """Return how many positions the free pages hold after a prefix that was found."""
        rooms = []
        for group, (allocator, num_idle) in enumerate(zip(self.allocators, prefix.num_idle, strict=True)):
            num_free = allocator.num_free - num_idle - (self._watermarks[group] if keep_watermark else 0)
            rooms.append(self._end_of_room(group, len(prefix.page_tables[group]), num_free) - prefix.num_tokens)
        return max(0, min(rooms))

    def extend(self, sequence: Sequence, end: int) -> list[PageCopy]:
        """Give a sequence pages of its own for the positions up to `end` - 1; return what must be copied into them.

        There must be `room` for them.
        """
        begin = sequence.num_computed
        num_pages = -(-end // self._page_size)
        copies = []
        for group, kept in enumerate(self._groups):
            allocator, table = self.allocators[group], sequence.page_tables[group]
            if self._writes_to_shared(allocator, table, begin):
                shared, own = table[-1], allocator.allocate()
                allocator.fill(own, allocator.num_filled(shared))
                allocator.release(shared)
                table[-1] = own
                copies.append(PageCopy(group, shared, own))
            while len(table) < num_pages:
                table.append(allocator.allocate() if kept.takes_page(len(table), end, self._page_size) else 0)
        return copies

    def _writes_to_shared(self, allocator: PageAllocator, table: list[int], begin: int) -> bool:
        """Return whether position `begin` lies in a page that others hold too."""
        return begin % self._page_size != 0 and table[-1] != 0 and allocator.num_references(table[-1]) > 1

    def advance(self, sequence: Sequence, end: int) -> None:
        """Note that the positions up to `end` - 1 are written: full pages can be found, unseen ones are given back."""
        size = self._page_size
        last = (end - 1) // size
        for allocator, table in zip(self.allocators, sequence.page_tables, strict=True):
            for number in range(sequence.num_computed // size, last + 1):
                if table[number]:
                    allocator.fill(table[number], min(size, end - number * size))
        sequence.num_computed = end
        if self._settings.prefix_cache and end // size > sequence.num_committed:
            self._commit(sequence)
        for group in self._windowed:
            self._give_back(sequence, group)

    def _commit(self, sequence: Sequence) -> None:
        for number in range(sequence.num_committed, sequence.num_computed // self._page_size):
            digest = self._digest(sequence, number)
            for group, (allocator, table) in enumerate(zip(self.allocators, sequence.page_tables, strict=True)):
                if table[number] and number < self._num_named[group]:
                    allocator.commit(table[number], digest)
            sequence.num_committed = number + 1

    def _digest(self, sequence: Sequence, number: int) -> bytes:
        """Return the name of a full page of a sequence; the names of all pages before it are known."""
        digests = sequence.digests
        if number == len(digests):
            root = root_digest(sequence.request.salt, sequence.restart_level)
            begin = number * self._page_size
            tokens = sequence.token_ids[begin : begin + self._page_size]
            digests.append(page_digest(digests[-1] if digests else root, tokens))
        return digests[number]

    def _give_back(self, sequence: Sequence, group: int) -> None:
        """Release the pages that the next position does not see; those of sinks stay."""
        table = sequence.page_tables[group]
        first = self._groups[group].first_visible_page(sequence.num_computed, self._page_size)
        for number in range(max(self._num_sink_pages[group], sequence.num_given_back[group]), first):
            if table[number]:
                self.allocators[group].release(table[number])
            table[number] = 0
        sequence.num_given_back[group] = max(first, sequence.num_given_back[group])

    def share(self, source: Sequence, target: Sequence) -> None:
        """Let a sequence without pages begin with all pages of another one."""
        for allocator, table in zip(self.allocators, source.page_tables, strict=True):
            for page in table:
                if page:
                    allocator.hold(page)
        target.page_tables = [list(table) for table in source.page_tables]
        target.num_given_back = list(source.num_given_back)
        target.seen_from = source.seen_from
        target.num_computed = source.num_computed
        target.num_committed = source.num_committed
        target.digests = list(source.digests)
        target.restart_level = source.restart_level

    def release(self, sequence: Sequence) -> None:
        """Take all pages from a sequence; of those that are free then, its last ones are forgotten first."""
        for group, (allocator, table) in enumerate(zip(self.allocators, sequence.page_tables, strict=True)):
            sinks = self._num_sink_pages[group]
            rest = table[max(sinks, sequence.num_given_back[group]) : self._num_taken[group]]
            for page in reversed(table[:sinks] + rest):
                if page:
                    allocator.release(page)
            sequence.page_tables[group] = []
            sequence.num_given_back[group] = 0
        sequence.num_computed = sequence.num_committed = sequence.seen_from = 0

    def find_prefix(self, sequence: Sequence) -> Prefix:
        """Return the longest beginning of a sequence that is in pages of all groups.

        Whole pages only, and at least one token is left to compute. A windowed group needs no more than the pages that
        the next position sees, those of its sinks among them; one that forgets its window only the latter. Nothing is
        held yet.
        """
        level = self._settings.restart_level(len(sequence.token_ids))
        if level != sequence.restart_level:
            sequence.restart_level = level
            sequence.digests = []
        found: list[list[int | None]] = [[] for _ in self._groups]
        num_pages = self._longest_prefix(sequence, found) if self._settings.prefix_cache else 0
        tables: list[list[int]] = []
        for group, sinks, pages in zip(self._groups, self._num_sink_pages, found, strict=True):
            first = group.first_found_page(num_pages, self._page_size)
            tables.append(
                [page if page and not sinks <= number < first else 0 for number, page in enumerate(pages[:num_pages])]
            )
        num_idle = [
            sum(page != 0 and allocator.num_references(page) == 0 for page in table)
            for allocator, table in zip(self.allocators, tables, strict=True)
        ]
        return Prefix(num_pages * self._page_size, tables, num_idle)

    def _longest_prefix(self, sequence: Sequence, found: list[list[int | None]]) -> int:
        """Return the pages of the longest prefix; append what each group has for every page looked at to `found`."""
        longest = 0
        run_begins = [0] * len(self._groups)
        for number in range((len(sequence.token_ids) - 1) // self._page_size):
            digest = self._digest(sequence, number)
            is_seen = True
            for index, (group, allocator) in enumerate(zip(self._groups, self.allocators, strict=True)):
                page = allocator.find(digest)
                found[index].append(page)
                if number >= self._num_named[index]:
                    continue
                if page is None:
                    if group.window is None or number < self._num_sink_pages[index]:
                        return longest
                    run_begins[index] = number + 1
                first = group.first_visible_page((number + 1) * self._page_size, self._page_size)
                is_seen = is_seen and run_begins[index] <= first
            if is_seen:
                longest = number + 1
        return longest

    def begin_with(self, sequence: Sequence, prefix: Prefix) -> None:
        """Let a sequence without pages begin with the prefix that was found for it."""
        for index, (allocator, table) in enumerate(zip(self.allocators, prefix.page_tables, strict=True)):
            for page in table:
                if page:
                    allocator.hold(page)
            num_pages = prefix.num_tokens // self._page_size
            sequence.num_given_back[index] = self._groups[index].first_found_page(num_pages, self._page_size)
        sequence.page_tables = prefix.page_tables
        sequence.seen_from = prefix.num_tokens if self._forgets else 0
        sequence.num_computed = prefix.num_tokens
        sequence.num_committed = prefix.num_tokens // self._page_size
