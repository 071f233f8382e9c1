"""One reason why a target does not load a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from optgptq.targets.records import LoadPath


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """What a rule expects and what it found.

    Attributes:
        rule: name of the rule, such as `bits` or `tensor_parallel`.
        path: path of the engine that has the rule.
        names: linears that it is about; empty where it is about the whole checkpoint.
        expected, found: both sides, for people.
        source: where the rule was read.
    """

    rule: str
    path: str
    names: tuple[str, ...]
    expected: str
    found: str
    source: str

    @classmethod
    def of(cls, path: LoadPath, rule: str, *, expected: str, found: str, names: tuple[str, ...] = ()) -> Refusal:
        """Return a refusal by a rule of `path`."""
        return cls(rule=rule, path=path.name, names=names, expected=expected, found=found, source=str(path.source))

    @property
    def where(self) -> str:
        """The linears by name, three of them at most, or the whole checkpoint."""
        if not self.names:
            return "the checkpoint"
        shown = ", ".join(self.names[:3])
        return shown if len(self.names) <= 3 else f"{shown} and {len(self.names) - 3} more"

    def record(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "rule": self.rule,
            "path": self.path,
            "where": self.where,
            "num_linears": len(self.names),
            "expected": self.expected,
            "found": self.found,
            "source": self.source,
        }


def merged(refusals: Iterable[Refusal]) -> tuple[Refusal, ...]:
    """Return refusals of the same words as one, about all their linears."""
    by_words: dict[tuple[str, str, str], Refusal] = {}
    for refusal in refusals:
        words = (refusal.rule, refusal.expected, refusal.found)
        old = by_words.get(words)
        by_words[words] = refusal if old is None else replace(old, names=(*old.names, *refusal.names))
    return tuple(by_words.values())
