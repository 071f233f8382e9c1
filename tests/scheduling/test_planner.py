"""Who gets tokens and pages in a step."""

from __future__ import annotations

from support.scheduled import SimulatedEngine, request, settings

from optgptq.scheduling.request import SequenceState
from optgptq.scheduling.step import Step


def _shape(step: Step) -> list[tuple[str, int, int, int]]:
    """Return the parts as name, begin, end and number of samples."""
    return [(part.sequence.request.request_id, part.begin, part.end, len(part.samples)) for part in step.parts]


def test_a_prompt_runs_in_chunks_and_then_token_by_token() -> None:
    engine = SimulatedEngine(settings(max_step_tokens=4))
    (text,) = engine.submit(request("a", range(10), max_tokens=3))
    shapes = [_shape(engine.step()) for _ in range(5)]
    assert shapes == [
        [("a", 0, 4, 0)],
        [("a", 4, 8, 0)],
        [("a", 8, 10, 1)],
        [("a", 10, 11, 1)],
        [("a", 11, 12, 1)],
    ]
    assert len(text.output_ids) == 3
    assert not engine.scheduler.has_work
    assert _shape(engine.step()) == []


def test_one_budget_goes_to_decodes_then_running_chunks_then_admissions() -> None:
    engine = SimulatedEngine(settings(max_step_tokens=8))
    engine.submit(request("writes", range(3)))
    engine.step()
    engine.submit(request("long", range(20)))
    engine.submit(request("next", [9] * 5))
    assert _shape(engine.step()) == [("writes", 3, 4, 1), ("long", 0, 7, 0)]
    assert _shape(engine.step()) == [("writes", 4, 5, 1), ("long", 7, 14, 0)]
    assert _shape(engine.step()) == [("writes", 5, 6, 1), ("next", 0, 1, 0), ("long", 14, 20, 1)]


def test_decodes_come_first_even_if_their_rank_is_worse() -> None:
    engine = SimulatedEngine(settings(max_step_tokens=4))
    engine.submit(request("writes", [1], priority=5))
    engine.step()
    engine.submit(request("urgent", range(9), priority=0))
    assert _shape(engine.step()) == [("writes", 1, 2, 1), ("urgent", 0, 3, 0)]


def test_smaller_priorities_go_first_and_arrival_decides_within() -> None:
    engine = SimulatedEngine(settings(max_running=1))
    engine.submit(request("late", [1], arrival=2.0))
    engine.submit(request("early", [1], arrival=1.0))
    engine.submit(request("urgent", [1], priority=-1, arrival=3.0))
    order = []
    while engine.scheduler.has_work:
        order += [part[0] for part in _shape(engine.step()) if part[1] == 0]
    assert order == ["urgent", "early", "late"]


def test_a_request_gains_a_level_for_every_aging_steps_calls() -> None:
    engine = SimulatedEngine(settings(max_running=1, aging_steps=8))
    engine.submit(request("runs", [1], max_tokens=30))
    engine.submit(request("old", [1], priority=2))
    for _ in range(15):
        engine.step()
    engine.submit(request("overtakes", [1], priority=0))
    for _ in range(2):
        engine.step()
    engine.submit(request("comes too late", [1], priority=0))
    order = []
    while engine.scheduler.has_work:
        order += [part[0] for part in _shape(engine.step()) if part[1] == 0]
    assert order == ["overtakes", "old", "comes too late"]


def _steps_of_the_least_urgent(aging_steps: int) -> int | None:
    """Return after how many steps a request ends under an endless stream of more urgent ones; None if it does not."""
    engine = SimulatedEngine(settings((10, None), max_running=3, aging_steps=aging_steps))
    (slow,) = engine.submit(request("slow", range(9), priority=3, max_tokens=20))
    for number in range(300):
        if len(engine.texts) - sum(text.is_finished for text in engine.texts) < 20:
            engine.submit(request(str(number), range(4 + number % 9), max_tokens=5))
        engine.step()
        if slow.is_finished:
            return number
    return None


def test_nothing_starves_under_a_stream_of_more_urgent_requests() -> None:
    assert _steps_of_the_least_urgent(aging_steps=1000) is None
    finished = _steps_of_the_least_urgent(aging_steps=16)
    assert finished is not None
    assert finished < 200


def test_at_most_max_running_sequences_run_and_every_text_of_a_request_counts() -> None:
    engine = SimulatedEngine(settings(max_running=3))
    for name, n in (("a", 2), ("b", 2), ("c", 1)):
        engine.submit(request(name, range(3), n=n))
    assert _shape(engine.step()) == [("a", 0, 3, 2)]
    # c would fit, but it came after b and must not overtake it.
    assert engine.scheduler.usage().num_waiting == 2


def test_the_worst_and_newest_sequence_loses_its_pages_and_goes_before_all_that_came_later() -> None:
    engine = SimulatedEngine(settings((4, None), prefix_cache=False))
    texts = [engine.submit(request(name, [1] * 4, max_tokens=9))[0] for name in "abc"]
    assert len(engine.step().parts) == 3
    engine.submit(request("d", [1] * 4))
    assert _shape(engine.step()) == [("a", 4, 5, 1), ("b", 4, 5, 1)]
    assert [text.state for text in texts] == [SequenceState.RUNNING, SequenceState.RUNNING, SequenceState.WAITING]
    assert engine.scheduler.usage().num_preemptions == 1
    engine.run_to_end(most_steps=60)
    ends = [text.request.request_id for text in engine.texts]
    assert ends == ["a", "b", "c", "d"]
    engine.check_nothing_is_left()


