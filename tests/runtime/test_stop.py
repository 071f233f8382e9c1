"""Stop strings in a text that comes in pieces, against a literal search in the whole text."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optgptq.runtime.stop import StopChecker, StopResult

TEXT = st.text(alphabet="ab€", max_size=24)
STOPS = st.lists(st.text(alphabet="ab€", min_size=1, max_size=5), max_size=4)


def literal_stop(text: str, stops: list[str], first_end: int = 0) -> tuple[int, str] | None:
    """Return where the first stop string ends, and the longest that ends there, by trying every end."""
    for end in range(first_end, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return end, max(found, key=len)
    return None


@settings(max_examples=400, deadline=None)
@given(text=TEXT, stops=STOPS, cuts=st.lists(st.integers(0, 24), max_size=8), include=st.booleans())
def test_any_pieces_give_what_a_search_in_the_whole_gives(text, stops, cuts, include):
    checker = StopChecker(stops, include=include)
    places = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    shown, seen, result = "", "", StopResult(text="")
    for begin, end in pairwise(places):
        seen = text[:end]
        result = checker.add(text[begin:end])
        shown += result.text
        if result.stop is not None:
            break
        # What is held back is the longest end of the text that begins a stop string: no more, no less.
        held = [
            n for n in range(len(seen) + 1) if any(s.startswith(seen[len(seen) - n :]) and n < len(s) for s in stops)
        ]
        assert shown == seen[: len(seen) - max(held, default=0)]
    expected = literal_stop(text, stops)
    if expected is None:
        assert result.stop is None
        assert shown + checker.finish() == text
        return
    end, stop = expected
    assert result.stop == stop
    assert shown == text[: end if include else end - len(stop)]


@settings(max_examples=200, deadline=None)
@given(pieces=st.lists(TEXT, max_size=6), stops=STOPS, free=st.integers(0, 6))
def test_nothing_stops_in_the_first_pieces_if_it_may_not(pieces, stops, free):
    checker, shown, result = StopChecker(stops), "", StopResult(text="")
    for index, piece in enumerate(pieces):
        result = checker.add(piece, may_stop=index >= free)
        shown += result.text
        if result.stop is not None:
            break
    text, protected = "".join(pieces), len("".join(pieces[:free]))
    expected = literal_stop(text, stops, protected + 1)
    if expected is None:
        assert shown + checker.finish() == text
    else:
        end, stop = expected
        assert (result.stop, shown) == (stop, text[: end - len(stop)])


@pytest.mark.parametrize(
    ("pieces", "stops", "include", "expected", "which"),
    [
        (["one\n", "\ntwo"], ["\n\n"], False, ["one", ""], "\n\n"),
        (["one\n", "\ntwo"], ["\n\n"], True, ["one", "\n\n"], "\n\n"),
        (["xabcd"], ["abcd", "bc"], False, ["xa"], "bc"),  # ends first
        (["xab"], ["b", "ab"], False, ["x"], "ab"),  # end together: the longest
        (["aa", "ab"], ["aab"], False, ["", "a"], "aab"),
        (["abab", "ac"], ["abac"], False, ["ab", ""], "abac"),
        (["stop", "s"], [], False, ["stop", "s"], None),
        (["<|e", "nd|", "x"], ["<|end|>"], False, ["", "", "<|end|x"], None),
    ],
)
def test_examples(pieces, stops, include, expected, which):
    checker = StopChecker(stops, include=include)
    results = [checker.add(piece) for piece in pieces]
    assert [result.text for result in results] == expected
    assert results[-1].stop == which


def test_what_was_held_back_comes_in_the_end():
    checker = StopChecker(["end."])
    assert checker.add("the en") == StopResult(text="the ")
    assert checker.finish() == "en"


def test_long_texts_and_long_stop_strings_take_linear_time():
    checker = StopChecker(["a" * 5000 + "b"])
    shown = sum(len(checker.add("a" * 1000).text) for _ in range(100))
    assert shown == 95_000
    assert checker.add("b").stop is not None
