"""Times of tokens seen from outside, with a clock that the test turns."""

from __future__ import annotations

import random

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optgptq.bundled import bundled_path
from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.errors import CapacityError, UsageError
from optgptq.evaluation.throughput import draw_prompts, percentile, serve
from optgptq.models.decoder import load_decoder
from optgptq.runtime.engine import Engine
from optgptq.runtime.engine_settings import EngineSettings


@pytest.fixture(scope="module")
def decoder():
    return load_decoder(CheckpointFolder.open(bundled_path("story-llama")))


class StepClock:
    """One second for each step: it is looked at once before the first and once after each of them."""

    def __init__(self) -> None:
        self.now = -1.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


def test_times_are_those_of_the_steps(decoder):
    # Prompts of 5, 9 and 3 tokens, 8 tokens in a step, two texts at once.
    settings = EngineSettings(max_length=32, max_running=2, max_step_tokens=8, prefix_cache=False)
    prompts = [[7] * 5, [8] * 9, [9] * 3]
    served = serve(Engine(decoder, None, settings), prompts, num_new_tokens=4, clock=StepClock())
    assert (served.num_prompt_tokens, served.num_new_tokens, served.num_tokens) == (17, 12, 29)
    assert len(served.first_tokens) == 3
    assert len(served.gaps) == 3 * 3
    assert served.first_tokens[0] == 1.0
    assert sorted(served.first_tokens) == list(served.first_tokens)
    # The last text starts when the first one, whose tokens came in steps 1 to 4, has ended.
    assert served.first_tokens[2] >= 5.0
    assert set(served.gaps) == {1.0}
    assert served.seconds == served.first_tokens[2] + 3.0


def test_a_request_that_cannot_be_served_leaves_nothing_behind(decoder):
    engine = Engine(decoder, None, EngineSettings(max_length=32, max_running=2))
    with pytest.raises(UsageError, match="a prompt of at most 31 tokens"):
        serve(engine, [[7] * 5, [7] * 32], num_new_tokens=4)
    assert not engine.has_work
    with pytest.raises(CapacityError, match="expected 20 new tokens, found 12"):
        serve(engine, [[7] * 20], num_new_tokens=20)
    assert serve(engine, [[7] * 5], num_new_tokens=4).num_new_tokens == 4
    assert engine.take_results() == []


@given(
    seed=st.integers(0, 2**32),
    count=st.integers(1, 9),
    low=st.integers(1, 40),
    more=st.integers(0, 40),
    data=st.data(),
)
def test_prompts_are_of_the_asked_sizes_and_come_again_with_their_seed(seed, count, low, more, data):
    shared = data.draw(st.integers(0, low - 1))

    def draw() -> list[list[int]]:
        return draw_prompts(random.Random(seed), count=count, sizes=(low, low + more), vocab_size=11, num_shared=shared)

    prompts = draw()
    assert prompts == draw()
    assert len(prompts) == count
    assert all(low <= len(prompt) <= low + more for prompt in prompts)
    assert {tuple(prompt[:shared]) for prompt in prompts} == {tuple(prompts[0][:shared])}
    assert all(0 <= token < 11 for prompt in prompts for token in prompt)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1), st.floats(0, 100))
def test_percentiles_are_those_of_numpy(values, percent):
    assert percentile(values, percent) == pytest.approx(numpy.percentile(values, percent), rel=1e-9, abs=1e-6)


def test_no_values_have_no_percentile():
    assert numpy.isnan(percentile([], 50))
