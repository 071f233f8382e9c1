"""What is asked, and the texts that are being written for it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from optgptq.scheduling.sampling_params import SamplingParams

# Virtual place in the queue, arrival, number of the request, number of the text: smaller goes first.
Rank = tuple[int, float, int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt and how it is to be continued.

    `priority`: smaller goes first. `arrival` and `deadline` are seconds of the clock that `Scheduler.schedule` is
    called with; None: no deadline. Requests with different `salt` never share pages, so that one user cannot find out
    by the time of an answer what another one has asked.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    priority: int = 0
    arrival: float
    deadline: float | None = None
    salt: bytes = b""


class SequenceState(Enum):
    """Where a sequence is: without pages, with pages, or at its end."""

    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


class Sequence:
    """One text being written; the scheduler alone changes it.

    `token_ids` is the prompt and what was written; the keys and values of the first `num_computed` of them are in
    pages. `page_tables` has a table for each group; an entry is 0 where the page of a window was given back. While
    `num_runs` is the same, tables only grow, but for entries that become 0 and a last page that is copied.
    `num_cached_tokens` positions were found in the prefix cache when the sequence ran for the first time.
    """

    def __init__(self, request: Request, index: int, *, rank: Rank, num_groups: int) -> None:
        self.request = request
        self.index = index
        self.rank = rank
        self.token_ids = list(request.prompt_ids)
        self.state = SequenceState.WAITING
        self.finish_reason: str | None = None
        self.num_runs = 0
        self.num_computed = 0
        self.num_cached_tokens = 0
        self.page_tables: list[list[int]] = [[] for _ in range(num_groups)]
        # Entries at the beginning of each table that are known to be given back, so that nobody looks at them again.
        self.num_given_back = [0] * num_groups
        # In groups that forget their window, the first position beyond sinks that queries see.
        self.seen_from = 0
        # Names of the full pages known so far; those of the first `num_committed` are in the prefix cache.
        self.digests: list[bytes] = []
        self.num_committed = 0
        # Restart lengths that were exceeded when the pages were computed.
        self.restart_level = 0
        # Until the prompt is computed only the leader of a request runs; the followers take over its pages then.
        self.leader: Sequence | None = None
        self.followers: list[Sequence] = []

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt_ids)

    @property
    def output_ids(self) -> list[int]:
        """The tokens written so far."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def is_finished(self) -> bool:
        """Whether the text has ended, for any reason."""
        return self.state is SequenceState.FINISHED

    @property
    def num_seats(self) -> int:
        """How many sequences run when this one has reached the end of its prompt."""
        return 1 + len(self.followers)
