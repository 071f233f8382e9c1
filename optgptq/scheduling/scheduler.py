"""Continuous batching: requests in, steps out.

A request has a fixed place in the order of all requests: its priority, made better by its age. One that came
`aging_steps` calls of `schedule` earlier goes before one whose priority is better by one, so only a bounded number of
later requests can ever overtake it. The order is total and never changes, and the best sequence that runs never loses
pages to another one. That is why everything ends.
"""

from __future__ import annotations

from collections.abc import Iterable

from optgptq.errors import UsageError
from optgptq.scheduling.deadlines import Deadlines
from optgptq.scheduling.page_tables import PageTables
from optgptq.scheduling.planner import Planner
from optgptq.scheduling.ranked import RankedSequences
from optgptq.scheduling.request import Request, Sequence, SequenceState
from optgptq.scheduling.settings import SchedulerSettings
from optgptq.scheduling.step import Step, StepPart
from optgptq.scheduling.submission import check_queue, check_request
from optgptq.scheduling.usage import Counters, SlotRecord, Usage


class Scheduler:
    """The caller runs each step and reports its tokens before it asks for the next one.

    Not safe for threads: one thread calls it.
    """

    def __init__(self, settings: SchedulerSettings) -> None:
        self.settings = settings
        self.tables = PageTables(settings)
        self._longest = settings.longest
        self._waiting = RankedSequences()
        self._running = RankedSequences()
        self._counters = Counters()
        self._planner = Planner(settings, self.tables, self._waiting, running=self._running, counters=self._counters)
        self._requests: dict[str, tuple[Sequence, ...]] = {}
        self._deadlines = Deadlines()
        self._num_submitted = 0
        self._num_calls = 0
        self._in_flight: Step | None = None
        self._computing: set[Sequence] = set()
        self._records = [SlotRecord(allocator, settings.page_size) for allocator in self.tables.allocators]

    @property
    def max_length(self) -> int:
        """Tokens at which a sequence must end: `settings.max_length`, or fewer where the pages hold no more."""
        return self._longest

    @property
    def has_work(self) -> bool:
        """Whether any sequence has not ended."""
        return bool(self._requests)

    @property
    def has_room(self) -> bool:
        """Whether the queue takes another request."""
        return len(self._waiting) < self.settings.max_waiting

    def submit(self, request: Request) -> tuple[Sequence, ...]:
        """Put a request into the queue; return its texts.

        Raises:
            UsageError: an id that is in use, an empty or too long prompt, more texts than can run together.
            CapacityError: more tokens than the pages hold, or a full queue.
        """
        if request.request_id in self._requests:
            raise UsageError(
                f"request {request.request_id}",
                expected="an id that no other request has",
                found="the id of a request that has not ended",
                action="Give every request an id of its own.",
            )
        check_request(request, self.settings)
        check_queue(request, self.settings, num_waiting=len(self._waiting))
        place = request.priority * self.settings.aging_steps + self._num_calls
        rank = (place, request.arrival, self._num_submitted)
        num_groups = len(self.settings.groups)
        sequences = tuple(
            Sequence(request, index, rank=(*rank, index), num_groups=num_groups) for index in range(request.params.n)
        )
        self._num_submitted += 1
        self._requests[request.request_id] = sequences
        self._wait(sequences)
        if request.deadline is not None:
            self._deadlines.add(request.deadline, sequences)
        return sequences

    def schedule(self, now: float) -> Step:
        """Return what to compute next; without parts if there is nothing.

        `now` is compared with the deadlines of requests: those that are late end here, with the reason "timeout".
        """
        assert self._in_flight is None, "the step before was not completed"
        self._num_calls += 1
        ended = self._end_all(self._deadlines.pop_late(now), "timeout")
        ended += self._end_all([text for text in self._running if len(text.token_ids) >= self._longest], "length")
        step = self._planner.plan(ended)
        if step.parts:
            self._in_flight = step
            self._computing = {part.sequence for part in step.parts}
        return step

    def complete(self, step: Step, tokens: list[int]) -> None:
        """Note that a step was computed; `tokens` has one for each of `step.sampled`.

        What was finished meanwhile gets nothing. A step that failed is completed too, with any tokens, after everything
        in it was finished.
        """
        if not step.parts:
            return
        assert step is self._in_flight, "not the step that was handed out last"
        assert len(tokens) == len(step.sampled), "not one token for each sampled sequence"
        self._in_flight = None
        self._computing = set()
        given = iter(tokens)
        for part in step.parts:
            news = [(sequence, next(given)) for sequence in part.samples]
            self._complete_part(part, {sequence: token for sequence, token in news if not sequence.is_finished})
        self._counters.num_steps += 1
        for record in self._records:
            record.note_step()

    def finish(self, sequence: Sequence, reason: str) -> None:
        """End a text; its pages can be found by later requests until they are needed. What has ended stays as it is."""
        if sequence.is_finished:
            return
        was_running = sequence.state is SequenceState.RUNNING
        sequence.state = SequenceState.FINISHED
        sequence.finish_reason = reason
        if sequence.leader is not None:
            sequence.leader.followers.remove(sequence)
            sequence.leader = None
        elif was_running:
            self._running.remove(sequence)
        else:
            self._waiting.remove(sequence)
        # The pages of a step on its way are being written: they come back when it is complete.
        if sequence not in self._computing:
            self._retire(sequence)
        sequences = self._requests[sequence.request.request_id]
        if all(text.is_finished for text in sequences):
            del self._requests[sequence.request.request_id]

    def cancel(self, request_id: str, reason: str) -> tuple[Sequence, ...]:
        """End all texts of a request; return those that had not ended, none if nothing is known of the request."""
        # Followers go before their leader, so that none of them takes its place.
        return tuple(self._end_all(reversed(self._requests.get(request_id, ())), reason))

    def usage(self) -> Usage:
        """Return how full the pages are and what happened so far."""
        counters = self._counters
        return Usage(
            groups=tuple(record.usage() for record in self._records),
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            num_steps=counters.num_steps,
            prompt_tokens=counters.prompt_tokens,
            prefix_hit_tokens=counters.prefix_hit_tokens,
            num_preemptions=counters.num_preemptions,
            num_restarts=counters.num_restarts,
        )

    def _end_all(self, sequences: Iterable[Sequence], reason: str) -> list[Sequence]:
        ended = [sequence for sequence in sequences if not sequence.is_finished]
        for sequence in ended:
            self.finish(sequence, reason)
        return ended

    def _complete_part(self, part: StepPart, tokens: dict[Sequence, int]) -> None:
        """Advance the sequence of a part, let its followers begin with its pages, and append the new tokens."""
        sequence = part.sequence
        if tokens or not sequence.is_finished:
            self.tables.advance(sequence, part.end)
        for follower in tokens:
            if follower.leader is sequence:
                self._fork(sequence, follower)
        for text, token in tokens.items():
            text.token_ids.append(token)
        if sequence.is_finished:
            self._retire(sequence)

    def _fork(self, leader: Sequence, follower: Sequence) -> None:
        self.tables.share(leader, follower)
        leader.followers.remove(follower)
        follower.leader = None
        follower.num_cached_tokens = leader.num_cached_tokens
        follower.num_runs = 1
        follower.state = SequenceState.RUNNING
        self._running.add(follower)

    def _retire(self, sequence: Sequence) -> None:
        """Take the pages of a finished sequence; the first of its followers, if any are left, computes their prompt."""
        self.tables.release(sequence)
        followers, sequence.followers = tuple(sequence.followers), []
        if followers:
            self._wait(followers)

    def _wait(self, sequences: tuple[Sequence, ...]) -> None:
        """Put texts with the same prompt and no pages into the queue; the first one leads."""
        leader, *followers = sequences
        leader.leader = None
        leader.followers = followers
        for follower in followers:
            follower.leader = leader
        self._waiting.add(leader)
