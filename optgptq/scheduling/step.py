"""What one step of the model computes."""

from __future__ import annotations

from dataclasses import dataclass

from optgptq.scheduling.request import Sequence


@dataclass(frozen=True, slots=True, eq=False)
class StepPart:
    """Positions `begin` .. `end` - 1 of a sequence.

    Each sequence of `samples` gets a token from the logits of position `end` - 1: none for a chunk that is not the
    last, the sequence itself while it writes, all texts of a request at the end of its prompt.
    """

    sequence: Sequence
    begin: int
    end: int
    samples: tuple[Sequence, ...]


@dataclass(frozen=True, slots=True)
class PageCopy:
    """A page of a group to copy before the step writes anything.

    No source of a step is the target of an earlier copy, so the copies can be made one by one or all at once (all
    sources read, then all targets written).
    """

    group: int
    source: int
    target: int


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Step:
    """What to copy, compute and sample.

    The parts that compute one position come first. `ended` are the sequences that the scheduler itself has finished
    while it made this step: "timeout", or "length" for one that no engine has stopped.
    """

    parts: tuple[StepPart, ...]
    copies: tuple[PageCopy, ...] = ()
    ended: tuple[Sequence, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Positions that the step computes."""
        return sum(part.end - part.begin for part in self.parts)

    @property
    def sampled(self) -> tuple[Sequence, ...]:
        """The sequences that get a token, in the order in which `Scheduler.complete` wants the tokens."""
        return tuple(sequence for part in self.parts for sequence in part.samples)
