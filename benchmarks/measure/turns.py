"""Times of short calls on a processor, in turns, and how fast its memory is read."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from optgptq.native.large_pages import large_page_empty

# What is read before a call sees the same numbers again: more than a processor's caches hold.
ROTATED_BYTES = 1 << 28


def times_in_turns(calls: Mapping[str, Sequence[Callable[[], Any]]], rounds: int) -> dict[str, list[float]]:
    """Return microseconds by name: in each round every name has one of its calls made, the next one each time.

    What a machine does besides then falls on all of them, and the quotient of two in one round tells more than that of
    their medians (`ratio`). Each round begins with another name: who comes after a call that read much finds the caches
    empty. The first round is not counted.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for number in range(rounds + 1):
        for place in range(len(names)):
            # Another order, not only another begin: neighbours change too.
            step = 1 + number % 2 * (len(names) - 2)
            name = names[(number + place * step) % len(names)]
            of_name = calls[name]
            call = of_name[number % len(of_name)]
            began = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - began) * 1e6)
    return {name: of_name[1:] for name, of_name in times.items()}


def ratio(times: Sequence[float], others: Sequence[float]) -> float:
    """Return how many times as long the others take: the median of all rounds."""
    return statistics.median(other / own for own, other in zip(times, others, strict=True))


def reading_calls() -> list[Callable[[], Any]]:
    """Return calls that read `ROTATED_BYTES` each from memory, in large pages, and do nothing else worth mentioning."""
    numbers = [large_page_empty((ROTATED_BYTES // 8,), torch.int64).fill_(1) for _ in range(2)]
    return [part.sum for part in numbers]
