"""Stop strings: found in a text that comes in pieces, and nothing handed out that may still become one.

Source: Knuth, Morris and Pratt, "Fast pattern matching in strings" (1977): for each stop string, how much of its
beginning the text ends with. Each character costs a bounded number of steps, however the text is cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class StopResult:
    """What a piece of text led to.

    Attributes:
        text: may be handed out now.
        stop: the stop string that ended the text; None while it goes on.
    """

    text: str
    stop: str | None = None


class StopChecker:
    """Follows one text."""

    __slots__ = ("_fallbacks", "_held", "_include", "_matched", "_stopped", "_stops")

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        """Begin with an empty text.

        Args:
            stops: none of them empty; the one that ends first ends the text, of several that end together the longest.
            include: the stop string is part of the text.
        """
        assert all(stops)
        self._stops = tuple(sorted(set(stops), key=lambda stop: (-len(stop), stop)))
        self._include = include
        self._fallbacks = [_fallbacks(stop) for stop in self._stops]
        self._matched = [0] * len(self._stops)  # characters of each stop that the text ends with
        self._held = ""
        self._stopped = False

    def add(self, text: str, *, may_stop: bool = True) -> StopResult:
        """Take the next piece and return what may be handed out.

        Args:
            text: the next piece.
            may_stop: False: a stop string that ends in this piece is ordinary text (`min_tokens` are not reached).
        """
        assert not self._stopped, "the text has ended"
        if not self._stops:
            return StopResult(text=text)
        whole = self._held + text
        begin = len(self._held)
        for offset, character in enumerate(text):
            stop = self._follow(character)
            if stop is not None and may_stop:
                self._stopped, self._held = True, ""
                end = begin + offset + 1
                return StopResult(text=whole[: end if self._include else end - len(stop)], stop=stop)
        cut = len(whole) - max(self._matched)
        self._held = whole[cut:]
        return StopResult(text=whole[:cut])

    def finish(self) -> str:
        """Return the text that was held back: no stop string came of it."""
        held, self._held = self._held, ""
        self._stopped = True
        return held

    def _follow(self, character: str) -> str | None:
        """Take one character and return the longest stop string that it completes."""
        found = None
        for index, (stop, fallback) in enumerate(zip(self._stops, self._fallbacks, strict=True)):
            matched = self._matched[index]
            while matched and stop[matched] != character:
                matched = fallback[matched]
            if stop[matched] == character:
                matched += 1
            if matched == len(stop):
                found = found or stop
                matched = fallback[matched]
            self._matched[index] = matched
        return found


def _fallbacks(stop: str) -> list[int]:
    """Return for each length of a beginning of `stop` the longest shorter beginning that it ends with."""
    fallback = [0, 0]
    for character in stop[1:]:
        length = fallback[-1]
        while length and stop[length] != character:
            length = fallback[length]
        fallback.append(length + 1 if stop[length] == character else 0)
    return fallback
