"""How full the pages are, and what happened to requests: the figures of a scheduler."""

from __future__ import annotations

from dataclasses import dataclass

from optgptq.scheduling.pages import PageAllocator


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupUsage:
    """Slots of one group of pages; a slot is the place of one token.

    Allocated slots are in pages that some sequence holds, and filled ones of them hold a token; a page that several
    hold counts once. The sums over steps are of the state after each step: they give the mean waste of a whole job.
    """

    total_slots: int
    allocated_slots: int
    filled_slots: int
    peak_allocated_slots: int
    peak_filled_slots: int
    allocated_slot_steps: int
    filled_slot_steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """State and history of a scheduler.

    Peaks of several groups are the sums of their own peaks. `prefix_hit_tokens` of `prompt_tokens` were found in the
    prefix cache when their request ran for the first time. `num_preemptions` sequences lost their pages to better
    ranks, `num_restarts` because they grew past a restart length.
    """

    groups: tuple[GroupUsage, ...]
    num_running: int
    num_waiting: int
    num_steps: int
    prompt_tokens: int
    prefix_hit_tokens: int
    num_preemptions: int
    num_restarts: int

    @property
    def total_slots(self) -> int:
        """Slots of all pages that can be handed out."""
        return sum(group.total_slots for group in self.groups)

    @property
    def allocated_slots(self) -> int:
        """Slots of the pages that are held."""
        return sum(group.allocated_slots for group in self.groups)

    @property
    def filled_slots(self) -> int:
        """Slots of the pages that are held, with a token in them."""
        return sum(group.filled_slots for group in self.groups)

    @property
    def peak_allocated_slots(self) -> int:
        """Most slots that were ever allocated."""
        return sum(group.peak_allocated_slots for group in self.groups)

    @property
    def peak_filled_slots(self) -> int:
        """Most slots that were ever filled."""
        return sum(group.peak_filled_slots for group in self.groups)

    @property
    def waste_ratio(self) -> float:
        """Part of the allocated slots that held no token, over all steps; 0 before the first one."""
        allocated = sum(group.allocated_slot_steps for group in self.groups)
        filled = sum(group.filled_slot_steps for group in self.groups)
        return 1 - filled / allocated if allocated else 0.0


@dataclass(slots=True)
class Counters:
    """What a scheduler counts while it works."""

    num_steps: int = 0
    prompt_tokens: int = 0
    prefix_hit_tokens: int = 0
    num_preemptions: int = 0
    num_restarts: int = 0


class SlotRecord:
    """The sums over steps of one group of pages."""

    def __init__(self, allocator: PageAllocator, page_size: int) -> None:
        self._allocator = allocator
        self._page_size = page_size
        self._allocated_steps = 0
        self._filled_steps = 0

    def note_step(self) -> None:
        """Add the state after a step."""
        self._allocated_steps += self._allocator.num_used * self._page_size
        self._filled_steps += self._allocator.num_filled_slots

    def usage(self) -> GroupUsage:
        """Return the figures of the group."""
        pages = self._allocator
        return GroupUsage(
            total_slots=(pages.num_pages - 1) * self._page_size,
            allocated_slots=pages.num_used * self._page_size,
            filled_slots=pages.num_filled_slots,
            peak_allocated_slots=pages.peak_used * self._page_size,
            peak_filled_slots=pages.peak_filled_slots,
            allocated_slot_steps=self._allocated_steps,
            filled_slot_steps=self._filled_steps,
        )
