"""Jobs that are stopped at chosen places and run again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from optgptq.journal.store import SESSION_PREFIX, Journal
from optgptq.quantize import JobOptions, QuantizeResult, quantize
from optgptq.recipe.records import Recipe
from optgptq.reports import events


class StoppedError(Exception):
    """What stops a job in a test."""


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Return the content of every file by relative name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@contextmanager
def watched_puts(hear: Callable[[str], None]) -> Iterator[None]:
    """Call `hear` with the name of each step of a journal right after it was put."""
    put = Journal.put

    def putting(self: Journal, name: str, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
        put(self, name, tensors, facts)
        if not name.startswith(SESSION_PREFIX):
            hear(name)

    with mock.patch.object(Journal, "put", putting):
        yield


def run_with_stops(
    model: Path, recipe: Recipe, output: Path, *, puts_per_run: int = 1, spill_share: float = 0.0
) -> tuple[QuantizeResult, list[str]]:
    """Run a job that is stopped after so many new steps each time until it is done; return its result and all steps."""
    steps: list[str] = []
    while True:
        left = puts_per_run

        def hear(name: str) -> None:
            nonlocal left
            is_new = name not in steps
            steps.append(name)
            left -= is_new
            # The last step says what comes next: it is put again by whoever goes on.
            if is_new and left == 0:
                raise StoppedError

        try:
            with watched_puts(hear):
                return quantize(model, recipe, output, options=JobOptions(spill_share=spill_share)), steps
        except StoppedError:
            continue


def stopped_at_linear(number: int) -> Callable[[events.ProgressEvent], None]:
    """Return a listener that stops the job when linear `number` (from 1) is solved and not kept yet."""
    seen = 0

    def hear(event: events.ProgressEvent) -> None:
        nonlocal seen
        if isinstance(event, events.LinearFinished):
            seen += 1
            if seen == number:
                raise StoppedError

    return hear
