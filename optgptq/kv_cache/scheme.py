"""What a quantized KV cache stores of each decoder layer, and which keys a query reads in full precision.

Needs no torch. Which combinations are allowed is checked where a scheme is read (`optgptq.formats.kv_cache_config`) or
made from a recipe.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from optgptq.errors import UsageError

Axis = Literal["channel", "token"]
PastMode = Literal["off", "token", "chunk", "window"]

EXACT_BITS = 16
CODE_BITS = (2, 3, 4, 8)
# First tokens of a text, and last ones, that are kept exactly where nobody says otherwise, by the fewest bits of codes.
# Sixteen last tokens cost nothing beside a long text and take four fifths of the damage from codes of 4 bits.
USUAL_SINK_TOKENS = {8: 0, 4: 4, 3: 4, 2: 64}
USUAL_RECENT_TOKENS = {8: 0, 4: 16, 3: 32, 2: 128}
PAST_MODES: tuple[PastMode, ...] = ("off", "token", "chunk", "window")


@dataclass(frozen=True, slots=True, kw_only=True)
class SideScheme:
    """Keys, or values, of one decoder layer.

    Attributes:
        bits: of a code; 16: numbers are kept as the model computes them, and the other fields mean nothing.
        group_size: numbers that share a scale and a minimum: channels of one token and head, or, with axis `token`,
            tokens of one channel.
        axis: along which a group runs.
    """

    bits: int = EXACT_BITS
    group_size: int = 0
    axis: Axis = "channel"

    @property
    def is_exact(self) -> bool:
        """Nothing is quantized."""
        return self.bits == EXACT_BITS


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerScheme:
    """One decoder layer."""

    keys: SideScheme
    values: SideScheme

    @property
    def is_exact(self) -> bool:
        """Nothing of this layer is quantized: it keeps its pages as a model without a scheme does."""
        return self.keys.is_exact and self.values.is_exact


@dataclass(frozen=True, slots=True, kw_only=True)
class PastRule:
    """Which keys and values a query reads as they were computed, and which from their codes.

    A query at position `i` reads exactly `0 .. sink_tokens - 1` and `first_exact(i) .. i`, the rest from codes.

    Attributes:
        mode: `off`: also its own key from codes; `token`: its own key is exact; `chunk`: so are all of the step that it
            is computed in; `window`: so are all from the last multiple of `window` on.
        window: tokens of an aligned window, 0 in the other modes.
        sink_tokens: first tokens of a text that are kept exactly.
        recent_tokens: so many keys up to its own are exact besides, whatever the mode.
        granule: tokens that become codes together: the longest group along tokens, else 1.
    """

    mode: PastMode = "chunk"
    window: int = 0
    sink_tokens: int = 0
    recent_tokens: int = 0
    granule: int = 1

    def first_exact(self, position: int, begin: int) -> int:
        """Return the first key that a query at `position` of a step that begins at `begin` reads exactly.

        `position + 1` where it reads none.
        """
        first = {
            "off": position + 1,
            "token": position,
            "chunk": begin,
            "window": position - position % self.window if self.window else position,
        }[self.mode]
        if self.recent_tokens:
            first = min(first, max(position - self.recent_tokens + 1, 0))
        return first - first % self.granule

    @property
    def kept_window(self) -> int:
        """Keys up to its own that a query may have to read exactly out of memory, as a sliding window; 0 for none.

        What the step itself computes needs no memory.
        """
        widest = max(self.recent_tokens, self.window, 1) + self.granule - 1
        return 0 if widest == 1 else widest

    @property
    def depends_on_steps(self) -> bool:
        """A text depends on how it was cut into steps."""
        return self.mode == "chunk"

    @property
    def name(self) -> str:
        """The mode as users write it, `window:64` for example."""
        return f"window:{self.window}" if self.mode == "window" else self.mode


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheScheme:
    """A quantized cache: one record per decoder layer, and the rule for all of them."""

    layers: tuple[LayerScheme, ...]
    past: PastRule = PastRule()

    @property
    def is_exact(self) -> bool:
        """Nothing is quantized at all."""
        return all(layer.is_exact for layer in self.layers)


def granule_of(layers: Sequence[LayerScheme]) -> int:
    """Return the tokens that become codes together: 1 where no group runs along tokens."""
    sides = [side for layer in layers for side in (layer.keys, layer.values)]
    return math.lcm(*(side.group_size for side in sides if side.axis == "token" and not side.is_exact))


def parse_past_mode(text: str) -> tuple[PastMode, int]:
    """Return mode and window of `off`, `token`, `chunk` or `window:N`.

    Raises:
        UsageError: anything else.
    """
    mode, colon, number = text.partition(":")
    if mode == "window" and number.isdecimal() and int(number) >= 1:
        return "window", int(number)
    for known in PAST_MODES:
        if mode == known and mode != "window" and not colon:
            return known, 0
    raise UsageError(
        "past_only",
        expected="off, token, chunk or window:N with N of 1 or more",
        found=repr(text),
        action="Correct the mode of the KV cache.",
    )
