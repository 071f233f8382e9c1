"""Pages that several sequences have: the prefix cache, the texts of one request, and windows."""

from __future__ import annotations

import pytest
from support.scheduled import SimulatedEngine, request, settings

from optgptq.scheduling.request import Sequence


def _run(engine: SimulatedEngine, name: str, prompt: list[int], *, max_tokens: int = 1, salt: bytes = b"") -> Sequence:
    (text,) = engine.submit(request(name, prompt, max_tokens=max_tokens, salt=salt))
    engine.run_to_end(most_steps=50)
    return text


def test_full_pages_of_finished_requests_are_found_again() -> None:
    engine = SimulatedEngine(settings())
    assert _run(engine, "first", [1, 2, 3, 4, 5, 6, 7, 8, 9]).num_cached_tokens == 0
    assert _run(engine, "same", [1, 2, 3, 4, 5, 6, 7, 8, 9]).num_cached_tokens == 8
    assert _run(engine, "longer", [1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 9]).num_cached_tokens == 8
    assert _run(engine, "other end", [1, 2, 3, 4, 5, 6, 7, 0, 9]).num_cached_tokens == 4
    assert _run(engine, "other begin", [0, 2, 3, 4, 5, 6, 7, 8, 9]).num_cached_tokens == 0
    usage = engine.scheduler.usage()
    assert (usage.prefix_hit_tokens, usage.prompt_tokens) == (20, 48)


def test_at_least_one_token_is_left_to_compute() -> None:
    engine = SimulatedEngine(settings())
    _run(engine, "first", [1] * 8)
    assert _run(engine, "same", [1] * 8).num_cached_tokens == 4


def test_what_was_written_is_found_again_too() -> None:
    engine = SimulatedEngine(settings())
    first = _run(engine, "first", [1] * 6, max_tokens=7)
    assert _run(engine, "next turn", [*first.token_ids, 1, 1]).num_cached_tokens == 12


def test_requests_of_different_salt_share_nothing() -> None:
    engine = SimulatedEngine(settings())
    _run(engine, "first", [1] * 9, salt=b"a")
    assert _run(engine, "other", [1] * 9, salt=b"b").num_cached_tokens == 0
    assert _run(engine, "same", [1] * 9, salt=b"a").num_cached_tokens == 8


def test_without_a_prefix_cache_nothing_is_found() -> None:
    engine = SimulatedEngine(settings(prefix_cache=False))
    _run(engine, "first", [1] * 9)
    assert _run(engine, "same", [1] * 9).num_cached_tokens == 0


def test_the_last_pages_of_a_sequence_are_forgotten_first() -> None:
    engine = SimulatedEngine(settings((4, None)))
    _run(engine, "first", [1] * 12)
    _run(engine, "other", [2] * 12)
    assert _run(engine, "same", [1] * 12).num_cached_tokens == 4


def test_two_prompts_of_one_step_are_both_computed_and_one_of_them_is_kept() -> None:
    engine = SimulatedEngine(settings((6, None)))
    texts = [engine.submit(request(name, [1] * 8, max_tokens=2))[0] for name in "ab"]
    engine.step()
    assert [text.num_cached_tokens for text in texts] == [0, 0]
    tables = [list(text.page_tables[0]) for text in texts]
    assert set(tables[0]).isdisjoint(tables[1])
    engine.run_to_end(most_steps=5)
    (again,) = engine.submit(request("again", [1] * 9))
    engine.step()
    assert again.page_tables[0][:2] == tables[0]


