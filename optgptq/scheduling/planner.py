"""What the next step computes: one budget of tokens, handed out by rank.

Sequences that write one token come first, then the chunks of prompts that run, then admissions. Where pages are short
the sequence of the worst rank loses its own and waits again; it is computed anew from its tokens, mostly out of the
prefix cache, and nobody is admitted in that step. One for which no worse one is left stays as it is until pages come
back.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from optgptq.scheduling.page_tables import PageTables
from optgptq.scheduling.ranked import RankedSequences
from optgptq.scheduling.request import Sequence, SequenceState
from optgptq.scheduling.settings import SchedulerSettings
from optgptq.scheduling.step import PageCopy, Step, StepPart
from optgptq.scheduling.usage import Counters

# A sequence that waits for pages is looked at again when pages came back, and every so many calls because others may
# have computed its prefix meanwhile. To look takes time for every page of the prefix.
_LOOK_AGAIN = 16


@dataclass(slots=True)
class _Draft:
    """A step in the making."""

    num_left: int
    decodes: list[StepPart] = field(default_factory=list)
    chunks: list[StepPart] = field(default_factory=list)
    copies: list[PageCopy] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Blocked:
    """A sequence that could not be admitted, the free pages of each group then, and the calls left until a new look."""

    sequence: Sequence
    num_free: tuple[int, ...]
    num_calls: int


class Planner:
    """Makes steps out of the sequences that wait and run, and moves sequences between the two."""

    def __init__(
        self,
        settings: SchedulerSettings,
        tables: PageTables,
        waiting: RankedSequences,
        *,
        running: RankedSequences,
        counters: Counters,
    ) -> None:
        self._settings = settings
        self._tables = tables
        self._waiting = waiting
        self._running = running
        self._counters = counters
        self._largest_first_chunk = settings.largest_first_chunk
        self._blocked: _Blocked | None = None

    def plan(self, ended: list[Sequence]) -> Step:
        """Return the next step, which tells of the sequences in `ended`; pages for all its positions are taken."""
        if self._settings.restart_lengths:
            self._restart_outgrown()
        draft = _Draft(self._settings.max_step_tokens)
        if self._continue_running(draft):
            while draft.num_left > 0 and self._waiting and self._admit(draft, self._waiting[0]):
                pass
        return Step(parts=(*draft.decodes, *draft.chunks), copies=tuple(draft.copies), ended=tuple(ended))

    def _restart_outgrown(self) -> None:
        """Take the pages of sequences that have grown past a restart length: all their keys are rotated otherwise."""
        level = self._settings.restart_level
        for sequence in [text for text in self._running if level(len(text.token_ids)) != text.restart_level]:
            self._send_back(sequence)
            self._counters.num_restarts += 1

    def _continue_running(self, draft: _Draft) -> bool:
        """Add parts for what runs; return whether all of it still does.

        Pages are taken from the best rank to the worst, so whoever loses its pages has no part in this step yet.
        """
        running = self._running
        num_lacking = [len(sequence.token_ids) - sequence.num_computed for sequence in running]
        draft.num_left -= num_lacking.count(1)
        for index, lacking in enumerate(num_lacking):
            if index == len(running):
                break
            sequence = running[index]
            if lacking == 1 and self._tables.has_slot(sequence):
                self._add_part(draft, sequence, 1)
                continue
            wanted = 1 if lacking == 1 else min(lacking, draft.num_left)
            num_tokens = min(wanted, self._make_room(sequence)) if wanted else 0
            if num_tokens:
                self._compute(draft, sequence, num_tokens)
                draft.num_left -= 0 if lacking == 1 else num_tokens
        return len(running) == len(num_lacking)

    def _make_room(self, sequence: Sequence) -> int:
        """Return for how many positions there are pages; worse sequences lose theirs until there is one."""
        room = self._tables.room(sequence)
        while room == 0 and (worst := self._running[-1]) is not sequence:
            self._send_back(worst)
            self._counters.num_preemptions += 1
            room = self._tables.room(sequence)
        return room

    def _send_back(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._tables.release(sequence)
        sequence.state = SequenceState.WAITING
        self._waiting.add(sequence)

    def _compute(self, draft: _Draft, sequence: Sequence, num_tokens: int) -> None:
        """Take pages for the next positions of a sequence and add the part that computes them."""
        draft.copies += self._tables.extend(sequence, sequence.num_computed + num_tokens)
        self._add_part(draft, sequence, num_tokens)

    def _add_part(self, draft: _Draft, sequence: Sequence, num_tokens: int) -> None:
        begin = sequence.num_computed
        end = begin + num_tokens
        samples = (sequence, *sequence.followers) if end == len(sequence.token_ids) else ()
        (draft.decodes if num_tokens == 1 else draft.chunks).append(StepPart(sequence, begin, end, samples))

    def _admit(self, draft: _Draft, sequence: Sequence) -> bool:
        """Let the best sequence that waits run, if there are seats and pages for it; return whether it does.

        The pages for its first chunk must be there, and the watermark besides if anything runs. Where nothing runs
        there is room for any first chunk that `submit` and `largest_first_chunk` allow.
        """
        num_seats = sum(text.num_seats for text in self._running) + sequence.num_seats
        if num_seats > self._settings.max_running or self._is_still_blocked(sequence):
            return False
        prefix = self._tables.find_prefix(sequence)
        wanted = min(draft.num_left, len(sequence.token_ids) - prefix.num_tokens)
        room = self._tables.room_after(prefix, keep_watermark=len(self._running) > 0)
        if room < min(wanted, self._largest_first_chunk):
            self._blocked = _Blocked(sequence, self._tables.num_free, _LOOK_AGAIN)
            return False
        self._blocked = None
        self._tables.begin_with(sequence, prefix)
        self._note_run(sequence)
        self._waiting.remove(sequence)
        sequence.state = SequenceState.RUNNING
        self._running.add(sequence)
        num_tokens = min(wanted, room)
        self._compute(draft, sequence, num_tokens)
        draft.num_left -= num_tokens
        return True

    def _is_still_blocked(self, sequence: Sequence) -> bool:
        """Return whether a look at the sequence would find what the last one found: too few pages."""
        last = self._blocked
        if last is None or last.sequence is not sequence or not self._running:
            return False
        if any(now > then for now, then in zip(self._tables.num_free, last.num_free, strict=True)):
            return False
        self._blocked = _Blocked(sequence, last.num_free, last.num_calls - 1)
        return last.num_calls > 0

    def _note_run(self, sequence: Sequence) -> None:
        sequence.num_runs += 1
        if sequence.num_runs == 1:
            sequence.num_cached_tokens = sequence.num_computed
            self._counters.prompt_tokens += sequence.num_prompt_tokens
            self._counters.prefix_hit_tokens += sequence.num_computed
