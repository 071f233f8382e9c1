"""Times of short calls on a GPU, and what its memory does at best."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from itertools import cycle, islice
from typing import Any

import torch

# What is read by one round of calls: no device keeps it in its cache.
ROTATED_BYTES = 1 << 29


def graph_times(calls: list[Callable[[], Any]], repetitions: int) -> list[float]:
    """Return microseconds of one call, from rounds of all calls in one graph: the time to start them is not counted."""
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in islice(cycle(calls), len(calls) + 3):
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(repetitions + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return times[2:]


def copied_bytes_per_us() -> float:
    """Return what a copy of 1 GiB reads and writes in a microsecond."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / statistics.median(graph_times([lambda: target.copy_(source)] * 4, 5))
