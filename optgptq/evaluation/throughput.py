"""How fast an engine serves prompts that it gets all at once, seen from outside: when each token comes."""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from optgptq.errors import CapacityError
from optgptq.runtime.engine import Engine
from optgptq.scheduling.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """Times of one round; all in seconds.

    Attributes:
        seconds: from the first request to the last token.
        first_tokens: from the first request to the first token of each text.
        gaps: between neighbouring tokens of a text, of all texts.
        num_prompt_tokens, num_new_tokens: of all texts.
    """

    seconds: float
    first_tokens: tuple[float, ...]
    gaps: tuple[float, ...]
    num_prompt_tokens: int
    num_new_tokens: int

    @property
    def num_tokens(self) -> int:
        """Tokens that were read and written."""
        return self.num_prompt_tokens + self.num_new_tokens


@dataclass(slots=True)
class _Times:
    """When the last token of each text came, and what is known so far."""

    began: float
    last: dict[tuple[str, int], float] = field(default_factory=dict)
    first_tokens: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)

    def note(self, text: tuple[str, int], now: float) -> None:
        if text in self.last:
            self.gaps.append(now - self.last[text])
        else:
            self.first_tokens.append(now - self.began)
        self.last[text] = now


def draw_prompts(
    generator: random.Random, *, count: int, sizes: tuple[int, int], vocab_size: int, num_shared: int = 0
) -> list[list[int]]:
    """Return prompts of random token ids.

    Args:
        generator: is advanced.
        count: prompts.
        sizes: smallest and largest number of tokens, all between equally likely.
        vocab_size: ids run from 0 to one less.
        num_shared: tokens at the beginning that all of them share, fewer than the smallest number.
    """
    shared = [generator.randrange(vocab_size) for _ in range(num_shared)]
    return [
        shared + [generator.randrange(vocab_size) for _ in range(generator.randint(*sizes) - num_shared)]
        for _ in range(count)
    ]


def serve(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    *,
    num_new_tokens: int,
    clock: Callable[[], float] = time.perf_counter,
) -> Served:
    """Write `num_new_tokens` after each prompt, greedily, end tokens or not, and return when the tokens came.

    Raises:
        OptGPTQError: a request is refused or fails.
    """
    params = SamplingParams(max_tokens=num_new_tokens, temperature=0.0, ignore_eos=True, detokenize=False)
    times = _Times(clock())
    held_back = deque(prompts)
    try:
        while held_back or engine.has_work:
            while held_back and engine.has_room:
                engine.submit(held_back.popleft(), params, stream=True)
            pieces = engine.step()
            now = clock()
            for piece in pieces:
                for _ in piece.token_ids:
                    times.note((piece.request_id, piece.index), now)
        results = engine.take_results()
    except BaseException:
        # An error or Ctrl-C: nothing is left behind.
        engine.reset()
        raise
    for name, result in results:
        if result.error is not None:
            raise result.error
        _require_tokens(name, len(result.token_ids), num_new_tokens)
    return Served(
        seconds=max(times.last.values(), default=times.began) - times.began,
        first_tokens=tuple(times.first_tokens),
        gaps=tuple(times.gaps),
        num_prompt_tokens=sum(map(len, prompts)),
        num_new_tokens=sum(len(result.token_ids) for _, result in results),
    )


def _require_tokens(name: str, found: int, wanted: int) -> None:
    if found != wanted:
        raise CapacityError(
            f"request {name}",
            expected=f"{wanted} new tokens",
            found=str(found),
            action="Give the engine room for longer texts (max_length, kv_cache_bytes).",
        )


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the value below which so many percent of the values are, on the line between the two nearest.

    NaN for no values.
    """
    if not values:
        return float("nan")
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)
