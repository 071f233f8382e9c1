"""A model that computes nothing but remembers what each slot of each page holds, and checks every step it is given."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any
from zlib import crc32

from optgptq.scheduling.request import Request, Sequence, SequenceState
from optgptq.scheduling.sampling_params import SamplingParams
from optgptq.scheduling.scheduler import Scheduler
from optgptq.scheduling.settings import PageGroup, SchedulerSettings
from optgptq.scheduling.step import Step, StepPart

VOCABULARY = 3


# Usable pages of a group, its window, and its sinks where it has any.
Group = tuple[int, int | None] | tuple[int, int | None, int] | tuple[int, int | None, int, bool]


def page_group(usable: int, window: int | None, num_sinks: int = 0, forgets_window: bool = False) -> PageGroup:
    """Return a group with so many pages that sequences can have."""
    return PageGroup(num_pages=usable + 1, window=window, num_sinks=num_sinks, forgets_window=forgets_window)


def settings(*windows_and_pages: Group, **changes: Any) -> SchedulerSettings:
    """Return settings with pages of 4 slots."""
    groups = windows_and_pages or ((20, None),)
    values: dict[str, Any] = {
        "page_size": 4,
        "groups": tuple(page_group(*group) for group in groups),
        "max_length": 64,
        "max_step_tokens": 16,
        "max_running": 4,
        "max_waiting": 100,
        "watermark_ratio": 0.0,
        "aging_steps": 8,
    }
    return SchedulerSettings(**(values | changes))


def request(name: str, prompt: Iterable[int], *, n: int = 1, max_tokens: int | None = 4, **changes: Any) -> Request:
    """Return a request with the fields that scheduling looks at."""
    params = SamplingParams(n=n, max_tokens=max_tokens)
    return Request(request_id=name, prompt_ids=tuple(prompt), params=params, **({"arrival": 0.0} | changes))


def next_token(sequence: Sequence) -> int:
    """Return what the model writes next: a function of the text and of its number only."""
    return crc32(repr((sequence.request.salt, sequence.token_ids, sequence.index)).encode()) % VOCABULARY


class SimulatedEngine:
    """Runs the steps of a scheduler; `texts` are all sequences that were ever submitted."""

    def __init__(self, settings: SchedulerSettings) -> None:
        self.scheduler = Scheduler(settings)
        self.settings = settings
        self.texts: list[Sequence] = []
        self.now = 0.0
        self.copies = 0
        self.computed = 0
        self._contents: list[dict[tuple[int, int], int]] = [{} for _ in settings.groups]

    def submit(self, request: Request) -> tuple[Sequence, ...]:
        sequences = self.scheduler.submit(request)
        self.texts += sequences
        return sequences

    def step(self) -> Step:
        """Schedule, run and complete one step, and stop the texts that have all their tokens."""
        step = self.schedule()
        self.complete(step)
        return step

    def schedule(self) -> Step:
        self.now += 1
        step = self.scheduler.schedule(self.now)
        self._check_shape(step)
        self._run(step)
        self.check()
        return step

    def complete(self, step: Step) -> None:
        self.scheduler.complete(step, [next_token(text) for text in step.sampled])
        self.stop_full()
        self.check()

    def stop_full(self) -> None:
        for text in self.texts:
            wanted = text.request.params.max_tokens
            is_full = wanted is not None and len(text.output_ids) >= wanted
            if not text.is_finished and (is_full or len(text.token_ids) >= self.scheduler.max_length):
                self.scheduler.finish(text, "length")

    def run_to_end(self, *, most_steps: int) -> int:
        """Return the number of steps until nothing is left; every one of them must compute something."""
        for number in range(most_steps):
            if not self.scheduler.has_work:
                return number
            step = self.step()
            assert step.parts or step.ended
        raise AssertionError(f"not at the end after {most_steps} steps")

    def check_nothing_is_left(self) -> None:
        """Check the state after the end of all requests: every page is free."""
        usage = self.scheduler.usage()
        assert (usage.num_running, usage.num_waiting, usage.allocated_slots, usage.filled_slots) == (0, 0, 0, 0)
        assert all(text.is_finished and not any(text.page_tables) for text in self.texts)
        for allocator in self.scheduler.tables.allocators:
            assert allocator.num_free == allocator.num_pages - 1

    def check(self) -> None:
        """Check what holds at any time: references, counts of slots, seats."""
        live = [text for text in self.texts if any(text.page_tables)]
        for index, allocator in enumerate(self.scheduler.tables.allocators):
            held = Counter(page for text in live for page in text.page_tables[index] if page)
            pages = range(1, allocator.num_pages)
            assert {page: allocator.num_references(page) for page in pages} == {page: held[page] for page in pages}
            assert allocator.num_free == sum(held[page] == 0 for page in pages)
            assert allocator.num_used == len(held)
            filled = {page: slots for text in live for page, slots in self._filled(text, index)}
            assert allocator.num_filled_slots == sum(filled.values())
            assert sum(filled.values()) <= allocator.num_used * self.settings.page_size
            for text in live:
                self._check_kept(text, index)
        for text in self.texts:
            assert text.state is not SequenceState.WAITING or not any(text.page_tables)
        running = [text for text in self.texts if text.state is SequenceState.RUNNING]
        assert sum(text.num_seats for text in running) <= self.settings.max_running

    def _check_kept(self, text: Sequence, index: int) -> None:
        """Check which entries of a table have a page, and that what a text has computed and must keep is there."""
        size, group, table = self.settings.page_size, self.settings.groups[index], text.page_tables[index]
        assert len(table) >= -(-text.num_computed // size)
        window = group.window
        first = 0 if window is None else max(0, text.num_computed - window + 1)
        first = max(first, self._seen_from(text, group))
        for number, page in enumerate(table):
            if page == 0 and group.forgets_window and number * size >= text.num_computed:
                continue  # What a running step leaves out.
            is_kept = number * size < group.num_sinks or (window != 0 and number >= first // size)
            assert (page != 0) == is_kept, f"page {number} with {text.num_computed} computed"
        marks = self._marks(text, text.num_computed, text.restart_level)
        for position in self._needed(group, text, text.num_computed, text.num_computed):
            place = table[position // size], position % size
            assert self._contents[index].get(place) == marks[position], f"position {position} is not kept"

    def _seen_from(self, text: Sequence, group: PageGroup) -> int:
        assert text.seen_from == 0 or any(other.forgets_window for other in self.settings.groups)
        return text.seen_from if group.forgets_window else 0

    def _needed(self, group: PageGroup, text: Sequence, query: int, end: int) -> Iterator[int]:
        """Yield the positions below `end` that a query at `query` reads."""
        for position in range(end):
            is_seen = group.window is None or position > query - group.window
            is_seen = is_seen and position >= self._seen_from(text, group)
            if (is_seen and group.window != 0) or position < group.num_sinks:
                yield position

    def _filled(self, text: Sequence, group: int) -> Iterator[tuple[int, int]]:
        size = self.settings.page_size
        for number, page in enumerate(text.page_tables[group]):
            if page:
                yield page, max(0, min(size, text.num_computed - number * size))

    def _check_shape(self, step: Step) -> None:
        assert step.num_tokens <= self.settings.max_step_tokens
        sizes = [part.end - part.begin for part in step.parts]
        assert all(size >= 1 for size in sizes)
        assert [size > 1 for size in sizes] == sorted(size > 1 for size in sizes), "one token first"
        assert len({id(part.sequence) for part in step.parts}) == len(step.parts)
        for part in step.parts:
            text = part.sequence
            assert text.state is SequenceState.RUNNING
            assert part.begin == text.num_computed
            expected = (text, *text.followers) if part.end == len(text.token_ids) else ()
            assert part.samples == expected

    def _run(self, step: Step) -> None:
        """Copy, write and read as a model does."""
        self._copy(step)
        self.copies += len(step.copies)
        self.computed += step.num_tokens
        for group, contents in enumerate(self._contents):
            writes = list(chain.from_iterable(self._writes(part, group) for part in step.parts))
            places = [place for place, _ in writes]
            assert len(set(places)) == len(places), "two writers of one slot"
            held = Counter(page for text in self.texts for page in text.page_tables[group] if page)
            assert all(held[page] == 1 for page, _ in places), "a write into a page of somebody else"
            contents.update(writes)
            for part in step.parts:
                self._check_reads(part, group)

    def _copy(self, step: Step) -> None:
        size = self.settings.page_size
        targets: set[tuple[int, int]] = set()
        for copy in step.copies:
            assert (copy.group, copy.source) not in targets, "copies depend on their order"
            assert (copy.group, copy.target) not in targets
            targets.add((copy.group, copy.target))
            contents = self._contents[copy.group]
            for slot in range(size):
                contents.pop((copy.target, slot), None)
                if (copy.source, slot) in contents:
                    contents[copy.target, slot] = contents[copy.source, slot]

    def _writes(self, part: StepPart, group: int) -> Iterator[tuple[tuple[int, int], int]]:
        """Yield places and what is written there; what goes to page 0 is lost."""
        size, kept = self.settings.page_size, self.settings.groups[group]
        marks = self._marks_of_part(part)
        table = part.sequence.page_tables[group]
        for position in range(part.begin, part.end):
            page = table[position // size]
            if page:
                yield (page, position % size), marks[position]
            else:
                is_left_out = kept.forgets_window and position <= part.end - (kept.window or 0)
                assert kept.window == 0 or is_left_out, "a write into page 0"
                assert position >= kept.num_sinks, "a sink is written into page 0"

    def _check_reads(self, part: StepPart, group: int) -> None:
        size = self.settings.page_size
        table = part.sequence.page_tables[group]
        marks = self._marks_of_part(part)
        for position in self._needed(self.settings.groups[group], part.sequence, part.begin, part.end):
            if self.settings.groups[group].forgets_window and position >= part.begin:
                continue
            place = table[position // size], position % size
            assert self._contents[group].get(place) == marks[position], f"wrong contents at position {position}"

    def _marks_of_part(self, part: StepPart) -> list[int]:
        return self._marks(part.sequence, part.end, self.settings.restart_level(len(part.sequence.token_ids)))

    def _marks(self, text: Sequence, end: int, level: int) -> list[int]:
        """Return what keys and values of each position depend on: all tokens up to it, and the length of the text."""
        mark = hash((text.request.salt, level))
        marks = []
        for token in text.token_ids[:end]:
            mark = hash((mark, token))
            marks.append(mark)
        return marks
