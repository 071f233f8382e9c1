"""How texts end: by themselves, cancelled, late, and in the middle of a step."""

from __future__ import annotations

import pytest
from support.scheduled import SimulatedEngine, request, settings

from optgptq.scheduling.deadlines import Deadlines
from optgptq.scheduling.request import SequenceState


def test_what_is_finished_in_the_middle_of_a_step_gets_no_token_and_gives_its_pages_back_after_it() -> None:
    engine = SimulatedEngine(settings())
    (kept,) = engine.submit(request("kept", [1] * 5))
    (gone,) = engine.submit(request("gone", [2] * 5))
    step = engine.schedule()
    engine.scheduler.finish(gone, "stop")
    assert any(gone.page_tables), "the step still writes there"
    engine.complete(step)
    assert (gone.output_ids, gone.page_tables, gone.finish_reason) == ([], [[]], "stop")
    assert len(kept.output_ids) == 1
    # Nobody knows whether its pages were written, so they are not found.
    (again,) = engine.submit(request("again", [2] * 5))
    engine.run_to_end(most_steps=10)
    assert again.num_cached_tokens == 0


def test_finishing_twice_keeps_the_first_reason() -> None:
    engine = SimulatedEngine(settings())
    (text,) = engine.submit(request("a", [1]))
    engine.scheduler.finish(text, "stop")
    engine.scheduler.finish(text, "length")
    assert text.finish_reason == "stop"
    assert not engine.scheduler.has_work


@pytest.mark.parametrize("when", ["waiting", "chunk", "in the last chunk", "running"])
def test_cancel_ends_all_texts_of_a_request_at_any_time(when: str) -> None:
    engine = SimulatedEngine(settings(max_step_tokens=8))
    texts = engine.submit(request("a", [1] * 12, n=3))
    (other,) = engine.submit(request("b", [2] * 5))
    steps_before = {"waiting": 0, "chunk": 1, "in the last chunk": 1, "running": 3}[when]
    for _ in range(steps_before):
        engine.step()
    step = engine.schedule() if when == "in the last chunk" else None
    assert set(engine.scheduler.cancel("a", "cancelled")) == set(texts)
    assert engine.scheduler.cancel("a", "again") == ()
    assert engine.scheduler.cancel("unknown", "cancelled") == ()
    if step is not None:
        engine.complete(step)
    assert [text.finish_reason for text in texts] == ["cancelled"] * 3
    assert all(text.state is SequenceState.FINISHED for text in texts)
    engine.run_to_end(most_steps=10)
    assert len(other.output_ids) == 4
    engine.check_nothing_is_left()


@pytest.mark.parametrize("when", ["waiting", "chunk", "in a chunk"])
def test_another_text_computes_the_prompt_when_the_first_one_ends_before(when: str) -> None:
    engine = SimulatedEngine(settings(max_step_tokens=8))
    first, second, third = engine.submit(request("a", [1] * 12, n=3))
    if when == "chunk":
        engine.step()
    step = engine.schedule() if when == "in a chunk" else None
    engine.scheduler.finish(first, "stop")
    if step is not None:
        engine.complete(step)
    engine.run_to_end(most_steps=10)
    assert [len(text.output_ids) for text in (first, second, third)] == [0, 4, 4]
    assert engine.computed == {"waiting": 12, "chunk": 12, "in a chunk": 8 + 12}[when] + 2 * 3


def test_the_others_begin_with_the_prompt_even_if_the_first_one_ended_while_it_was_computed() -> None:
    engine = SimulatedEngine(settings())
    first, second, third = engine.submit(request("a", [1] * 6, n=3))
    step = engine.schedule()
    engine.scheduler.finish(first, "stop")
    engine.scheduler.finish(third, "stop")
    engine.complete(step)
    assert [len(text.output_ids) for text in (first, second, third)] == [0, 1, 0]
    engine.run_to_end(most_steps=10)
    assert engine.computed == 6 + 3
    engine.check_nothing_is_left()


def test_late_requests_end_with_timeout_and_the_others_go_on() -> None:
    engine = SimulatedEngine(settings(max_running=2))
    late = engine.submit(request("late", [1], n=2, max_tokens=30, deadline=4.0))
    (waits,) = engine.submit(request("waits", [1], deadline=3.0))
    (calm,) = engine.submit(request("calm", [1], deadline=100.0))
    ended = {text: engine.now for _ in range(5) for text in engine.step().ended}
    assert ended == {waits: 3.0, late[0]: 4.0, late[1]: 4.0}
    assert {text.finish_reason for text in ended} == {"timeout"}
    assert [len(text.output_ids) for text in late] == [3, 3]
    engine.run_to_end(most_steps=10)
    assert calm.finish_reason == "length"


def test_deadlines_of_ended_requests_are_not_kept_for_ever() -> None:
    engine = SimulatedEngine(settings())
    deadlines = Deadlines()
    for number in range(1000):
        sequences = engine.submit(request(str(number), [1], deadline=1e9))
        deadlines.add(1e9, sequences)
        engine.scheduler.cancel(str(number), "cancelled")
    assert len(deadlines) < 200
    assert list(deadlines.pop_late(2e9)) == []


def test_a_step_that_failed_is_completed_after_its_sequences_were_finished() -> None:
    engine = SimulatedEngine(settings())
    texts = engine.submit(request("a", [1] * 6, n=2))
    (other,) = engine.submit(request("b", [1] * 6))
    step = engine.schedule()
    for text in {part.sequence for part in step.parts} | set(step.sampled):
        engine.scheduler.finish(text, "error")
    engine.scheduler.complete(step, [0] * len(step.sampled))
    assert {text.finish_reason for text in (*texts, other)} == {"error"}
    engine.check_nothing_is_left()


def test_the_caller_reports_each_step_once_with_all_its_tokens() -> None:
    engine = SimulatedEngine(settings())
    engine.submit(request("a", [1]))
    step = engine.schedule()
    with pytest.raises(AssertionError, match="the step before was not completed"):
        engine.schedule()
    with pytest.raises(AssertionError, match="not one token for each sampled sequence"):
        engine.scheduler.complete(step, [])
    engine.complete(step)
    with pytest.raises(AssertionError, match="not the step that was handed out last"):
        engine.scheduler.complete(step, [1])


def test_the_texts_do_not_depend_on_what_else_runs() -> None:
    """The token of a text is a function of its tokens and its number, so pages and batches must not show."""
    prompts = [[number % 3] * (3 + 5 * number % 11) for number in range(12)]
    crowded = SimulatedEngine(settings((9, None), max_step_tokens=6))
    together = [crowded.submit(request(str(i), prompt, n=2, max_tokens=7)) for i, prompt in enumerate(prompts)]
    crowded.run_to_end(most_steps=500)
    assert crowded.scheduler.usage().num_preemptions > 0
    for texts, prompt in zip(together, prompts, strict=True):
        engine = SimulatedEngine(settings((60, None)))
        alone = engine.submit(request("alone", prompt, n=2, max_tokens=7))
        engine.run_to_end(most_steps=50)
        assert [text.token_ids for text in texts] == [text.token_ids for text in alone]