def test_a_victim_computes_all_its_tokens_again_and_finds_its_pages_in_the_cache() -> None:
    engine = SimulatedEngine(settings((4, None)))
    (first,) = engine.submit(request("first", [0] * 8, max_tokens=5))
    (second,) = engine.submit(request("second", [1] * 7, max_tokens=5))
    steps = []
    while engine.scheduler.has_work:
        steps += [part for part in _shape(engine.step()) if part[0] == "second"]
    assert engine.scheduler.usage().num_preemptions == 1
    # Its own page of the first four tokens was not needed by anybody and is found again.
    assert steps[:3] == [("second", 0, 7, 1), ("second", 4, 8, 1), ("second", 8, 9, 1)]
    assert [len(text.output_ids) for text in (first, second)] == [5, 5]
    assert second.num_runs == 2


def test_the_best_sequence_never_waits_for_a_worse_one() -> None:
    engine = SimulatedEngine(settings((6, None)))
    (best,) = engine.submit(request("best", [0] * 4, max_tokens=20))
    others = [engine.submit(request(name, [1] * 4, max_tokens=16))[0] for name in "bcd"]
    for number in range(20):
        step = engine.step()
        assert best in [part.sequence for part in step.parts], f"step {number}"
    assert best.is_finished
    assert engine.scheduler.usage().num_preemptions > 0
    engine.run_to_end(most_steps=100)
    assert all(len(text.output_ids) == 16 for text in others)


def test_an_admission_leaves_the_watermark_free_unless_nothing_runs() -> None:
    engine = SimulatedEngine(settings((10, None), watermark_ratio=0.5, max_step_tokens=32))
    engine.submit(request("a", [1] * 9))
    engine.submit(request("b", [2] * 9))
    assert _shape(engine.step()) == [("a", 0, 9, 1)]
    engine.submit(request("c", [2] * 3))
    assert engine.scheduler.usage().num_waiting == 2
    for _ in range(3):
        assert len(engine.step().parts) == 1
    # Nothing runs now: b begins although only five pages stay free, c waits for them.
    assert _shape(engine.step()) == [("b", 0, 9, 1), ("c", 0, 3, 1)]


def test_a_prompt_larger_than_all_but_the_watermark_runs_alone() -> None:
    engine = SimulatedEngine(settings((10, None), watermark_ratio=0.9, max_step_tokens=64))
    engine.submit(request("a", [1] * 36))
    assert _shape(engine.step()) == [("a", 0, 36, 1)]


def test_nobody_is_admitted_in_a_step_in_which_a_sequence_loses_its_pages() -> None:
    engine = SimulatedEngine(settings((4, None), prefix_cache=False))
    engine.submit(request("a", [1] * 4, max_tokens=5))
    engine.submit(request("b", [2] * 10, max_tokens=4))
    assert _shape(engine.step()) == [("a", 0, 4, 1), ("b", 0, 10, 1)]
    engine.submit(request("urgent", [0], priority=-9))
    assert _shape(engine.step()) == [("a", 4, 5, 1)]
    assert engine.scheduler.usage().num_preemptions == 1
    assert _shape(engine.step()) == [("a", 5, 6, 1), ("urgent", 0, 1, 1)]


def test_a_sequence_that_no_worse_one_makes_room_for_keeps_its_pages_and_waits() -> None:
    engine = SimulatedEngine(settings((5, None)))
    engine.submit(request("first", [0] * 8, max_tokens=5))
    (second,) = engine.submit(request("second", [1] * 7, max_tokens=5))
    steps = []
    while engine.scheduler.has_work:
        steps.append([part[0] for part in _shape(engine.step())])
    assert steps == [["first", "second"]] * 2 + [["first"]] * 3 + [["second"]] * 3
    assert (engine.scheduler.usage().num_preemptions, second.num_runs) == (0, 1)


def test_one_that_waits_for_pages_is_looked_at_again_when_others_have_computed_its_prefix() -> None:
    engine = SimulatedEngine(settings((22, None), max_length=120, max_step_tokens=128))
    prompt = [1, 2] * 20
    (first,) = engine.submit(request("first", prompt, max_tokens=40))
    (second,) = engine.submit(request("second", [*prompt, *range(16)], max_tokens=1))
    for _ in range(20):
        engine.step()
    assert not first.is_finished
    assert second.is_finished
    assert second.num_cached_tokens == 40


def test_a_sequence_past_a_restart_length_is_computed_again_from_its_first_token() -> None:
    engine = SimulatedEngine(settings(restart_lengths=(6,)))
    (text,) = engine.submit(request("a", [1, 2, 1, 2, 0]))
    shapes = [_shape(engine.step()) for _ in range(4)]
    assert shapes == [[("a", 0, 5, 1)], [("a", 5, 6, 1)], [("a", 0, 7, 1)], [("a", 7, 8, 1)]]
    assert text.restart_level == 1
    usage = engine.scheduler.usage()
    assert (usage.num_restarts, usage.num_preemptions) == (1, 0)
    # Neither the pages before nor after that length serve a text on the other side of it.
    (short,) = engine.submit(request("short", [1, 2, 1, 2, 0], max_tokens=1))
    (long,) = engine.submit(request("long", [1, 2, 1, 2, 0, 0, 0], max_tokens=1))
    engine.run_to_end(most_steps=3)
    assert (short.num_cached_tokens, long.num_cached_tokens) == (4, 4)
    assert (short.restart_level, long.restart_level) == (0, 1)
