"""How much of the pages a mixed job leaves unused."""

from __future__ import annotations

import random

import pytest
from support.scheduled import request

from optgptq.runtime.engine_settings import CPU_STEP_TOKENS, GPU_STEP_TOKENS
from optgptq.scheduling.scheduler import Scheduler
from optgptq.scheduling.settings import PageGroup, SchedulerSettings
from optgptq.scheduling.usage import Usage

NEW_TOKENS = 128
SHORTEST, LONGEST = 64, 512


def run_job(sizes: list[int], *, page_size: int, step_tokens: int) -> Usage:
    settings = SchedulerSettings(
        page_size=page_size,
        groups=(PageGroup(num_pages=1 + len(sizes) * -(-(LONGEST + NEW_TOKENS) // page_size), window=None),),
        max_length=LONGEST + NEW_TOKENS,
        max_step_tokens=step_tokens,
        max_running=len(sizes),
        max_waiting=len(sizes),
    )
    scheduler = Scheduler(settings)
    texts = []
    for number, size in enumerate(sizes):
        prompt = (number * 1000 + place for place in range(size))
        texts += scheduler.submit(request(f"request {number}", prompt, max_tokens=NEW_TOKENS))
    while scheduler.has_work:
        step = scheduler.schedule(0.0)
        scheduler.complete(step, [0] * len(step.sampled))
        for text in texts:
            if len(text.output_ids) == NEW_TOKENS:
                scheduler.finish(text, "length")
    return scheduler.usage()


@pytest.mark.parametrize("step_tokens", [CPU_STEP_TOKENS, GPU_STEP_TOKENS])
@pytest.mark.parametrize("seed", range(4))
def test_a_mixed_job_wastes_less_than_four_percent(seed: int, step_tokens: int) -> None:
    """A text leaves half a page of 16 unused on average, of about 350 slots that it has."""
    generator = random.Random(seed)
    sizes = [generator.randint(SHORTEST, LONGEST) for _ in range(16)]
    usage = run_job(sizes, page_size=16, step_tokens=step_tokens)
    assert usage.waste_ratio < 0.04
    # A cache that holds as much for each text as the longest one needs.
    assert usage.peak_allocated_slots < 16 * (LONGEST + NEW_TOKENS)
    whole = run_job(sizes, page_size=LONGEST + NEW_TOKENS, step_tokens=step_tokens)
    assert whole.waste_ratio > 0.3
