"""Requests that a scheduler refuses: each with the numbers, and the others go on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from support.scheduled import SimulatedEngine, request, settings

from optgptq.errors import CapacityError, UsageError
from optgptq.scheduling.request import Request


def _refused(engine: SimulatedEngine, kind: type[Exception], asked: Request) -> str:
    with pytest.raises(kind) as caught:
        engine.submit(asked)
    return str(caught.value)


@pytest.mark.parametrize(
    ("prompt", "changes", "message"),
    [
        ([], {}, "request bad: expected a prompt of 1 token or more, found an empty prompt. Give at least one token."),
        (
            [1] * 64,
            {},
            "request bad: expected a prompt of at most 63 tokens, so that one can be added, found 64 tokens. Shorten "
            "the prompt, or raise max_length if the model allows it.",
        ),
        (
            [1],
            {"n": 5},
            "request bad: expected n of at most max_running = 4, found n = 5. Ask for fewer texts, or raise "
            "max_running.",
        ),
        (
            [1],
            {"name": "good"},
            "request good: expected an id that no other request has, found the id of a request that has not ended. "
            "Give every request an id of its own.",
        ),
    ],
)
def test_what_cannot_be_obeyed_is_a_usage_error(prompt: Iterable[int], changes: dict[str, Any], message: str) -> None:
    engine = SimulatedEngine(settings())
    (good,) = engine.submit(request("good", [1, 2, 3]))
    assert _refused(engine, UsageError, request(**({"name": "bad", "prompt": prompt} | changes))) == message
    engine.run_to_end(most_steps=10)
    assert len(good.output_ids) == 4


def test_more_tokens_than_the_pages_hold_are_refused() -> None:
    engine = SimulatedEngine(settings((3, None)))
    assert _refused(engine, CapacityError, request("bad", [1] * 10, max_tokens=4)) == (
        "request bad: expected at most 13 tokens, which is what the pages hold, found 10 tokens in the prompt and 4 to "
        "write. Shorten the prompt, lower max_tokens, or give the cache more memory."
    )
    (text,) = engine.submit(request("good", [1] * 10, max_tokens=3))
    engine.run_to_end(most_steps=10)
    assert len(text.output_ids) == 3


def test_max_tokens_beyond_the_length_is_fine() -> None:
    engine = SimulatedEngine(settings())
    (text,) = engine.submit(request("long", [1] * 60, max_tokens=1000))
    engine.run_to_end(most_steps=20)
    assert (len(text.token_ids), text.finish_reason) == (64, "length")


def test_without_max_tokens_a_text_ends_where_the_pages_do_even_if_no_engine_stops_it() -> None:
    engine = SimulatedEngine(settings((3, None)))
    (text,) = engine.submit(request("open", [1] * 10, max_tokens=None))
    assert engine.scheduler.max_length == 13
    step = engine.schedule()
    while step.parts:
        engine.scheduler.complete(step, [1] * len(step.sampled))
        step = engine.schedule()
    assert step.ended == (text,)
    assert (len(text.token_ids), text.finish_reason) == (13, "length")
    engine.check_nothing_is_left()


def test_a_full_queue_is_refused_and_open_again_later() -> None:
    engine = SimulatedEngine(settings(max_waiting=2))
    for name in "ab":
        engine.submit(request(name, [1]))
    assert _refused(engine, CapacityError, request("c", [1])) == (
        "request c: expected fewer than max_waiting = 2 waiting sequences, found 2 of them. Send the request again "
        "when others have ended, or raise max_waiting."
    )
    engine.step()
    engine.submit(request("c", [1]))
    engine.run_to_end(most_steps=20)
    assert all(len(text.output_ids) == 4 for text in engine.texts)


def test_an_id_can_be_used_again_after_the_end() -> None:
    engine = SimulatedEngine(settings())
    engine.submit(request("same", [1], deadline=9.0))
    engine.run_to_end(most_steps=10)
    (text,) = engine.submit(request("same", [1], max_tokens=20))
    engine.run_to_end(most_steps=30)
    assert text.finish_reason == "length"


def test_a_request_takes_one_place_in_the_queue_however_many_texts_it_has() -> None:
    engine = SimulatedEngine(settings(max_waiting=1))
    assert engine.scheduler.has_room
    engine.submit(request("a", range(5), n=3))
    assert engine.scheduler.usage().num_waiting == 1
    assert not engine.scheduler.has_room
    engine.step()
    assert engine.scheduler.has_room
