"""Texts that a model has written itself, kept part by part while it writes more of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch

from optgptq.journal.store import Steps

# The step that says how many texts are written at a time since memory ran out.
_RUNNING = "running"


class KeptTexts:
    """Finished texts as steps of a job, and how many of them are written at a time.

    Args:
        steps: where they are kept; nothing else may put steps there.
    """

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        self._parts: set[str] = set()

    def get(self, part: int, count: int) -> list[list[int]] | None:
        """Return the tokens of the `count` texts of a part; None where it has not been kept, or not whole."""
        name = _name(part)
        entry = self._steps.get(name)
        if entry is None or entry.tensors.keys() != {"tokens", "lengths"}:
            return None
        tokens: list[int] = entry.tensors["tokens"].tolist()
        lengths: list[int] = entry.tensors["lengths"].tolist()
        if len(lengths) != count or sum(lengths) != len(tokens):
            return None
        self._parts.add(name)
        ends = list(accumulate(lengths, initial=0))
        return [tokens[begin:end] for begin, end in pairwise(ends)]

    def put(self, part: int, texts: Sequence[Sequence[int]]) -> None:
        """Keep a part, whatever happens from here on.

        Raises:
            CapacityError, OutputError: it cannot be written.
        """
        name = _name(part)
        tokens = torch.tensor([token for text in texts for token in text], dtype=torch.int64)
        lengths = torch.tensor([len(text) for text in texts], dtype=torch.int64)
        self._steps.put(name, {"tokens": tokens, "lengths": lengths}, {})
        self._parts.add(name)
        self._steps.sync()

    def running(self) -> tuple[int, list[str]] | None:
        """Return how many texts are written at a time and what the user was told; None where memory never ran out."""
        entry = self._steps.get(_RUNNING)
        return None if entry is None else (entry.facts["running"], list(entry.facts["told"]))

    def put_running(self, running: int, told: Sequence[str]) -> None:
        """Keep how many texts are written at a time from here on, and all that the user was told about it.

        Raises:
            CapacityError, OutputError: it cannot be written.
        """
        self._steps.put(_RUNNING, {}, {"running": running, "told": list(told)})

    def forget(self) -> None:
        """Drop everything that was put or found: it is kept elsewhere.

        Raises:
            OutputError: it cannot be removed.
        """
        for name in sorted(self._parts | {_RUNNING}):
            self._steps.forget(name)
        self._parts.clear()


def _name(part: int) -> str:
    return f"part-{part:05d}"
