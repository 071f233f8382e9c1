"""What is said of a request besides its prompt, checked where the engine takes it; and the seed of its texts."""

from __future__ import annotations

from optgptq.errors import UsageError
from optgptq.plain_numbers import is_number
from optgptq.scheduling.sampling_params import SamplingParams

# Odd, and far from any simple fraction of 2**64 (the golden ratio): neighbouring requests draw from distant streams.
_SEED_STEP = 0x9E3779B97F4A7C15
_SEED_MASK = (1 << 63) - 1


def check_request_id(request_id: object) -> None:
    """Check the name of a request.

    Raises:
        UsageError: it is no text.
    """
    _require(isinstance(request_id, str), "request", "a request_id that is text", request_id)


def check_options(where: str, *, params: object, priority: object, timeout_seconds: object, salt: object) -> None:
    """Check the arguments of `Engine.submit` that no other record checks.

    Raises:
        UsageError: no `SamplingParams`, a priority that is no finite number, a timeout that is no number (infinity is
            one), or a salt that is not bytes.
    """
    _require(isinstance(params, SamplingParams), where, "SamplingParams", params)
    _require(is_number(priority), where, "a priority that is a finite number", priority)
    _require(
        timeout_seconds is None or is_number(timeout_seconds) or timeout_seconds in (float("inf"), float("-inf")),
        where,
        "a timeout in seconds",
        timeout_seconds,
    )
    _require(isinstance(salt, bytes), where, "a salt of bytes", salt)


def request_seed(params: SamplingParams, *, engine_seed: int, number: int) -> int:
    """Return the seed of a request's texts: its own, or one that the engine's seed and its number give."""
    if params.seed is not None:
        return params.seed
    return (engine_seed + 1 + number * _SEED_STEP) & _SEED_MASK


def _require(holds: bool, where: str, expected: str, found: object) -> None:
    if holds:
        return
    # A number may have so many digits that Python refuses to write it.
    shown = f"a whole number of {found.bit_length()} bits" if isinstance(found, int) and abs(found) > 1 << 99 else None
    raise UsageError(
        where,
        expected=expected,
        found=shown or f"{type(found).__name__} {found!r:.60}",
        action="Correct this argument of the request, or leave it out.",
    )
