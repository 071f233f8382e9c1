"""Steps of a job that is stopped at any of them, and goes on in another process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from optgptq.journal.entry import Entry
from optgptq.journal.store import Journal, Steps

Result = TypeVar("Result")


class StoppedError(Exception):
    """The job was stopped."""


@dataclass(slots=True)
class StoppingSteps:
    """Steps of `journal` of which so many are put before the next call of `put` stops the job.

    Attributes:
        journal: what holds them.
        left: calls of `put` that pass.
        is_written: the step that stops the job is written all the same.
    """

    journal: Steps
    left: int
    is_written: bool

    def get(self, name: str) -> Entry | None:
        return self.journal.get(name)

    def put(self, name: str, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
        if self.left > 0 or self.is_written:
            self.journal.put(name, tensors, facts)
        if self.left == 0:
            raise StoppedError
        self.left -= 1

    def forget(self, name: str) -> None:
        self.journal.forget(name)

    def sync(self) -> None:
        self.journal.sync()

    def scope(self, prefix: str) -> Steps:
        raise AssertionError(f"{prefix}: a walk has the scope that it is given")


def fresh_journal(path: Path) -> Journal:
    """Return a journal without steps in a new folder."""
    path.mkdir()
    journal = Journal(path, None)
    journal.begin({})
    return journal


def stopped_everywhere(path: Path, work: Callable[[Steps], Result]) -> list[Result]:
    """Return what `work` gives after it was stopped at each step, and after a stop at every single one.

    Each time the rest is done by a journal that knows the folder alone.
    """
    results = []
    number = 0
    while True:
        folder = path / f"stop-{number}"
        try:
            work(StoppingSteps(fresh_journal(folder), number, is_written=number % 2 == 0))
        except StoppedError:
            results.append(work(Journal(folder, {})))
            number += 1
        else:
            break
    assert number > 0
    folder = path / "stopped-always"
    fresh_journal(folder)
    for _ in range(number):
        try:
            work(StoppingSteps(Journal(folder, {}), 0, is_written=True))
        except StoppedError:
            continue
        raise AssertionError("more was put than is needed")
    results.append(work(Journal(folder, {})))
    return results
