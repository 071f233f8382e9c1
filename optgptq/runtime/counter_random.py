"""Random numbers that are a function of their place: nothing is drawn from a state that others draw from too.

Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), Philox4x32 with ten
rounds. The key is the seed; the counter is the fork and the number of the new token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]  # each holds 32 bits, so that a product of two fits

NUM_ROUNDS = 10
MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
KEY_STEPS = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
LOW = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)
BITS_64 = (1 << 64) - 1


def philox(counter: Sequence[Words], key: Sequence[Words]) -> tuple[Words, Words, Words, Words]:
    """Return four words of 32 bits for each place.

    Args:
        counter: four arrays of words of 32 bits, one entry per place.
        key: two arrays of words of 32 bits.
    """
    first, second, third, fourth = counter
    key_first, key_second = key
    for _ in range(NUM_ROUNDS):
        product, other = first * MULTIPLIERS[0], third * MULTIPLIERS[1]
        first, second, third, fourth = (
            (other >> HALF) ^ second ^ key_first,
            other & LOW,
            (product >> HALF) ^ fourth ^ key_second,
            product & LOW,
        )
        key_first, key_second = (key_first + KEY_STEPS[0]) & LOW, (key_second + KEY_STEPS[1]) & LOW
    return first, second, third, fourth


def uniforms(seeds: Sequence[int], forks: Sequence[int], numbers: Sequence[int]) -> npt.NDArray[np.float64]:
    """Return numbers of `[0, 1)` with 53 random bits, one for each seed, fork and number of a token.

    All three count modulo 2**64.
    """
    key, fork, number = _halves(seeds), _halves(forks), _halves(numbers)
    high, low, _, _ = philox((*number, *fork), key)
    bits = (high << np.uint64(21)) | (low >> np.uint64(11))
    return bits.astype(np.float64) * 2.0**-53


def _halves(values: Sequence[int]) -> tuple[Words, Words]:
    """Return the lower and the upper 32 bits of each value."""
    whole = np.array([value & BITS_64 for value in values], dtype=np.uint64)
    return whole & LOW, whole >> HALF
