"""Every input boundary there is, and the run over some inputs of one."""

from __future__ import annotations

import logging
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from support.fuzzing.case import Boundary
from support.fuzzing.checkpoints import checkpoint_boundaries
from support.fuzzing.corpora import write_checkpoints
from support.fuzzing.guard import Outcome, Watch, memory_limit
from support.fuzzing.readers import reader_boundaries
from support.fuzzing.settings import config_boundaries, recipe_boundaries
from support.fuzzing.texts import text_boundaries


def every_boundary(home: Path) -> list[Boundary]:
    """Return all boundaries with their folders below `home`; takes some seconds."""
    sources = write_checkpoints(home / "sound")
    return [
        *recipe_boundaries(home),
        *config_boundaries(home),
        *checkpoint_boundaries(home, sources),
        *reader_boundaries(home, sources),
        *text_boundaries(home, sources["dense"]),
    ]


@dataclass(slots=True)
class Tally:
    """What the inputs of a boundary came to.

    Attributes:
        counts: inputs by kind of outcome.
        faults: numbers of the inputs that showed each distinct fault: kind, place, kind of exception.
        details: what the first of them said.
        slowest_seconds: of one input.
        seconds: of all.
    """

    counts: Counter[str] = field(default_factory=Counter)
    faults: dict[tuple[str, str, str], list[int]] = field(default_factory=dict)
    details: dict[tuple[str, str, str], str] = field(default_factory=dict)
    slowest_seconds: float = 0.0
    seconds: float = 0.0

    def add(self, number: int, outcome: Outcome, seconds: float) -> None:
        self.counts[outcome.kind] += 1
        self.seconds += seconds
        self.slowest_seconds = max(self.slowest_seconds, seconds)
        if outcome.is_fault:
            key = (outcome.kind, outcome.place, outcome.detail.partition(":")[0])
            self.faults.setdefault(key, []).append(number)
            self.details.setdefault(key, outcome.detail)


def run_boundary(boundary: Boundary, *, seed: int, num_inputs: int, watch: Watch, first: int = 0) -> Tally:
    """Run inputs `first` and so on of `seed`."""
    tally = Tally()
    with quiet(), memory_limit():
        for number in range(first, first + num_inputs):
            started = time.perf_counter()
            outcome = boundary.run(seed, number, watch)
            tally.add(number, outcome, time.perf_counter() - started)
    return tally


@contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings and logs of other libraries about damaged input."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
