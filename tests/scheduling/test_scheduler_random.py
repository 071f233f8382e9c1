"""Random requests, steps and endings; after each of them everything that must hold is checked."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from support.scheduled import VOCABULARY, Group, SimulatedEngine, request, settings

from optgptq.errors import CapacityError
from optgptq.scheduling.step import Step

GROUPS: dict[str, tuple[Group, ...]] = {
    "full": ((9, None),),
    "windowed": ((4, 6),),
    "full and windowed": ((12, None), (4, 6)),
    "two windows": ((3, 1), (5, 9)),
    "narrow pages": ((10, None), (10, 5)),
    "sinks": ((12, None), (5, 0, 7)),
    "one sink": ((12, None), (2, 0, 1)),
    "sinks and a window": ((12, None), (6, 6, 5)),
    "window, sinks and a narrow window": ((12, None), (4, 6), (5, 1, 4)),
}
PROMPTS = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=30)
DEADLINES = st.none() | st.integers(1, 20)


class RandomRequests(RuleBasedStateMachine):
    """Everything that an engine may do, in any order."""

    @initialize(
        groups=st.sampled_from(list(GROUPS.values())),
        max_step_tokens=st.sampled_from([4, 7, 16]),
        prefix_cache=st.booleans(),
        watermark_ratio=st.sampled_from([0.0, 0.2]),
        restart_lengths=st.sampled_from([(), (13,), (8, 20)]),
    )
    def begin(self, groups: tuple[Group, ...], **changes: Any) -> None:
        self.engine = SimulatedEngine(settings(*groups, max_length=40, **changes))
        self.in_flight: Step | None = None
        self.num_requests = 0

    @rule(
        prompt=PROMPTS, n=st.integers(1, 3), new=st.integers(1, 12), priority=st.integers(0, 3), late=st.integers(1, 60)
    )
    def submit(self, prompt: list[int], n: int, new: int, priority: int, late: int) -> None:
        self.num_requests += 1
        deadline = self.engine.now + late if late < 20 else None
        asked = request(
            f"r{self.num_requests}", prompt, n=n, max_tokens=new, priority=priority, arrival=0.0, deadline=deadline
        )
        longest = self.engine.scheduler.max_length
        if min(len(prompt) + new, 40) > longest:
            with pytest.raises(CapacityError):
                self.engine.submit(asked)
        else:
            self.engine.submit(asked)

    @precondition(lambda self: self.in_flight is None)
    @rule(number=st.integers(1, 4))
    def step(self, number: int) -> None:
        for _ in range(number):
            self.engine.step()

    @precondition(lambda self: self.in_flight is None)
    @rule()
    def schedule(self) -> None:
        self.in_flight = self.engine.schedule()

    @precondition(lambda self: self.in_flight is not None)
    @rule()
    def complete(self) -> None:
        assert self.in_flight is not None
        self.engine.complete(self.in_flight)
        self.in_flight = None

    @rule(number=st.integers(0))
    def finish(self, number: int) -> None:
        live = [text for text in self.engine.texts if not text.is_finished]
        if live:
            self.engine.scheduler.finish(live[number % len(live)], "stop")
            self.engine.check()

    @rule(number=st.integers(0))
    def cancel(self, number: int) -> None:
        if self.num_requests:
            name = f"r{number % self.num_requests + 1}"
            for text in self.engine.scheduler.cancel(name, "cancelled"):
                assert (text.request.request_id, text.finish_reason) == (name, "cancelled")
            self.engine.check()

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        if self.in_flight is not None:
            self.engine.complete(self.in_flight)
        self.engine.run_to_end(most_steps=3000)
        self.engine.check_nothing_is_left()


TestRandomRequests = RandomRequests.TestCase
TestRandomRequests.settings = hypothesis_settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("restart_lengths", [(), (11, 25)], ids=["plain", "restarts"])
def test_long_random_jobs_meet_every_case(name: str, restart_lengths: tuple[int, ...]) -> None:
    """A thousand steps under more requests than fit; without the events named at the end it would prove little."""
    chance = random.Random(name)
    engine = SimulatedEngine(
        settings(*GROUPS[name], max_length=40, max_step_tokens=12, max_waiting=6, restart_lengths=restart_lengths)
    )
    prefixes = [[chance.randrange(VOCABULARY) for _ in range(length)] for length in (4, 9, 20)]
    num_done = num_refused = 0
    for number in range(1000):
        prompt = chance.choice(prefixes) + [chance.randrange(VOCABULARY) for _ in range(chance.randint(1, 5))]
        asked = request(
            str(number),
            prompt,
            n=chance.choice([1, 1, 1, 2, 3]),
            max_tokens=chance.choice([None, 1, 3, 8]),
            priority=chance.randint(0, 2),
            deadline=engine.now + chance.randint(1, 50) if chance.random() < 0.1 else None,
            salt=chance.choice([b"", b"other"]),
        )
        if chance.random() < 0.5:
            try:
                engine.submit(asked)
            except CapacityError:
                num_refused += 1
        step = engine.schedule()
        live = [text for text in engine.texts if not text.is_finished]
        if live and chance.random() < 0.05:
            engine.scheduler.finish(chance.choice(live), "stop")
        if live and chance.random() < 0.02:
            engine.scheduler.cancel(chance.choice(live).request.request_id, "cancelled")
        engine.complete(step)
        num_done += sum(text.is_finished for text in engine.texts)
        engine.texts = [text for text in engine.texts if not text.is_finished]
    engine.run_to_end(most_steps=1000)
    engine.check_nothing_is_left()
    usage = engine.scheduler.usage()
    assert num_done > 100
    assert min(num_refused, usage.num_preemptions, usage.prefix_hit_tokens, engine.copies) > 0
    assert (usage.num_restarts > 0) == (restart_lengths != ())
