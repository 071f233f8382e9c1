"""Groups that keep the first tokens of a text for ever, with a window behind the next token or with none."""

from __future__ import annotations

import random
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from support.scheduled import VOCABULARY, Group, SimulatedEngine, page_group, request, settings

from optgptq.errors import CapacityError
from optgptq.scheduling.request import Sequence
from optgptq.scheduling.settings import SchedulerSettings

LENGTH = 160


def kept_pages(text: Sequence, group: int) -> list[int]:
    return [number for number, page in enumerate(text.page_tables[group]) if page]


def run(engine: SimulatedEngine, name: str, prompt: list[int], *, max_tokens: int = 1) -> Sequence:
    (text,) = engine.submit(request(name, prompt, max_tokens=max_tokens))
    engine.run_to_end(most_steps=100)
    return text


@pytest.mark.parametrize(("num_sinks", "pages"), [(1, 1), (4, 1), (5, 2), (17, 5)])
def test_without_a_window_only_pages_of_sinks_are_ever_taken(num_sinks: int, pages: int) -> None:
    engine = SimulatedEngine(settings((16, None), (pages, 0, num_sinks)))
    (text,) = engine.submit(request("a", [1] * 30, max_tokens=20))
    most = 0
    while not text.is_finished:
        engine.step()
        if not text.is_finished:
            assert kept_pages(text, 1) == list(range(min(pages, -(-text.num_computed // 4))))
            assert len(text.page_tables[1]) == len(text.page_tables[0])
            most = max(most, engine.scheduler.usage().groups[1].allocated_slots)
    assert (len(text.output_ids), most) == (20, 4 * pages)
    engine.check_nothing_is_left()


@pytest.mark.parametrize("window", [1, 4, 6])
@pytest.mark.parametrize("num_sinks", [1, 4, 6])
def test_a_window_moves_on_and_leaves_the_sinks(window: int, num_sinks: int) -> None:
    engine = SimulatedEngine(settings((16, None), (7, window, num_sinks), max_step_tokens=6))
    (text,) = engine.submit(request("a", [1] * 30, max_tokens=10))
    sinks = -(-num_sinks // 4)
    while not text.is_finished:
        engine.step()
        if not text.is_finished:
            behind = range(max(0, text.num_computed - window + 1) // 4, -(-text.num_computed // 4))
            taken = -(-text.num_computed // 4)
            assert kept_pages(text, 1) == sorted({*range(min(sinks, taken)), *behind})
    assert len(text.output_ids) == 10
    engine.check_nothing_is_left()


def test_a_long_prompt_is_read_in_one_step_beside_few_pages_of_sinks() -> None:
    engine = SimulatedEngine(settings((16, None), (1, 0, 4), max_step_tokens=64))
    (text,) = engine.submit(request("a", [1] * 50))
    assert engine.step().num_tokens == 50
    assert kept_pages(text, 1) == [0]


def test_texts_wait_for_pages_of_sinks_even_where_codes_have_room() -> None:
    engine = SimulatedEngine(settings((16, None), (2, 0, 4)))
    texts = [engine.submit(request(name, [number] * 6))[0] for number, name in enumerate("abc")]
    engine.step()
    assert [text.num_computed for text in texts] == [6, 6, 0]
    engine.run_to_end(most_steps=20)
    assert all(text.is_finished for text in texts)


def test_a_hit_takes_the_sinks_and_nothing_after_them() -> None:
    engine = SimulatedEngine(settings((16, None), (3, 0, 5)))
    run(engine, "first", [1] * 21)
    (again,) = engine.submit(request("again", [1] * 21))
    engine.step()
    assert again.num_cached_tokens == 20
    assert kept_pages(again, 1) == [0, 1]
    assert kept_pages(again, 0) == [0, 1, 2, 3, 4, 5]


def test_without_its_sinks_a_prefix_is_not_found() -> None:
    engine = SimulatedEngine(settings((30, None), (2, 0, 5)))
    run(engine, "first", [1] * 21)
    run(engine, "other", [2] * 6)
    assert engine.scheduler.usage().groups[0].peak_allocated_slots == 24
    assert run(engine, "again", [1] * 21).num_cached_tokens == 0


def test_a_hit_needs_sinks_and_window_but_not_what_is_between() -> None:
    engine = SimulatedEngine(settings((30, None), (8, 6, 3)))
    run(engine, "first", list(range(22)))
    (again,) = engine.submit(request("again", list(range(22))))
    engine.step()
    assert again.num_cached_tokens == 20
    assert kept_pages(again, 1) == [0, 4, 5]


def test_a_group_that_forgets_its_window_finds_the_sinks_of_a_prefix_alone() -> None:
    engine = SimulatedEngine(settings((16, None), (9, 6, 4, True)))
    run(engine, "first", [1] * 21)
    # Uses the pages that are free without a name.
    run(engine, "other", [2] * 30)
    (text,) = engine.submit(request("second", [1] * 21, max_tokens=20))
    engine.step()
    assert (text.num_cached_tokens, text.seen_from) == (20, 20)
    assert kept_pages(text, 1) == [0, 5]
    engine.run_to_end(most_steps=30)
    engine.check_nothing_is_left()


def test_the_texts_of_a_request_copy_a_page_of_sinks_that_is_not_full() -> None:
    engine = SimulatedEngine(settings((16, None), (5, 0, 7)))
    texts = engine.submit(request("a", [1] * 6, n=3, max_tokens=6))
    engine.step()
    step = engine.step()
    # In either group for all but the last one that holds the page.
    assert sorted(copy.group for copy in step.copies) == [0, 0, 1, 1]
    assert len({text.page_tables[1][0] for text in texts}) == 1
    assert len({text.page_tables[1][1] for text in texts}) == 3
    engine.run_to_end(most_steps=10)
    engine.check_nothing_is_left()


def test_beyond_the_sinks_only_codes_are_copied() -> None:
    engine = SimulatedEngine(settings((16, None), (1, 0, 4)))
    engine.submit(request("a", [1] * 6, n=3, max_tokens=6))
    engine.step()
    assert [copy.group for copy in engine.step().copies] == [0, 0]


SINKS = [1, 4, 17, 64]


def job_settings(
    window: int, num_sinks: int, page_size: int, *, prefix_cache: bool, forgets_window: bool
) -> SchedulerSettings:
    """Room for two texts of the greatest length, and for somewhat more than one of them in exact pages."""
    exact = page_group(99, window, num_sinks)
    span = exact.most_visible_pages(page_size)
    assert span is not None
    usable = span + max(1, span // 2) + (2 if window else 0)
    return settings(
        page_size=page_size,
        groups=(page_group(2 * LENGTH // page_size, None), page_group(usable, window, num_sinks, forgets_window)),
        max_length=LENGTH,
        max_step_tokens=48,
        max_waiting=6,
        prefix_cache=prefix_cache,
    )


KEPT = [
    (window, forgets_window, num_sinks)
    for window, forgets_window in ((0, False), (3, False), (3, True), (40, False), (40, True))
    for num_sinks in (0, *SINKS)
    if window or num_sinks
]


@pytest.mark.parametrize("prefix_cache", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize(("window", "forgets_window", "num_sinks"), KEPT)
def test_long_random_jobs_find_what_must_be_kept(
    window: int, forgets_window: bool, num_sinks: int, prefix_cache: bool
) -> None:
    """The engine checks every slot that must be kept after every call; the events at the end must have happened."""
    # Each kind of group with pages of either size, one of them with a cache and the other without.
    page_size = 8 if (KEPT.index((window, forgets_window, num_sinks)) % 2 == 0) == prefix_cache else 16
    chance = random.Random(f"{window} {num_sinks} {page_size}")
    limits = job_settings(window, num_sinks, page_size, prefix_cache=prefix_cache, forgets_window=forgets_window)
    engine = SimulatedEngine(limits)
    prefixes = [[chance.randrange(VOCABULARY) for _ in range(length)] for length in (5, 20, 70, 120)]
    num_done = 0
    for number in range(150):
        prompt = chance.choice(prefixes) + [chance.randrange(VOCABULARY) for _ in range(chance.randint(1, 5))]
        asked = request(
            str(number),
            prompt,
            n=chance.choice([1, 1, 2, 3]),
            max_tokens=chance.choice([None, 2, 6, 20]),
            priority=chance.randint(0, 2),
        )
        with suppress(CapacityError):
            engine.submit(asked)
        step = engine.schedule()
        live = [text for text in engine.texts if not text.is_finished]
        if live and chance.random() < 0.1:
            engine.scheduler.finish(chance.choice(live), "stop")
        if live and chance.random() < 0.05:
            engine.scheduler.cancel(chance.choice(live).request.request_id, "cancelled")
        engine.complete(step)
        num_done += sum(text.is_finished for text in engine.texts)
        engine.texts = [text for text in engine.texts if not text.is_finished]
    engine.run_to_end(most_steps=2000)
    engine.check_nothing_is_left()
    usage = engine.scheduler.usage()
    assert num_done > 20
    assert min(usage.num_preemptions, engine.copies) > 0
    assert (usage.prefix_hit_tokens > 0) == prefix_cache


EXACT_GROUPS = st.tuples(st.integers(1, 9), st.integers(0, 20), st.integers(1, 30)) | st.tuples(
    st.integers(1, 9), st.integers(1, 20), st.just(0)
)


@hypothesis_settings(max_examples=100, deadline=None)
@given(
    exact=EXACT_GROUPS,
    page_size=st.sampled_from([1, 4, 8]),
    watermark_ratio=st.sampled_from([0.0, 0.3]),
    prompts=st.lists(st.integers(1, 60), min_size=1, max_size=5),
)
def test_whatever_the_pages_every_text_that_is_let_in_ends(
    exact: Group, page_size: int, watermark_ratio: float, prompts: list[int]
) -> None:
    limits = settings((64 // page_size, None), exact, page_size=page_size, watermark_ratio=watermark_ratio)
    engine = SimulatedEngine(limits)
    for number, length in enumerate(prompts):
        asked = request(str(number), [number % 2] * length, n=1 + number % 2, max_tokens=9)
        if min(length + 9, limits.max_length) <= limits.longest:
            engine.submit(asked)
    engine.run_to_end(most_steps=2000)
    engine.check_nothing_is_left()
    assert all(text.finish_reason == "length" for text in engine.texts)


@pytest.mark.parametrize("window", [0, 1, 4, 6])
@pytest.mark.parametrize("num_sinks", [1, 4, 7])
def test_a_text_as_long_as_the_scheduler_says_runs_alone(window: int, num_sinks: int) -> None:
    for usable in range(1, 7):
        limits = settings((16, None), (usable, window, num_sinks))
        engine = SimulatedEngine(limits)
        (text,) = engine.submit(request("a", [1] * (limits.longest - 1), max_tokens=None))
        engine.run_to_end(most_steps=200)
        assert len(text.token_ids) == limits.longest
        assert engine.scheduler.usage().num_preemptions == 0
        span = limits.groups[1].most_visible_pages(4)
        assert span is not None
        assert limits.longest == (64 if span <= usable else min(64, usable * 4 + 1))
