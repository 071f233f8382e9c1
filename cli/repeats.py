"""Lines that say the same of many linears or decoder layers, told a few times and then counted."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_LINES_OF_A_PASS = 20
_KINDS_SHOWN = 60
# A whole dotted name with a number in it, or a number: what differs between two warnings of one kind.
_VARIABLE = re.compile(r"[\w.+-]*\d[\w.+-]*")
_PLACE = re.compile(r"(\d+)/(\d+)$")


def warning_kind(message: str) -> str:
    """Return the message without the names and numbers in which warnings of one kind differ."""
    return _VARIABLE.sub("#", message)


@dataclass(slots=True)
class _Kind:
    """Warnings that differ in names and numbers only: the one that was told, and what came after it."""

    first: str
    last: str = ""
    num_hidden: int = 0


@dataclass(slots=True)
class WarningLines:
    """Warnings of a job: the first of each kind is told at once, the others are counted for the end.

    A model of 80 decoder layers can raise the same note for each of its 560 linears; all of them are in the record.
    Where `folds` is False each message is told, once.
    """

    folds: bool = True
    _told: set[str] = field(default_factory=set)
    _kinds: dict[str, _Kind] = field(default_factory=dict)
    _num_of_other_kinds: int = 0

    def add(self, message: str) -> tuple[str, ...]:
        """Return the line for a warning; none for one that was told before or is counted instead."""
        if message in self._told:
            return ()
        self._told.add(message)
        name = warning_kind(message) if self.folds else message
        known = self._kinds.get(name)
        if known is not None:
            known.num_hidden += 1
            known.last = message
            return ()
        if self.folds and len(self._kinds) == _KINDS_SHOWN:
            self._num_of_other_kinds += 1
            return ()
        self._kinds[name] = _Kind(message)
        return (f"warning: {message}",)

    def take_rest(self) -> tuple[str, ...]:
        """Return a line for each kind that was counted, and forget the counts."""
        lines = []
        for kind in self._kinds.values():
            if kind.num_hidden == 1:
                lines.append(f"warning: {kind.last}")
            elif kind.num_hidden:
                lines.append(f'warning: {kind.num_hidden} more like "{kind.first}", see the run record')
            kind.num_hidden = 0
        if self._num_of_other_kinds:
            lines.append(f"warning: {self._num_of_other_kinds} more of other kinds, see the run record")
        self._num_of_other_kinds = 0
        return tuple(lines)


@dataclass(slots=True)
class PhaseLines:
    """Phases of a job: one that begins anew for each decoder layer is told about twenty times."""

    _num_seen: dict[str, int] = field(default_factory=dict)

    def is_told(self, name: str, detail: str) -> bool:
        """Return whether a line is due for this beginning of phase `name`."""
        place = _PLACE.search(detail)
        if place is not None:
            return _is_milestone(int(place[1]), int(place[2]))
        seen = self._num_seen[name] = self._num_seen.get(name, 0) + 1
        return seen <= _LINES_OF_A_PASS or seen.bit_count() == 1


def _is_milestone(index: int, total: int) -> bool:
    """Return whether item `index` (from 1) of `total` is the first or ends one of equal parts of the way."""
    if total <= _LINES_OF_A_PASS or index == 1:
        return True
    parts = _LINES_OF_A_PASS - 1
    return index * parts // total > (index - 1) * parts // total
