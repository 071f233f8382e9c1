"""What a measurement of an engine is asked for, and what it gives: records."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from statistics import median

from optgptq.errors import UsageError
from optgptq.evaluation.decode_floor import Bandwidth, DecodeBytes
from optgptq.evaluation.engine_check import EngineCheck

# Kernels are compiled and steps recorded before anything is measured.
WARM_UP_TOKENS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchSettings:
    """What is measured.

    Attributes:
        num_requests: texts that are served together.
        prompt_sizes: smallest and largest number of tokens of a prompt; the largest is read for the speed of reading.
        num_new_tokens: tokens of each text.
        num_shared: tokens at the beginning that all prompts of a round share.
        rounds: how often everything is measured, with other prompts.
        seed: of the prompts.
        check: compare with full forwards first.

    Raises:
        UsageError: numbers that are too small, or do not go together.
    """

    num_requests: int = 16
    prompt_sizes: tuple[int, int] = (64, 256)
    num_new_tokens: int = 64
    num_shared: int = 0
    rounds: int = 3
    seed: int = 0
    check: bool = True

    def __post_init__(self) -> None:
        low, high = self.prompt_sizes
        require(self.num_requests >= 1, "--requests", "1 or more", self.num_requests)
        require(1 <= low <= high, "--prompt-tokens", "A:B, 1 or more, A at most B", f"{low}:{high}")
        # A text of one token has no time between tokens.
        require(self.num_new_tokens >= 2, "--new-tokens", "2 or more", self.num_new_tokens)
        require(0 <= self.num_shared < low, "--shared-prefix", f"fewer than {low} tokens", self.num_shared)
        require(self.rounds >= 1, "--rounds", "1 or more", self.rounds)

    def cut(self, max_length: int, *, prompts: bool = True, new_tokens: bool = True) -> BenchSettings:
        """Return the settings with sizes that fit a text of `max_length` tokens; only those that may change, do.

        As they are where that is not possible.
        """
        (low, high), num_new = self.prompt_sizes, self.num_new_tokens
        if new_tokens and self.longest > max_length:
            num_new = min(num_new, max_length // 4 if prompts else max_length - high)
        if prompts:
            high = min(high, max_length - max(num_new, WARM_UP_TOKENS))
        if high < 1 or num_new < 2:
            return self
        return replace(self, prompt_sizes=(min(low, high), high), num_new_tokens=num_new)

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return self.prompt_sizes[1] + max(self.num_new_tokens, WARM_UP_TOKENS)

    @property
    def usual_size(self) -> int:
        """Tokens of the prompt of the one text whose writing is measured: half-way between the sizes."""
        return sum(self.prompt_sizes) // 2


def require(holds: bool, name: str, expected: str, found: object) -> None:
    if not holds:
        raise UsageError(name, expected=expected, found=str(found), action="Change this option, or leave it out.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """One figure over all rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Return the spread of at least one value."""
        several = tuple(values)
        return cls(median=median(several), low=min(several), high=max(several))


@dataclass(frozen=True, slots=True, kw_only=True)
class Speeds:
    """Times in seconds, speeds in tokens per second; each a figure of a round, over all rounds.

    Attributes:
        prefill: tokens of a prompt that is read alone.
        token_p50, token_p99: from one token to the next of a text that is written alone.
        new_tokens: written per second for all requests together.
        all_tokens: the same, with those of the prompts.
        first_token_p50, first_token_p99: from the arrival of all requests to the first token of each.
        gap_p50, gap_p99: from one token to the next of a text among others.
    """

    prefill: Spread
    token_p50: Spread
    token_p99: Spread
    new_tokens: Spread
    all_tokens: Spread
    first_token_p50: Spread
    first_token_p99: Spread
    gap_p50: Spread
    gap_p99: Spread


@dataclass(frozen=True, slots=True, kw_only=True)
class PageFigures:
    """Pages of keys and values while the requests of all rounds were served.

    Attributes:
        total_bytes: of all pages.
        peak_bytes: most that were held at once, by anything that was measured.
        waste_ratio: part of what was held that had no token in it, over all steps.
        num_preemptions: texts that lost their pages and were computed again.
        prefix_hit_tokens: of `prompt_tokens`, those that were found in the cache.
    """

    total_bytes: int
    peak_bytes: int
    waste_ratio: float
    num_preemptions: int
    prefix_hit_tokens: int
    prompt_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheFigures:
    """How keys and values are stored.

    Attributes:
        choice: the engine's setting `kv_cache`.
        past_only: mode of a quantized cache; None with a plain one.
        key_bits, value_bits: of a number, its share of scale and minimum included; mean over the layers.
        bytes_per_token: of all layers, without the tokens that are kept exactly besides.
        num_tokens: that fit into the pages.
        exact_bytes: of `PageFigures.total_bytes`, those for the tokens that are kept exactly.
    """

    choice: str
    past_only: str | None
    key_bits: float
    value_bits: float
    bytes_per_token: float
    num_tokens: int
    exact_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchReport:
    """All figures.

    Attributes:
        cache: how keys and values are stored.
        check: None where it was skipped.
        speeds: times and speeds.
        bytes_per_token: what one token of the text that is written alone must read, half-way through its new tokens.
        bandwidth: of the device.
        floor_share: the least time of that token, by the bandwidth, over the time it took.
        pages: how pages were used.
        peak_memory_bytes: highest resident memory of the process.
        peak_device_bytes: most that torch held on the GPU; None on a processor.
    """

    cache: CacheFigures
    check: EngineCheck | None
    speeds: Speeds
    bytes_per_token: DecodeBytes
    bandwidth: Bandwidth
    floor_share: float
    pages: PageFigures
    peak_memory_bytes: int
    peak_device_bytes: int | None