def test_the_texts_of_a_request_share_the_pages_of_their_prompt() -> None:
    engine = SimulatedEngine(settings())
    texts = engine.submit(request("a", [1] * 6, n=3, max_tokens=4))
    assert engine.step().sampled == texts
    assert [text.page_tables for text in texts] == [texts[0].page_tables] * 3
    assert engine.scheduler.usage().allocated_slots == 8
    assert [len(text.output_ids) for text in texts] == [1, 1, 1]
    step = engine.step()
    # The half full page is copied for all but the last one that holds it.
    assert len(step.copies) == 2
    assert len({copy.source for copy in step.copies}) == 1
    assert len({text.page_tables[0][1] for text in texts}) == 3
    assert len({text.page_tables[0][0] for text in texts}) == 1
    usage = engine.scheduler.usage()
    assert (usage.allocated_slots, usage.filled_slots) == (16, 4 + 3 * 3)
    engine.run_to_end(most_steps=5)
    assert engine.copies == 2
    engine.check_nothing_is_left()


def test_a_prompt_of_whole_pages_is_shared_without_a_copy() -> None:
    engine = SimulatedEngine(settings())
    engine.submit(request("a", [1] * 8, n=3))
    engine.run_to_end(most_steps=6)
    assert engine.copies == 0


@pytest.mark.parametrize("window", [1, 3, 4, 5, 6, 9])
def test_a_window_gives_back_what_the_next_position_does_not_see(window: int) -> None:
    engine = SimulatedEngine(settings((16, None), (4, window), max_step_tokens=6))
    (text,) = engine.submit(request("a", [1] * 30, max_tokens=10))
    while engine.scheduler.has_work:
        engine.step()
        if text.is_finished:
            break
        held = [number for number, page in enumerate(text.page_tables[1]) if page]
        first_seen = max(0, text.num_computed - window + 1)
        assert held == list(range(first_seen // 4, -(-text.num_computed // 4)))
        assert all(text.page_tables[0])
    assert len(text.output_ids) == 10
    engine.check_nothing_is_left()


def test_a_prompt_longer_than_the_pages_of_a_window_runs_in_chunks_that_fit() -> None:
    engine = SimulatedEngine(settings((3, 6), max_step_tokens=64))
    (text,) = engine.submit(request("a", range(50)))
    sizes = []
    while len(text.output_ids) == 0:
        sizes.append(engine.step().num_tokens)
    assert sizes[0] == 12
    assert sum(sizes) == 50
    assert max(sizes[1:]) <= 8


def test_a_prompt_longer_than_the_pages_of_a_window_is_admitted_beside_others() -> None:
    engine = SimulatedEngine(settings((30, None), (8, 6), max_step_tokens=64))
    (first,) = engine.submit(request("first", range(4), max_tokens=20))
    engine.step()
    (text,) = engine.submit(request("long", range(40)))
    engine.step()
    assert text.num_computed > 0
    assert not first.is_finished


def test_a_hit_needs_only_the_pages_that_the_window_sees() -> None:
    engine = SimulatedEngine(settings((16, None), (4, 6)))
    _run(engine, "first", list(range(18)))
    # The group with the window has forgotten the first pages; those before position 16 are there.
    again, *_ = engine.submit(request("again", range(18)))
    engine.step()
    assert again.num_cached_tokens == 16
    assert again.page_tables[1][:2] == [0, 0]
    assert all(again.page_tables[1][3:])


def test_a_hit_must_hold_in_all_groups() -> None:
    engine = SimulatedEngine(settings((16, None), (4, 6)))
    _run(engine, "first", list(range(18)))
    _run(engine, "other", [30] * 14)
    assert _run(engine, "again", list(range(18))).num_cached_tokens == 0


def test_usage_tells_peaks_and_the_waste_of_all_steps() -> None:
    engine = SimulatedEngine(settings((6, None)))
    _run(engine, "a", [1] * 5, max_tokens=3)
    usage = engine.scheduler.usage()
    assert (usage.total_slots, usage.allocated_slots, usage.filled_slots) == (24, 0, 0)
    assert (usage.peak_allocated_slots, usage.peak_filled_slots) == (8, 7)
    assert usage.num_steps == 3
    assert usage.waste_ratio == pytest.approx(1 - (5 + 6 + 7) / 24)
    assert SimulatedEngine(settings()).scheduler.usage().waste_ratio == 0.0
