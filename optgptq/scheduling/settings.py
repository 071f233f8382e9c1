"""What a scheduler has to work with: groups of pages, and the limits of a step and of the queue."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from optgptq.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class PageGroup:
    """Pages of the layers that see the same positions.

    `num_pages` counts page 0, which is never handed out: padded rows of a graph write there. With a `window` a query at
    position q sees the keys q - window + 1 .. q; None: all keys up to its own. The first `num_sinks` positions are seen
    by all queries, whatever the window. With a window of 0 these are the only ones that are kept: no sequence takes a
    page for others, and what is stored for them goes to page 0.

    With `forgets_window` a step takes pages only for what is seen after it, besides those of sinks; what its other
    tokens store goes to page 0. Later texts find the pages of sinks alone: a text that begins with a cached prefix sees
    no other key of it here (`Sequence.seen_from`).
    """

    num_pages: int
    window: int | None
    num_sinks: int = 0
    forgets_window: bool = False

    @property
    def num_usable(self) -> int:
        """Pages that sequences can have."""
        return self.num_pages - 1

    def num_sink_pages(self, page_size: int) -> int:
        """Return how many pages at the beginning of a sequence are never given back."""
        return -(-self.num_sinks // page_size)

    def most_taken_pages(self, page_size: int) -> int | None:
        """Return for how many pages at its beginning a sequence takes a page; None for all of them."""
        return self.num_sink_pages(page_size) if self.window == 0 else None

    def first_visible_page(self, position: int, page_size: int) -> int:
        """Return the number of the first page, beyond those of sinks, with a key that a query at `position` sees."""
        return 0 if self.window is None else max(0, position - self.window + 1) // page_size

    def takes_page(self, number: int, end: int, page_size: int) -> bool:
        """Return whether a sequence takes page `number` in a step up to position `end` - 1."""
        if number < self.num_sink_pages(page_size):
            return True
        is_left_out = self.forgets_window and number < self.first_visible_page(end, page_size)
        return self.window != 0 and not is_left_out

    def first_found_page(self, num_pages: int, page_size: int) -> int:
        """Return the first page beyond those of sinks that a text begins with after a prefix of so many pages."""
        return num_pages if self.forgets_window else self.first_visible_page(num_pages * page_size, page_size)

    def most_visible_pages(self, page_size: int) -> int | None:
        """Return how many pages the keys of one query touch at most; None where that grows with its position."""
        if self.window is None:
            return None
        sinks = self.num_sink_pages(page_size)
        return sinks + (self.window + page_size - 2) // page_size + 1 if self.window else sinks


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerSettings:
    """Limits of a scheduler.

    Args:
        page_size: slots of a page; the same in all groups.
        groups: the pages, one group for each kind of layer.
        max_length: tokens of a sequence, prompt and new ones.
        max_step_tokens: positions that one step computes.
        max_running: sequences that hold pages at the same time.
        max_waiting: places in the queue; while all are taken, requests are refused. A request that has not begun takes
            one, whatever its `n`, and so does each text that lost its pages.
        prefix_cache: whether full pages are found again by later requests.
        watermark_ratio: part of all pages that an admission leaves free, for the growth of what runs.
        aging_steps: calls of `schedule` after which a request counts as much as a new one of the next better priority.
        restart_lengths: ascending lengths; a sequence that grows past one is computed again from its first token.

    Raises:
        UsageError: a value out of its range.
    """

    page_size: int
    groups: tuple[PageGroup, ...]
    max_length: int
    max_step_tokens: int
    max_running: int
    max_waiting: int
    prefix_cache: bool = True
    watermark_ratio: float = 0.01
    aging_steps: int = 64
    restart_lengths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, value, least in (
            ("page_size", self.page_size, 1),
            ("number of groups", len(self.groups), 1),
            ("max_length", self.max_length, 2),
            ("max_running", self.max_running, 1),
            ("max_waiting", self.max_waiting, 1),
            ("aging_steps", self.aging_steps, 1),
        ):
            _require(name, value >= least, expected=f"{least} or more", found=str(value))
        # Every running sequence that writes text gets its token in every step, and one more can be read in.
        _require(
            "max_step_tokens",
            self.max_step_tokens >= self.max_running,
            expected=f"max_running = {self.max_running} or more",
            found=str(self.max_step_tokens),
        )
        _require(
            "watermark_ratio", 0 <= self.watermark_ratio < 1, expected="0 to below 1", found=str(self.watermark_ratio)
        )
        for group in self.groups:
            _require("num_pages", group.num_pages >= 2, expected="2 or more", found=str(group.num_pages))
            _require_window(group)
        lengths = (0, *self.restart_lengths)
        _require(
            "restart_lengths",
            all(shorter < longer for shorter, longer in pairwise(lengths)),
            expected="ascending lengths of 1 or more",
            found=str(self.restart_lengths),
        )

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that `max_length` and the pages allow when it runs alone.

        The last token of a text is not computed, so it takes no slot.
        """
        return min([self.max_length, *(length for group in self.groups if (length := self._slots_alone(group)))])

    def _slots_alone(self, group: PageGroup) -> int | None:
        """Return the tokens of the longest sequence that one group allows; None where its pages are enough for any."""
        span = group.most_visible_pages(self.page_size)
        return None if span is not None and span <= group.num_usable else group.num_usable * self.page_size + 1

    def watermark(self, group: PageGroup) -> int:
        """Return the pages of a group that an admission leaves free."""
        return int(self.watermark_ratio * group.num_usable)

    @property
    def largest_first_chunk(self) -> int:
        """Tokens of a first chunk that the windowed groups hold with the watermark kept and nothing else running.

        An admission that waited for more pages than that would wait for ever. Groups without a window, or with one of
        0, do not count: alone and without a watermark they hold the whole prompt.
        """
        rooms = [self.max_length]
        for group in self.groups:
            span = group.most_visible_pages(self.page_size)
            num_free = group.num_usable - self.watermark(group)
            if span is not None and group.window and not (group.forgets_window and span <= num_free):
                rooms.append((num_free - span) * self.page_size)
        return max(1, min(rooms))

    def restart_level(self, length: int) -> int:
        """Return how many of the restart lengths a sequence of `length` tokens exceeds."""
        return sum(length > limit for limit in self.restart_lengths)


def _require_window(group: PageGroup) -> None:
    window, sinks = group.window, group.num_sinks
    _require("num_sinks", sinks >= 0, expected="0 or more", found=str(sinks))
    _require("num_sinks", sinks == 0 or window is not None, expected="0 where there is no window", found=str(sinks))
    least = 0 if sinks else 1
    _require("window", window is None or window >= least, expected=f"{least} or more", found=str(window))


def _require(name: str, holds: bool, *, expected: str, found: str) -> None:
    if not holds:
        raise UsageError(
            f"scheduler setting {name}", expected=expected, found=found, action="Correct this setting of the engine."
        )
