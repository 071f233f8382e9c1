"""What an engine is set up with, validated when it is built. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from optgptq.errors import UsageError
from optgptq.kv_cache.page_layout import PAGE_MULTIPLE
from optgptq.kv_cache.scheme import parse_past_mode

CACHE_OF_CHECKPOINT, PLAIN_CACHE = "checkpoint", "16"
DATA_FREE_BITS = {"8": 8, "4": 4, "3": 3, "2": 2}
CACHE_CHOICES = (CACHE_OF_CHECKPOINT, PLAIN_CACHE, *DATA_FREE_BITS)

USUAL_PAGE_SIZE = 16
# Tokens of one step. On a processor more tokens add little speed to a product of matrices, and a smaller step lets
# requests start one after the other, so that fewer of them are at their longest at the same time.
CPU_STEP_TOKENS = 48
GPU_STEP_TOKENS = 2048
CPU_RUNNING = 48
CPU_MEMORY_SHARE = 0.5
GPU_MEMORY_SHARE = 0.9
GPU_RUNNING = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """How requests share a model.

    Attributes:
        page_size: tokens of a page, a multiple of 8; of 16 with a quantized cache, and of its groups along tokens. None
            for 16, or for the least multiple of it that the cache needs.
        max_length: positions of a text, prompt included; None for what the model promises, as far as memory allows.
        max_step_tokens: tokens of one step; None for a number that suits the device.
        max_running: texts that are written at the same time; None for a number that suits the device.
        max_waiting: places in the queue, None for any number. A request that has not begun takes one, whatever its `n`,
            and so does each text that lost its pages. While all are taken, requests are refused; `LLM` holds its own
            prompts back instead.
        kv_cache_bytes: memory for keys and values; None for a share of what the device has left.
        memory_share: that share; None for half of a machine's memory, nine tenths of a GPU's.
        kv_cache: `checkpoint`: keys and values are stored as the model's folder says; `16`: as they are computed; `8`,
            `4`, `3`, `2`: in so many bits, rotated, without calibration.
        past_only: which keys of a quantized cache a query reads as they were computed, in place of what its setup
            says: `off`, `token`, `chunk` or `window:N`; see `optgptq.kv_cache.scheme.PastRule`.
        prefix_cache: keep pages of what was read, for later prompts that begin alike.
        deterministic: a text does not depend, to the bit, on what runs beside it; slower.
        graphs: replay recorded decode steps on GPUs.
        seed: requests without a seed of their own draw theirs from it.
        watermark_ratio: share of pages that is kept for texts that run when a new one is let in.
        aging_steps: steps after which a waiting request rises by one level of priority.
    """

    page_size: int | None = None
    max_length: int | None = None
    max_step_tokens: int | None = None
    max_running: int | None = None
    max_waiting: int | None = None
    kv_cache_bytes: int | None = None
    memory_share: float | None = None
    kv_cache: str = CACHE_OF_CHECKPOINT
    past_only: str | None = None
    prefix_cache: bool = True
    deterministic: bool = False
    graphs: bool = True
    seed: int = 0
    watermark_ratio: float = 0.01
    aging_steps: int = 256

    def __post_init__(self) -> None:
        self._require_types()
        size = self.page_size
        _require(size is None or (size >= 8 and size % 8 == 0), "page_size", "a multiple of 8", size)
        counts = {
            "max_length": self.max_length,
            "max_step_tokens": self.max_step_tokens,
            "max_running": self.max_running,
            "max_waiting": self.max_waiting,
            "kv_cache_bytes": self.kv_cache_bytes,
        }
        for name, value in counts.items():
            _require(value is None or value >= 1, name, "at least 1", value)
        _require(self.max_length != 1, "max_length", "at least 2: a token to read and one to write", self.max_length)
        _require(
            not self.max_running or not self.max_step_tokens or self.max_running <= self.max_step_tokens,
            "max_running",
            f"at most max_step_tokens ({self.max_step_tokens}): each text takes a token of every step",
            self.max_running,
        )
        share = self.memory_share
        _require(share is None or 0 < share <= 1, "memory_share", "more than 0 and at most 1", share)
        _require(0 <= self.watermark_ratio < 1, "watermark_ratio", "0 or more and below 1", self.watermark_ratio)
        _require(self.aging_steps >= 1, "aging_steps", "at least 1", self.aging_steps)
        _require(0 <= self.seed < 1 << 62, "seed", "an integer from 0 to 2**62 - 1", self.seed)
        self._require_cache()

    def _require_cache(self) -> None:
        choice = self.kv_cache
        _require(choice in CACHE_CHOICES, "kv_cache", "one of " + ", ".join(CACHE_CHOICES), repr(choice))
        if self.past_only is not None:
            parse_past_mode(self.past_only)
        _require(
            choice not in DATA_FREE_BITS or self.page_size is None or self.page_size % PAGE_MULTIPLE == 0,
            "page_size",
            f"a multiple of {PAGE_MULTIPLE} with a quantized cache",
            self.page_size,
        )

    def _require_types(self) -> None:
        for name in ("seed", "aging_steps"):
            _require(_is_int(getattr(self, name)), name, "a whole number", repr(getattr(self, name)))
        for name in ("page_size", "max_length", "max_step_tokens", "max_running", "max_waiting", "kv_cache_bytes"):
            value = getattr(self, name)
            _require(value is None or _is_int(value), name, "a whole number or None", repr(value))
        for name in ("prefix_cache", "deterministic", "graphs"):
            _require(isinstance(getattr(self, name), bool), name, "True or False", repr(getattr(self, name)))
        _require(isinstance(self.kv_cache, str), "kv_cache", "text", repr(self.kv_cache))
        mode = self.past_only
        _require(mode is None or isinstance(mode, str), "past_only", "text or None", repr(mode))
        share, watermark = self.memory_share, self.watermark_ratio
        _require(share is None or _is_number(share), "memory_share", "a number or None", repr(share))
        _require(_is_number(watermark), "watermark_ratio", "a number", repr(watermark))

    def memory_share_of(self, device_type: str) -> float:
        """Return the share of a device's free memory that keys and values may take."""
        return self.memory_share or (CPU_MEMORY_SHARE if device_type == "cpu" else GPU_MEMORY_SHARE)

    def step_tokens(self, device_type: str) -> int:
        """Return the tokens of one step on a device: at least one for each text that is written."""
        usual = CPU_STEP_TOKENS if device_type == "cpu" else GPU_STEP_TOKENS
        return self.max_step_tokens or max(usual, self.max_running or 0)

    def running(self, device_type: str) -> int:
        """Return how many texts are written at the same time on a device."""
        usual = CPU_RUNNING if device_type == "cpu" else GPU_RUNNING
        return self.max_running or min(usual, self.step_tokens(device_type))


def _is_int(value: object) -> bool:
    # True is an int for Python; as a count it is a mistake.
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, float) or _is_int(value)


def _require(holds: bool, name: str, expected: str, found: object) -> None:
    if not holds:
        raise UsageError(
            name, expected=expected, found=str(found), action="Change this setting of the engine, or leave it out."
        )
